"""Sampling on the device against brute force."""

import pytest
import torch

from replicas.kernels.confidence import confidence
from replicas.kernels.sample_rows import sample_rows, sample_rows_reference
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
    found = sample_rows(logits, confidence(logits, mask_token_id), temperatures, random, mask_token_id)
    expected = sample_rows_reference(logits, temperatures, random, mask_token_id)
    assert found.tokens.tolist() == expected.tolist()
    assert found.pairs[0].tolist() == expected.tolist()
    wide = logits.double()
    if mask_token_id is not None:
        wide[:, mask_token_id] = -torch.inf
    probs = wide.softmax(-1).gather(1, expected[:, None]).squeeze(1)
    torch.testing.assert_close(found.pairs[1], probs, atol=1e-6, rtol=1e-4)


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
    found = sample_rows(logits, confidence(logits, 4), temperatures, random, 4)
    assert found.tokens.tolist() == sample(logits.cpu().clone(), rows, 4)[0]


def test_extreme_random_numbers_land_on_possible_tokens() -> None:
    logits = torch.full((4, 9000), -torch.inf, device=DEVICE)
    logits[:, [3, 4500, 8000]] = 0.0
    random = torch.tensor([0.0, 1 - 2**-24, 1.0, 0.5], device=DEVICE)
    tokens = sample_rows(logits, confidence(logits, None), torch.ones(4, device=DEVICE), random, None).tokens
    assert tokens.tolist() == [3, 8000, 8000, 4500]


def test_a_rows_token_does_not_depend_on_the_batch() -> None:
    logits, random = normal(6, 5000), draw(6)
    temperatures = torch.ones(6, device=DEVICE)
    together = sample_rows(logits, confidence(logits, None), temperatures, random, None).tokens
    for row in range(6):
        part = slice(row, row + 1)
        alone = sample_rows(
            logits[part], confidence(logits[part], None), temperatures[part], random[part], None
        )
        assert alone.tokens.tolist() == together[part].tolist()


def test_rows_that_are_not_finite_draw_a_token_of_the_vocabulary_and_change_no_other() -> None:
    logits, random = normal(7, 5000), draw(7)
    logits[1, 4000] = torch.nan
    logits[3] = torch.inf
    logits[5] = -torch.inf
    temperatures = torch.tensor([1.0, 1.0, 0.0, 0.5, 1e30, 1.0, 1e-5], device=DEVICE)
    together = sample_rows(logits, confidence(logits, None), temperatures, random, None).tokens.tolist()
    assert all(0 <= token < 5000 for token in together)
    for row in (0, 2, 4, 6):
        part = slice(row, row + 1)
        alone = sample_rows(
            logits[part], confidence(logits[part], None), temperatures[part], random[part], None
        )
        assert alone.tokens.tolist() == together[part]


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_rows_of_many_equal_logits_take_the_lowest_id(dtype: torch.dtype) -> None:
    """As the sampler and its log-probabilities do."""
    logits = (normal(6, 9001, dtype=dtype, scale=4.0).float() * 2).round().clamp(max=4).to(dtype)
    greedy = torch.zeros(6, device=DEVICE)
    found = sample_rows(logits, confidence(logits, 5), greedy, draw(6), 5)
    rows = [Row(SamplingParams(logprobs=1), position=k) for k in range(6)]
    tokens, _, tops = sample(logits.cpu().clone(), rows, 5)
    assert found.tokens.tolist() == tokens == [tops[row][0][0] for row in range(6)]
