"""Sampling on the device against brute force."""

import random

import pytest
import torch

from replicas.kernels.confidence import confidence
from replicas.kernels.sample_rows import Draws, sample_rows, sample_rows_reference
from replicas.messages import SamplingParams
from replicas.model.logit_rules import Row
from replicas.model.sampler import sample, uniforms
from tests.replicas.kernels.cases import DEVICE, DTYPES, ON_GPU, generator, normal


def draw(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(num_rows, device=DEVICE, generator=generator(seed))


@pytest.mark.parametrize("vocab", [23, 97, 5000, *([131072] if ON_GPU else [])])
@pytest.mark.parametrize(
    ("dtype", "mask_token_id"), [(torch.float32, None), *((dtype, 5) for dtype in DTYPES)]
)
def test_rows_are_sampled_as_defined(vocab: int, dtype: torch.dtype, mask_token_id: int | None) -> None:
    logits = normal(8, vocab, dtype=dtype, scale=2.0)
    if mask_token_id is not None:
        logits[:, mask_token_id] = 20.0
    temperatures = torch.tensor([0.0, 0.3, 0.7, 1.0, 1.5, 0.0, 3.0, 1e-5], device=DEVICE)
    random = draw(8)
    draws = Draws.at(temperatures, random)
    found = sample_rows(logits, confidence(logits, mask_token_id), draws, mask_token_id)
    expected = sample_rows_reference(logits, draws, mask_token_id)
    assert found.tokens.tolist() == expected.tolist()
    assert found.report[0].tolist() == expected.tolist()
    wide = logits.double()
    if mask_token_id is not None:
        wide[:, mask_token_id] = -torch.inf
    probs = wide.softmax(-1).gather(1, expected[:, None]).squeeze(1)
    torch.testing.assert_close(found.report[1], probs, atol=1e-6, rtol=1e-4)


def test_sampler_and_kernel_draw_the_same_tokens() -> None:
    """The scheme of replicas.model.sampler: a token is a function of logits, seed and position."""
    logits = normal(12, 300, scale=2.0)
    rows = [
        Row(SamplingParams(temperature=0.8 if k % 3 else 0.0, seed=k, max_tokens=1), position=10 + k)
        for k in range(12)
    ]
    numbers = uniforms([row.sampling.seed for row in rows], [row.position for row in rows])
    temperatures = torch.tensor([row.sampling.temperature for row in rows], device=DEVICE)
    random = torch.from_numpy(numbers).float().to(DEVICE)
    found = sample_rows(logits, confidence(logits, 4), Draws.at(temperatures, random), 4)
    assert found.tokens.tolist() == sample(logits.cpu().clone(), rows, 4)[0]


def test_extreme_random_numbers_land_on_possible_tokens() -> None:
    logits = torch.full((4, 9000), -torch.inf, device=DEVICE)
    logits[:, [3, 4500, 8000]] = 0.0
    random = torch.tensor([0.0, 1 - 2**-24, 1.0, 0.5], device=DEVICE)
    draws = Draws.at(torch.ones(4, device=DEVICE), random)
    tokens = sample_rows(logits, confidence(logits, None), draws, None).tokens
    assert tokens.tolist() == [3, 8000, 8000, 4500]


def test_a_rows_token_does_not_depend_on_the_batch() -> None:
    logits, random = normal(6, 5000), draw(6)
    temperatures = torch.ones(6, device=DEVICE)
    together = sample_rows(logits, confidence(logits, None), Draws.at(temperatures, random), None).tokens
    for row in range(6):
        part = slice(row, row + 1)
        alone = sample_rows(
            logits[part], confidence(logits[part], None), Draws.at(temperatures[part], random[part]), None
        )
        assert alone.tokens.tolist() == together[part].tolist()


def test_rows_that_are_not_finite_draw_a_token_of_the_vocabulary_and_change_no_other() -> None:
    logits, random = normal(7, 5000), draw(7)
    logits[1, 4000] = torch.nan
    logits[3] = torch.inf
    logits[5] = -torch.inf
    temperatures = torch.tensor([1.0, 1.0, 0.0, 0.5, 1e30, 1.0, 1e-5], device=DEVICE)
    together = sample_rows(
        logits, confidence(logits, None), Draws.at(temperatures, random), None
    ).tokens.tolist()
    assert all(0 <= token < 5000 for token in together)
    for row in (0, 2, 4, 6):
        part = slice(row, row + 1)
        alone = sample_rows(
            logits[part], confidence(logits[part], None), Draws.at(temperatures[part], random[part]), None
        )
        assert alone.tokens.tolist() == together[part]


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_rows_of_many_equal_logits_take_the_lowest_id(dtype: torch.dtype) -> None:
    """As the sampler and its log-probabilities do."""
    logits = (normal(6, 9001, dtype=dtype, scale=4.0).float() * 2).round().clamp(max=4).to(dtype)
    greedy = torch.zeros(6, device=DEVICE)
    found = sample_rows(logits, confidence(logits, 5), Draws.at(greedy, draw(6)), 5)
    rows = [Row(SamplingParams(logprobs=1), position=k) for k in range(6)]
    tokens, _, tops = sample(logits.cpu().clone(), rows, 5)
    assert found.tokens.tolist() == tokens == [tops[row][0][0] for row in range(6)]


def as_draws(params: list[SamplingParams], random: torch.Tensor) -> Draws:
    def column(numbers: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(numbers, dtype=dtype, device=DEVICE)

    return Draws(
        column([one.temperature for one in params]),
        random,
        column([one.top_k for one in params], torch.int32),
        column([one.top_p for one in params]),
        column([one.min_p for one in params]),
    )


def drawn_by_both(
    logits: torch.Tensor, params: list[SamplingParams], mask_token_id: int | None
) -> tuple[list[int], list[int], list[int]]:
    """The tokens of the kernel, of its reference and of the CPU's sampler, by the same random numbers."""
    rows = [Row(one, position=40 + k) for k, one in enumerate(params)]
    numbers = uniforms([one.seed for one in params], [row.position for row in rows])
    draws = as_draws(params, torch.from_numpy(numbers).float().to(DEVICE))
    found = sample_rows(logits, confidence(logits, mask_token_id), draws, mask_token_id).tokens.tolist()
    expected = sample_rows_reference(logits, draws, mask_token_id).tolist()
    return found, expected, sample(logits.cpu().clone(), rows, mask_token_id)[0]


FILTERS: list[dict[str, float]] = [
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 7},
    {"top_k": 96},
    {"top_k": 97},
    {"top_k": 2**31 - 1},
    {"top_p": 0.0},
    {"top_p": 1e-30},
    {"top_p": 1e-3},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_p": 0.999999},
    {"min_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.5},
    {"top_k": 3, "top_p": 0.99, "min_p": 0.4},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
    {"top_p": 0.7, "min_p": 0.3},
]


@pytest.mark.parametrize(
    ("vocab", "filters"), [*((97, filters) for filters in FILTERS), *((9001, one) for one in FILTERS[-6:])]
)
def test_filters_keep_what_the_sampler_keeps(vocab: int, filters: dict[str, float]) -> None:
    """Among random logits, many equal ones, all equal ones, impossible ones, and a few possible ones."""
    logits = normal(15, vocab, scale=2.0)
    logits[3:6] = logits[3:6].round()
    logits[6:8] = 1.5
    logits[8:10] = torch.where(logits[8:10] > 0.5, logits[8:10].round(), -torch.inf)
    logits[10] = -torch.inf
    logits[10, [3, vocab // 2, vocab - 1]] = torch.tensor([2.0, 2.0, 1.0], device=DEVICE)
    logits[11] = -torch.inf
    logits[11, vocab - 2] = 0.0
    logits[12] *= 1e37
    logits[13] *= 1e-39
    temperatures = (0.7, 1.0, 2.5, 1.0, 0.5, 1.5, 1.0, 0.2, 1.0, 2.0, 1.0, 1.0, 1e30, 1e-5, 1e-5)
    params = [SamplingParams(temperature=t, seed=k, **filters) for k, t in enumerate(temperatures)]
    found, expected, of_sampler = drawn_by_both(logits, params, 5)
    assert found == of_sampler
    assert found == expected


@pytest.mark.parametrize("seed", range(4))
def test_random_filters_of_random_rows_keep_what_the_sampler_keeps(seed: int) -> None:
    rng = random.Random(seed)
    params = [
        SamplingParams(
            temperature=rng.choice((0.0, 0.3, 0.8, 1.0, 1.7)),
            top_k=rng.choice((0, 1, 5, 50, 3000)),
            top_p=rng.choice((1.0, 0.99, 0.9, 0.5, 0.05)),
            min_p=rng.choice((0.0, 0.0, 0.02, 0.5)),
            seed=rng.randrange(2**63),
        )
        for _ in range(24)
    ]
    logits = normal(24, 3001, seed=seed, scale=3.0)
    logits[::2] = (logits[::2] * 4).round() / 4
    found, expected, of_sampler = drawn_by_both(logits, params, None)
    assert found == of_sampler
    assert found == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filters_of_a_whole_vocabulary(dtype: torch.dtype) -> None:
    logits = normal(4, 1 << 17, scale=2.0, dtype=dtype)
    params = [
        SamplingParams(temperature=1.0, top_k=50, top_p=0.9, seed=1),
        SamplingParams(temperature=1.3, top_p=0.99, seed=2),
        SamplingParams(temperature=0.8, top_k=1 << 17, min_p=0.05, seed=3),
        SamplingParams(temperature=1.0, top_p=0.5, top_k=100_000, seed=4),
    ]
    found, expected, of_sampler = drawn_by_both(logits, params, 100)
    assert found == of_sampler
    assert found == expected


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75])
def test_the_token_that_crosses_top_p_is_kept_and_ties_go_by_id(top_p: float) -> None:
    """Of eight equal logits each number reaches as many as it should, and no more."""
    logits = torch.full((24, 40), -torch.inf, device=DEVICE)
    ids = [1, 4, 9, 16, 20, 25, 30, 36]
    logits[:, ids] = 0.0
    random = torch.arange(24, device=DEVICE) / 24
    params = [SamplingParams(temperature=1.0, top_p=top_p)] * 24
    found = sample_rows(logits, confidence(logits, None), as_draws(params, random), None).tokens.tolist()
    kept = ids[: int(8 * top_p)]
    assert sorted(set(found)) == kept
    counts = [found.count(token) for token in kept]
    assert max(counts) - min(counts) <= 1
