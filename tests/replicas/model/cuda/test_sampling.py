"""The GPU's choice of tokens is the CPU's for every field of a request; what is begun ahead is right."""

import math
import random
from collections.abc import Sequence as Seq
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from policies.modes import DecodePlan, Mode
from replicas.answer_forms import JsonFormat, ThinkingBudget
from replicas.engine.batch import Runner, Segment, SegmentOutput
from replicas.engine.engine import Engine
from replicas.engine.history import NO_TOKENS, Prefix
from replicas.kernels.confidence import confidence
from replicas.kernels.rules import apply_rules
from replicas.kernels.sample_rows import Ruled, sample_rows
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.config import ModelConfig
from replicas.model.cuda.choices import Choices
from replicas.model.cuda.inputs import HostStep, StepInputs
from replicas.model.cuda.runner import CudaRunner, Options
from replicas.model.cuda.sampling import Sampled
from replicas.model.cuda.sizes import GraphSizes
from replicas.model.cuda.staging import Staging
from replicas.model.runner import TorchRunner, outputs_of, rows_of
from replicas.model.sampler import sample
from tests.replicas.model.conftest import prompt, segment
from tests.tiny_checkpoint import MASK_TOKEN_ID, make_tiny_checkpoint, tiny_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = ModelConfig.parse(tiny_config())
VOCAB = CONFIG.vocab_size
PAGE = 8
PLACES = (12, 8, 4)
EOS = frozenset({2})
JSON = JsonFormat("{}")
ACTING = {
    "temperature": {"temperature": 0.8},
    "top_p": {"temperature": 0.8, "top_p": 0.5},
    "top_k": {"temperature": 0.8, "top_k": 2},
    "min_p": {"temperature": 0.8, "min_p": 0.3},
    "seed": {"temperature": 0.8, "seed": 2**63 - 1},
    "presence_penalty": {"presence_penalty": 2.0},
    "frequency_penalty": {"frequency_penalty": 2.0},
    "repetition_penalty": {"repetition_penalty": 5.0},
    "logit_bias": {"logit_bias": ((11, 100.0),)},
    "min_tokens": {"min_tokens": 50},
    "logprobs": {"logprobs": 3},
    "response_format": {"response_format": JSON},
}
"""For every field that acts on the choice of a token, values with which it does."""
NOT_SAMPLINGS = {
    "max_tokens",
    "stop",
    "stop_token_ids",
    "includes_stop",
    "shows_special_tokens",
    "ignore_eos",
    "tools",
    "thinking_token_budget",
    "scores_prompt",
}
"""Fields that act on the text, or by what the engine makes of them: a mask, rows wanted of a prompt."""


def some_segments(sampling: SamplingParams) -> list[Segment]:
    """A step and a verify, with what the engine gives them of the request, and a draft."""
    history = Prefix.of(prompt(8, seed=1), 5) if sampling.has_penalties else NO_TOKENS
    made = []
    for seq_id, length in enumerate((1, 4)):
        part = segment(prompt(length, seed=2 + seq_id), (1, 2), start=8, sampling=sampling, seq_id=seq_id)
        mask = (1 << 30 | 1 << 41).to_bytes(13, "little")
        allowed = (mask,) * length if sampling.response_format else ()
        made.append(replace(part, prompt_len=5, history=history, allowed=allowed))
    tokens = [9, MASK_TOKEN_ID, MASK_TOKEN_ID]
    draft = segment(
        tokens, (3, 4), start=8, num_causal=0, adapter=True, wanted=(1, 2), sampling=sampling, seq_id=5
    )
    fixed = (30, 41) if sampling.has_penalties else ()
    return [*made, replace(draft, history=history, prompt_len=5, fixed=fixed)]


def some_logits(num_rows: int) -> torch.Tensor:
    logits = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(4))
    logits[:, 2] += 4.0  # the end of text, if it may come
    logits[:, prompt(8, seed=1)[6]] += 4.0  # a token of the completion
    return logits


