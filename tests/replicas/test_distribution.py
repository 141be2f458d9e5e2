"""Sampled self-speculation has AR's distribution: chi-square of many seeds against the reference."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path

import pytest
import torch

from policies.modes import Mode
from replicas.engine.engine import Engine
from replicas.engine.plan import ModelSpec, Runner, SegmentOutput, StepPlan
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.runner import TorchRunner
from tests.reference import Reference
from tests.tiny_checkpoint import MASK_TOKEN_ID, make_tiny_checkpoint

PROMPT = [7, 11, 3]
NUM_SEEDS = 3000
NUM_TOKENS = 3
FILTERS = [
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.3, top_k=12, top_p=0.6),
    SamplingParams(temperature=0.8, top_p=0.7),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    make_tiny_checkpoint(path, seed=3)
    return path


@pytest.mark.parametrize("sampling", FILTERS, ids=["top_k", "top_k and top_p", "top_p"])
def test_self_speculation_samples_as_ar_should(folder: Path, sampling: SamplingParams) -> None:
    expected = exact(Reference(folder), sampling)
    assert 8 < len(expected) < 5000
    for block_length in (2, 4):
        observed, accepted = sample(folder, sampling, block_length)
        assert set(observed) <= set(expected), "a token that the filters leave out"
        assert accepted > 0, "no draft was accepted: this would not test the acceptance"
        assert fits(observed, expected)


def test_another_temperature_does_not_fit(folder: Path) -> None:
    """So the judge can tell."""
    sampling = SamplingParams(temperature=0.7, top_k=5)
    observed, _ = sample(folder, SamplingParams(temperature=0.8, top_k=5), block_length=4)
    assert not fits(observed, exact(Reference(folder), sampling))


class Trusting(Runner):
    """Its verify takes the draft's token in one of so many places where AR's sample is another."""

    def __init__(self, inner: Runner, one_in: int):
        self._inner = inner
        self._one_in = one_in
        self._num_refused = 0

    @property
    def spec(self) -> ModelSpec:
        return self._inner.spec

    def run(self, plan: StepPlan) -> Seq[SegmentOutput]:
        outputs = list(self._inner.run(plan))
        for index, segment in enumerate(plan.segments):
            if segment.causal and len(segment.wanted) > 1:
                tokens = self._verified(segment.token_ids[1:], list(outputs[index].token_ids))
                outputs[index] = SegmentOutput(tokens, outputs[index].probs)
        return outputs

    def _verified(self, draft: Seq[int], tokens: list[int]) -> tuple[int, ...]:
        for place, drafted in enumerate(draft):
            if tokens[place] == drafted:
                continue
            self._num_refused += 1
            if self._num_refused % self._one_in:
                break
            tokens[place] = drafted
        return tuple(tokens)


@pytest.mark.parametrize("one_in", [1, 8])
def test_a_verify_that_trusts_the_draft_does_not_fit(folder: Path, one_in: int) -> None:
    sampling = FILTERS[0]
    observed, _ = sample(folder, sampling, 4, lambda runner: Trusting(runner, one_in))
    assert not fits(observed, exact(Reference(folder), sampling))


def sample(
    folder: Path,
    sampling: SamplingParams,
    block_length: int,
    wrapped: Callable[[Runner], Runner] = lambda runner: runner,
) -> tuple[Counter[tuple[int, ...]], int]:
    """How often each completion came, over the seeds; and how many rounds took more than one token."""
    runner = TorchRunner.load(str(folder), dtype="float32", num_pages=512, page_size=8)
    engine = Engine(wrapped(runner), max_waiting=NUM_SEEDS)
    options = DecodingOptions(Mode.SELF_SPECULATION, block_length)
    params = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    params |= {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")}
    sequences = [
        engine.submit(str(seed), PROMPT, SamplingParams(seed=seed, **params), options)
        for seed in range(NUM_SEEDS)
    ]
    while engine.has_work:
        engine.step()
    num_shorter = sum(sequence.num_forwards < 2 * (NUM_TOKENS - 1) for sequence in sequences)
    return Counter(tuple(s.tokens[len(PROMPT) :]) for s in sequences), num_shorter


def exact(reference: Reference, sampling: SamplingParams) -> dict[tuple[int, ...], float]:
    """Every completion's probability by the chain rule, from causal forwards."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(NUM_TOKENS):
        found = {
            (*tokens, token): chance * probability
            for tokens, chance in found.items()
            for token, probability in filtered(reference, [*PROMPT, *tokens], sampling).items()
        }
    return found


def filtered(reference: Reference, token_ids: list[int], sampling: SamplingParams) -> dict[int, float]:
    """temperature, then top_k, then top_p of what is left: the fewest most probable that reach it."""
    logits = reference.causal_logits(token_ids)[-1].double()
    logits[MASK_TOKEN_ID] = float("-inf")
    probabilities, order = torch.softmax(logits / sampling.temperature, -1).sort(descending=True)
    if sampling.top_k:
        probabilities = probabilities[: sampling.top_k]
    probabilities = probabilities / probabilities.sum()
    before = probabilities.cumsum(0) - probabilities
    kept = probabilities[before < sampling.top_p]
    return dict(zip(order.tolist(), (kept / kept.sum()).tolist(), strict=False))


def fits(observed: Mapping[tuple[int, ...], int], expected: Mapping[tuple[int, ...], float]) -> bool:
    """Pearson's test at one in 100,000; completions expected under 5 times are one cell."""
    num = sum(observed.values())
    cells = [(observed.get(key, 0), num * p) for key, p in expected.items() if num * p >= 5]
    rare = num - sum(count for count, _ in cells), num - sum(mean for _, mean in cells)
    if rare[1] >= 5:
        cells.append(rare)
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    return statistic < chi_square_quantile(len(cells) - 1, 4.265)


def chi_square_quantile(degrees: int, normal: float) -> float:
    """Wilson and Hilferty (1931). normal: the standard normal's quantile of the same probability."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + normal * math.sqrt(spread)) ** 3
