"""Sampled self-speculation has AR's distribution: chi-square of many seeds against the reference."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from policies.modes import Mode
from replicas.config import EngineConfig
from replicas.engine.batch import Runner, ScheduledBatch, SegmentOutput
from replicas.engine.engine import Engine
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.runner import TorchRunner
from tests.reference import Reference
from tests.tiny_checkpoint import MASK_TOKEN_ID, make_tiny_checkpoint

PROMPT = [7, 11, 3]
NUM_SEEDS = 3000
NUM_JUDGED = 3
MAX_TOKENS = 8
"""Longer than what is judged, so that no draft of its rounds is cut short by the end."""
NUM_FORWARDS_WITHOUT = MAX_TOKENS - 1
"""Where no draft is accepted: the prompt gives the first token."""
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
        observed, num_forwards, longest_round = sample(runner(folder), sampling, block_length)
        assert set(observed) <= set(expected), "a token that the filters leave out"
        assert sum(num < NUM_FORWARDS_WITHOUT for num in num_forwards) > NUM_SEEDS / 10, "too few accepted"
        assert fits(observed, expected)
        assert longest_round >= min(block_length, 3), "no round took more than the short block's two tokens"


def test_another_temperature_does_not_fit(folder: Path) -> None:
    """So the judge can tell."""
    observed, *_ = sample(runner(folder), replace(FILTERS[0], temperature=0.8), block_length=4)
    assert not fits(observed, exact(Reference(folder), FILTERS[0]))


@pytest.mark.parametrize("sampling", FILTERS, ids=["top_k", "top_k and top_p", "top_p"])
def test_accepting_every_draft_does_not_fit(folder: Path, sampling: SamplingParams) -> None:
    observed, *_ = sample(AcceptsAll(runner(folder)), sampling, block_length=4)
    assert not fits(observed, exact(Reference(folder), sampling))


class AcceptsAll:
    """A runner whose verify finds every drafted token to be the one it sampled."""

    def __init__(self, honest: Runner):
        self._honest = honest
        self.spec = honest.spec

    def run(self, batch: ScheduledBatch) -> Sequence[SegmentOutput]:
        outputs = self._honest.run(batch)
        return [
            replace(output, token_ids=(*segment.token_ids[1:count], *output.token_ids[count - 1 :]))
            if segment.start >= len(PROMPT) and (count := segment.num_causal) > 1
            else output
            for segment, output in zip(batch.segments, outputs, strict=True)
        ]


def runner(folder: Path) -> TorchRunner:
    return TorchRunner.load(str(folder), dtype="float32", num_pages=512, page_size=8)


def sample(
    runner: Runner, sampling: SamplingParams, block_length: int
) -> tuple[Counter[tuple[int, ...]], list[int], int]:
    """How often each beginning came; each completion's forwards; the most tokens of a round."""
    engine = Engine(runner, EngineConfig(max_waiting=NUM_SEEDS))
    options = DecodingOptions(Mode.SELF_SPECULATION, block_length)
    sequences = [
        engine.submit(
            str(seed), PROMPT, replace(sampling, seed=seed, max_tokens=MAX_TOKENS, ignore_eos=True), options
        )
        for seed in range(NUM_SEEDS)
    ]
    while engine.has_work:
        engine.step()
    judged = slice(len(PROMPT), len(PROMPT) + NUM_JUDGED)
    longest = max(made.tokens for made in engine.scheduler.counters.rounds)
    return Counter(tuple(s.tokens[judged]) for s in sequences), [s.num_forwards for s in sequences], longest


def exact(reference: Reference, sampling: SamplingParams) -> dict[tuple[int, ...], float]:
    """Every beginning's probability by the chain rule, from causal forwards."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(NUM_JUDGED):
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
    """Pearson's test at one in 100,000; beginnings expected under 5 times are one cell."""
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