def sampled_from(segments: Seq[Segment], logits: torch.Tensor) -> Sampled:
    """The choice by the kernels, padded as a graph needs it."""
    host = HostStep.pack(segments, CONFIG, PAGE, PLACES, Choices.of(segments, VOCAB, EOS))
    size = GraphSizes(CONFIG, PLACES).padded(host.size)
    assert size is not None
    staging = Staging(torch.device(DEVICE))
    inputs = StepInputs.view(staging.send_step(host, size, None), size)
    padded = torch.zeros(size.num_wanted, VOCAB, device=DEVICE)
    padded[: len(logits)] = logits
    ruled = Ruled(inputs.slots_ruled, apply_rules(padded, inputs.ruled, inputs.page_table, MASK_TOKEN_ID))
    best = confidence(padded, MASK_TOKEN_ID)
    drawn = sample_rows(padded, best, inputs.draws, MASK_TOKEN_ID, ruled)
    assert torch.equal(padded[: len(logits)].nan_to_num(), logits.to(DEVICE).nan_to_num()), (
        "the model's own logits stay as they are"
    )
    return Sampled.of(segments, padded[: len(logits)], drawn, MASK_TOKEN_ID, staging)


def on_cpu(segments: Seq[Segment], logits: torch.Tensor) -> list[SegmentOutput]:
    """The same by the CPU's sampler."""
    rows = [row for part in segments for row in rows_of(part)]
    tokens, probs, top = sample(logits.clone(), rows, MASK_TOKEN_ID, EOS)
    return outputs_of(segments, tokens, probs, top)


def assert_same(segments: Seq[Segment], logits: torch.Tensor) -> list[int]:
    """Chosen, reported and refused alike by the kernels and by the CPU's sampler; returns the tokens."""
    numbered = [replace(part, seq_id=number) for number, part in enumerate(segments)]
    outputs = sampled_from(numbered, logits).outputs(numbered)
    expected_outputs = on_cpu(segments, logits)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected_outputs]
    for output, other in zip(outputs, expected_outputs, strict=True):
        assert output.failure == other.failure
        assert output.probs == pytest.approx(other.probs, rel=1e-4, abs=1e-9)
        assert [[token for token, _ in top] for top in output.top] == [
            [token for token, _ in top] for top in other.top
        ]
        for top, other_top in zip(output.top, other.top, strict=True):
            assert [x for _, x in top] == pytest.approx([x for _, x in other_top], rel=1e-4, abs=1e-4)
    return [token for output in outputs for token in output.token_ids]


def test_every_field_is_listed() -> None:
    assert set(ACTING) == {field.name for field in fields(SamplingParams)} - NOT_SAMPLINGS


@pytest.mark.parametrize("field", ACTING)
def test_a_field_acts_as_on_the_cpu(field: str) -> None:
    segments = some_segments(SamplingParams(**ACTING[field]))
    plain = some_segments(SamplingParams())
    logits = some_logits(7)
    found = assert_same([*segments, *plain], torch.cat((logits, logits)))
    if field not in ("seed", "logprobs"):
        assert found[:5] != found[7:12], "it does not act in this test"


def test_a_mask_is_kept_to() -> None:
    step, _, _ = some_segments(SamplingParams(response_format=JSON))
    assert assert_same([step], some_logits(1))[0] in (30, 41)


