"""Penalties, biases, min_tokens and masks against their definitions, one row and one token at a time."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from replicas.engine.batch import Segment
from replicas.engine.history import NO_TOKENS, Prefix
from replicas.messages import JsonFormat, SamplingParams
from replicas.model.logit_rules import Row, apply_rules, runs_of
from replicas.model.runner import rows_of
from replicas.model.sampler import sample

VOCAB = 41
EOS = {2, 9}
ANY_JSON = JsonFormat("{}")


def by_definition(logits: Sequence[float], row: Row) -> list[float]:
    """In float64."""
    sampling, changed = row.sampling, [float(value) for value in logits]
    seen = [*row.seen.token_ids, *row.then]
    for token in set(seen):
        scale = sampling.repetition_penalty
        changed[token] = changed[token] / scale if changed[token] > 0 else changed[token] * scale
    for token, count in Counter(seen[row.prompt_len :]).items():
        changed[token] -= sampling.presence_penalty + count * sampling.frequency_penalty
    for token, bias in sampling.logit_bias:
        changed[token] += bias
    for token in range(len(changed)):
        if token in EOS and row.position < row.prompt_len + sampling.min_tokens:
            changed[token] = -math.inf
        if row.allowed is not None and not int.from_bytes(row.allowed, "little") >> token & 1:
            changed[token] = -math.inf
    return changed


def random_params(rng: np.random.Generator) -> SamplingParams:
    fields: dict[str, object] = {}
    if rng.random() < 0.5:
        fields["repetition_penalty"] = float(rng.choice([0.01, 0.7, 1.1, 3.0, 100.0]))
    if rng.random() < 0.4:
        fields["presence_penalty"] = float(rng.uniform(-2, 2))
    if rng.random() < 0.4:
        fields["frequency_penalty"] = float(rng.uniform(-2, 2))
    if rng.random() < 0.4:
        count = int(rng.integers(1, 9))
        biases = zip(rng.integers(0, VOCAB, count).tolist(), rng.uniform(-9, 9, count).tolist(), strict=True)
        fields["logit_bias"] = tuple(biases)  # the same id may come twice
    if rng.random() < 0.4:
        fields["min_tokens"] = int(rng.integers(1, 9))
    if rng.random() < 0.3:
        fields["response_format"] = ANY_JSON
    return SamplingParams(seed=int(rng.integers(0, 99)), **fields)


def random_segment(rng: np.random.Generator, sampling: SamplingParams) -> Segment:
    """A step, a verify, a draft or the last chunk of a prompt."""
    start, length = int(rng.integers(0, 20)), int(rng.integers(1, 9))
    kind = rng.choice(["verify", "draft", "prefill"])
    prompt_len = start + length if kind == "prefill" else int(rng.integers(0, start + 1))
    wanted = {"verify": range(length), "draft": range(1, length), "prefill": [length - 1]}[kind]
    num_masks = len(wanted) if sampling.response_format else 0
    token_ids = tuple(rng.integers(0, VOCAB, length).tolist())
    history = NO_TOKENS
    if sampling.has_penalties:
        num_seen = int(rng.integers(0, 2 if kind == "draft" else wanted[0] + 2))
        history = Prefix.of((*rng.integers(0, VOCAB, start).tolist(), *token_ids[:num_seen]), prompt_len)
    return Segment(
        seq_id=0,
        start=start,
        token_ids=token_ids,
        pages=(),
        num_causal=0 if kind == "draft" else length,
        adapter=kind == "draft",
        wanted=tuple(wanted),
        sampling=sampling,
        prompt_len=prompt_len,
        history=history,
        allowed=tuple(rng.bytes(int(rng.integers(1, 9))) for _ in range(num_masks)),
    )


@pytest.mark.parametrize("padding", [0, 7])
def test_rules_of_a_mixed_batch_are_those_of_each_row_by_definition(padding: int) -> None:
    """Also where rows of logits have a stride; and any token's logits are the model's again when restored."""
    rng = np.random.default_rng(padding)
    for _ in range(60):
        shared = random_params(rng)  # as between the choices of one request
        params = [shared if rng.random() < 0.3 else random_params(rng) for _ in range(6)]
        rows = [row for sampling in params for row in rows_of(random_segment(rng, sampling))]
        raw = torch.from_numpy(rng.normal(size=(len(rows), VOCAB + padding)) * 3).float()[:, :VOCAB]
        logits = raw.as_strided(raw.shape, raw.stride()).clone(memory_format=torch.preserve_format)
        logits = torch.empty(len(rows), VOCAB + padding)[:, :VOCAB].copy_(raw)
        ruled = [index for index, row in enumerate(rows) if row.has_rules]
        if not ruled:
            continue
        overwritten = apply_rules(logits, rows, ruled, EOS)
        expected = torch.tensor(
            [by_definition(line, row) for line, row in zip(raw.tolist(), rows, strict=True)]
        )
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)
        changed = logits.clone()
        for token in range(VOCAB):
            logits.copy_(changed)
            for part in overwritten:
                part.restore(torch.full((len(rows),), token))
            possible = expected[:, token] > -math.inf
            assert torch.equal(logits[possible, token], raw[possible, token])


def test_a_rows_rules_are_the_same_to_the_bit_in_any_batch() -> None:
    """Alone a row's tokens are counted with it; among the rows of a verify only what differs is."""
    rng = np.random.default_rng(3)
    for _ in range(60):
        segments = [random_segment(rng, random_params(rng)) for _ in range(4)]
        rows = [row for segment in segments for row in rows_of(segment)]
        raw = torch.from_numpy(rng.normal(size=(len(rows), VOCAB)) * 3).float()
        ruled = [index for index, row in enumerate(rows) if row.has_rules]
        together = raw.clone()
        if ruled:
            apply_rules(together, rows, ruled, EOS)
        for index in ruled:
            alone = raw[index : index + 1].clone()
            apply_rules(alone, [rows[index]], [0], EOS)
            assert torch.equal(alone[0], together[index])


class CountOperations(TorchDispatchMode):
    """Operations of torch, and the numbers that they wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = self.num_written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.num_operations += 1
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self._inputs(args):
            self.num_written += result.numel()
        return result

    @staticmethod
    def _inputs(args: Sequence[object]) -> set[int]:
        return {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}


def operations(sampling: SamplingParams, num_segments: int, length: int, context: int) -> CountOperations:
    rng = np.random.default_rng(0)
    rows = []
    for index in range(num_segments):
        seen = rng.integers(0, VOCAB, context).tolist() if sampling.has_penalties else ()
        tokens = tuple(rng.integers(0, VOCAB, length).tolist())
        part = Segment(
            index, context, tokens, (), length, False, tuple(range(length)), sampling, 3, Prefix.of(seen, 3),
            (b"\xff",) * length if sampling.response_format else (),
        )  # fmt: skip
        rows += rows_of(part)
    logits = torch.from_numpy(rng.normal(size=(len(rows), VOCAB))).float()
    with CountOperations() as counted:
        apply_rules(logits, rows, range(len(rows)), EOS)
    return counted


PENALTY = SamplingParams(repetition_penalty=1.1, frequency_penalty=0.5)
BIASES = SamplingParams(logit_bias=tuple((token, 1.0) for token in range(30)))


RULES = {
    "penalties": (PENALTY, 1),
    "biases": (BIASES, 1),
    "biases of a verify": (BIASES, 16),
    "masks": (SamplingParams(response_format=ANY_JSON), 1),
    "min_tokens": (SamplingParams(min_tokens=5000), 1),
}


@pytest.mark.parametrize(("sampling", "length"), RULES.values(), ids=RULES)
def test_the_number_of_operations_depends_on_neither_rows_nor_tokens(
    sampling: SamplingParams, length: int
) -> None:
    few, many = operations(sampling, 1, length, 10), operations(sampling, 64, length, 3000)
    assert many.num_operations == few.num_operations


def test_the_operations_of_a_verify_depend_on_neither_its_length_nor_its_context() -> None:
    few, many = operations(PENALTY, 1, 2, 10), operations(PENALTY, 1, 64, 3000)
    assert many.num_operations == few.num_operations


def test_one_ruled_row_copies_no_other() -> None:
    num_rows, vocab = 256, 1000
    logits = torch.zeros(num_rows, vocab)
    rows = [
        Row(SamplingParams(logit_bias=((5, 1.0),)) if k == 7 else SamplingParams(), 10)
        for k in range(num_rows)
    ]
    with CountOperations() as counted:
        apply_rules(logits, rows, [7], EOS)
    assert counted.num_written < vocab


def test_runs_of_neighbours() -> None:
    assert runs_of([]) == []
    assert runs_of([3, 4, 5, 8, 10, 11]) == [slice(3, 6), slice(8, 9), slice(10, 12)]
    assert runs_of(range(5), 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_ids_outside_the_vocabulary_have_no_effect() -> None:
    """A checkpoint's end of text, a bias, or a token of a prompt, past the ids that are sampled."""
    sampling = SamplingParams(
        repetition_penalty=2.0,
        presence_penalty=1.0,
        min_tokens=5,
        logit_bias=((VOCAB, 50.0), (3, 1.0), (999, 9.0)),
    )
    within = SamplingParams(
        repetition_penalty=2.0, presence_penalty=1.0, min_tokens=5, logit_bias=((3, 1.0),)
    )
    raw = torch.from_numpy(np.random.default_rng(5).normal(size=(3, VOCAB))).float()
    seen, known_seen = Prefix.of((4, VOCAB, 7, VOCAB + 9), 2), Prefix.of((4, 7), 1)
    rows = [Row(sampling, 4 + k, 2, seen, then=(7, VOCAB + 1, 8)[:k]) for k in range(3)]
    known = [Row(within, 4 + k, 1, known_seen, then=((), (7,), (7,))[k]) for k in range(2)]
    found, expected = raw.clone(), raw.clone()
    apply_rules(found, rows, range(3), {2, VOCAB, 5 * VOCAB})
    apply_rules(expected, known, range(2), {2})
    assert torch.equal(found[:2], expected[:2])
    assert found[2].isfinite().sum() == VOCAB - 1


def test_a_mask_shorter_than_the_vocabulary_allows_nothing_past_it() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 30] = 9.0
    row = Row(SamplingParams(response_format=ANY_JSON), 3, allowed=b"\x10")
    tokens, _, _ = sample(logits, [row, row], None)
    assert tokens == [4, 4]