@pytest.mark.parametrize("seed", range(30))
def test_random_requests_choose_as_on_the_cpu(seed: int) -> None:
    """Everything a request can ask for, in any company."""
    rng = random.Random(seed)
    segments: list[Segment] = []
    for seq_id in range(rng.randrange(1, 6)):
        neutral = rng.random() < 0.2
        sampling = SamplingParams() if neutral else some_sampling(rng)
        length = rng.choice((1, 1, 2, 5))
        start = rng.randrange(4, 20)
        history = NO_TOKENS
        tokens = prompt(start + length, seed=rng.randrange(100))
        prompt_len = rng.randrange(1, start)
        if sampling.has_penalties:
            history = Prefix.of(tokens[: start + rng.randrange(2)], prompt_len)
        num_causal = rng.choice((length, length, 0, length // 2))
        wanted = tuple(sorted(rng.sample(range(length), rng.randrange(1, length + 1))))
        allowed: tuple[bytes, ...] = ()
        if rng.random() < 0.3:
            num_masks = sum(index < num_causal for index in wanted)
            allowed = tuple(rng.randbytes(rng.choice((5, 13, 20))) for _ in range(num_masks))
        part = segment(tokens[start:], tuple(range(5)), start=start, num_causal=num_causal, wanted=wanted)
        segments.append(
            replace(
                part,
                sampling=sampling,
                prompt_len=prompt_len,
                history=history,
                allowed=allowed,
                seq_id=seq_id,
            )
        )
    num_rows = sum(len(part.wanted) for part in segments)
    logits = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    assert_same(segments, logits)


def some_sampling(rng: random.Random) -> SamplingParams:
    def maybe(value: float, neutral: float) -> float:
        return value if rng.random() < 0.4 else neutral

    biases = [(rng.randrange(VOCAB + 20), rng.uniform(-9, 9)) for _ in range(rng.randrange(6))]
    biases += [(2, 5.0)] * (rng.random() < 0.5)
    return SamplingParams(
        temperature=rng.choice((0.0, 0.7, 1.0)),
        seed=rng.randrange(2**63),
        top_p=maybe(rng.random(), 1.0),
        top_k=int(maybe(rng.randrange(1, 90), 0)),
        min_p=maybe(rng.random() / 3, 0.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(rng.choice((0.5, 1.3, 5.0)), 1.0),
        logit_bias=tuple(dict(biases).items()) if rng.random() < 0.5 else (),
        min_tokens=int(maybe(rng.randrange(1, 15), 0)),
        logprobs=rng.choice((None, None, 0, 1, 5)),
    )


@pytest.mark.parametrize(
    "given",
    [
        {"logit_bias": ((7, math.inf),)},
        {"logit_bias": tuple((token, -math.inf) for token in range(VOCAB))},
        {"presence_penalty": 1e300},
        {"presence_penalty": -1e300, "logit_bias": ((9, -math.inf),)},
        {"temperature": 0.5, "logit_bias": ((7, 1e39),)},
    ],
    ids=lambda given: "+".join(given),
)
def test_a_request_whose_own_rules_leave_no_token_fails_alone(given: dict) -> None:
    step, verify, _ = some_segments(SamplingParams(**given))
    plain = some_segments(SamplingParams())
    logits = some_logits(len(step.wanted) + len(verify.wanted) + 7)
    assert_same([step, verify, *plain], logits)


def test_only_part_of_a_step_may_be_asked_for() -> None:
    """By sequence, and as short as a segment has come to be."""
    segments = some_segments(SamplingParams(temperature=0.8, logprobs=2))
    sampled = sampled_from(segments, some_logits(7))
    whole = sampled.outputs(segments)
    short = replace(segments[1], token_ids=segments[1].token_ids[:2], num_causal=2, wanted=(0, 1))
    draft, verify = sampled.outputs([segments[2], short])
    assert draft == whole[2]
    for found, expected in ((verify.token_ids, whole[1].token_ids), (verify.top, whole[1].top)):
        assert found == expected[:2]


@pytest.mark.parametrize(
    "given",
    [{"response_format": JSON}, {"presence_penalty": 1.0}, {"thinking_token_budget": ThinkingBudget(9)}],
    ids=str,
)
def test_nothing_follows_unseen_what_the_host_has_a_say_in(folder: Path, given: dict[str, object]) -> None:
    runner = CudaRunner.load(str(folder), dtype="float32", device=DEVICE, num_pages=8, page_size=8)
    assert not any(runner.can_be_followed(part) for part in some_segments(SamplingParams(**given)))
    assert all(runner.can_be_followed(part) for part in some_segments(SamplingParams()))


def test_what_the_device_knows_is_followed_unseen(folder: Path) -> None:
    """A least length is known of where positions are, so not behind a verify or a draft."""
    runner = CudaRunner.load(str(folder), dtype="float32", device=DEVICE, num_pages=8, page_size=8)
    filtered = SamplingParams(temperature=0.8, top_p=0.5, logit_bias=((11, 1.0),), logprobs=2, min_tokens=3)
    assert all(runner.can_be_followed(part) for part in some_segments(filtered))
    step, verify, draft = some_segments(replace(filtered, min_tokens=50))
    assert runner.can_be_followed(step)
    assert not runner.can_be_followed(verify)
    assert not runner.can_be_followed(draft)


def test_nothing_follows_unseen_a_prompt_that_is_scored(folder: Path) -> None:
    """Its rows are no verify's."""
    runner = CudaRunner.load(str(folder), dtype="float32", device=DEVICE, num_pages=8, page_size=8)
    chunk = segment([5, 6], (1,), sampling=SamplingParams(logprobs=1, scores_prompt=True))
    assert not runner.can_be_followed(replace(chunk, allowed=(b"\xff" * 13, None)))


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, seed=3)], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_segment_whose_logits_are_not_finite_fails_alone(sampling: SamplingParams, value: float) -> None:
    segments = [replace(segment([5], (k,), start=3, seq_id=k), sampling=sampling) for k in range(3)]
    segments.append(replace(segments[2], seq_id=3, sampling=replace(sampling, logprobs=1)))
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    logits[3] = logits[2]

    def outputs() -> list:
        return sampled_from(segments, logits).outputs(segments)

    healthy = outputs()
    assert [output.failure for output in healthy] == [None] * 4
    for row in (1, 3):
        kept = logits[row].clone()
        logits[row, 50] = value
        found = outputs()
        logits[row] = kept
        assert "not finite" in str(found[row].failure)
        assert found[row].token_ids == ()
        assert [o for k, o in enumerate(found) if k != row] == [o for k, o in enumerate(healthy) if k != row]


class OddsAndEvens:
    """A grammar: odd tokens after even ones and even ones after odd ones, so a mask goes stale at once."""

    is_complete = False

    def __init__(self, last: int):
        self._last = last

    def masks(self, draft: Seq[int]) -> tuple[bytes, ...]:
        masks, last = [], self._last
        for token in (*draft, -1):
            masks.append((b"\x55" if last % 2 else b"\xaa") * 13)
            if token % 2 == last % 2:
                break
            last = token
        return tuple(masks)

    def accept(self, token_id: int) -> None:
        assert token_id % 2 != self._last % 2, "the grammar does not allow it"
        self._last = token_id


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=3, num_hidden_layers=1)


def complete(runner: Runner, plan: DecodePlan, with_grammar: bool) -> tuple[dict[str, list[int]], int]:
    """A completion that a grammar follows and two beside it, and the steps that were begun ahead."""
    engine = Engine(runner)
    length = None if plan.mode is Mode.AR else plan.block_length
    options = DecodingOptions(plan.mode, length)
    plain = SamplingParams(max_tokens=6, ignore_eos=True)
    sequences = [engine.submit(name, [11, 40, 7], plain, options) for name in ("plain", "other")]
    if with_grammar:
        sampling = SamplingParams(max_tokens=5, response_format=JSON)
        sequences.append(engine.submit("json", [11, 40, 7], sampling, options, grammar=OddsAndEvens(7)))
    while engine.has_work:
        assert all(made.error is None for made in engine.step())
    found = {sequence.request_id: sequence.tokens[3:] for sequence in sequences}
    return found, engine.scheduler.counters.num_ahead


@pytest.mark.parametrize(
    "plan", [DecodePlan(Mode.AR), DecodePlan(Mode.SELF_SPECULATION, 3)], ids=lambda plan: plan.mode
)
def test_a_grammar_is_followed_as_on_the_cpu(folder: Path, plan: DecodePlan) -> None:
    """Its own steps are not begun ahead; those of the others beside it are."""
    on_cpu = TorchRunner.load(str(folder), num_pages=64, page_size=8)
    on_gpu = CudaRunner.load(
        str(folder), dtype="float32", device=DEVICE, num_pages=64, page_size=8, options=Options(pads=False)
    )
    found, num_ahead = complete(on_gpu, plan, with_grammar=True)
    assert num_ahead > 0
    assert (found, 0) == complete(on_cpu, plan, with_grammar=True)
    assert all(a % 2 != b % 2 for a, b in zip([7, *found["json"]], found["json"], strict=False))
    assert found["plain"] == complete(on_gpu, plan, with_grammar=False)[0]["plain"]
