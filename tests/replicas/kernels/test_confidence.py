"""The most probable token and the log-sum-exp against their definition in float64."""

import math

import pytest
import torch

from replicas.kernels.confidence import confidence, confidence_reference
from tests.replicas.kernels.cases import DTYPES, ON_GPU, normal


def check(logits: torch.Tensor, mask_token_id: int | None, num_splits: int | None) -> None:
    found, expected = (
        confidence(logits, mask_token_id, num_splits),
        confidence_reference(logits, mask_token_id),
    )
    assert found.tokens.tolist() == expected.tokens.tolist()
    torch.testing.assert_close(found.probs.double(), expected.probs, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(found.log_sums.double(), expected.log_sums, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "num_splits"), [((3, 97), 1), ((2, 9001), 1), ((2, 9001), 2), ((1, 40000), 8)]
)
def test_confidence(shape: tuple[int, int], num_splits: int, dtype: torch.dtype) -> None:
    """Half precision has many ties, of which the lowest id counts."""
    logits = normal(*shape, dtype=dtype, scale=4.0)
    logits[0, shape[1] - 1] = 30.0
    check(logits, None, num_splits)
    check(logits, shape[1] - 1, num_splits)


def test_splits_are_chosen() -> None:
    check(normal(2, 20000, scale=3.0), 7, None)


def test_ties_across_blocks_and_splits() -> None:
    logits = normal(2, 12000).clamp(max=0.5)
    logits[0, [5000, 11000]] = 9.0
    logits[1, [100, 4095, 4096]] = 9.0
    for num_splits in (1, 2):
        check(logits, None, num_splits)
        check(logits, 100, num_splits)


def test_far_values() -> None:
    logits = normal(3, 5000)
    logits[0] -= 3000.0
    logits[1, 4999] = 1e4
    logits[2, :4100] = -torch.inf
    check(logits, 0, 1)
    check(logits, 0, 2)


def test_rows_with_a_stride() -> None:
    check(normal(4, 200)[:, 20:117], 3, None)


def test_no_rows() -> None:
    assert [len(part) for part in confidence(normal(0, 50), None)] == [0, 0, 0]


@pytest.mark.skipif(not ON_GPU, reason="full shapes need a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 33, 2048])
def test_full_shapes(num_rows: int, dtype: torch.dtype) -> None:
    check(normal(num_rows, 131072, dtype=dtype, scale=5.0), 100, None)


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite_have_no_probability_and_change_no_other(
    dtype: torch.dtype, num_splits: int
) -> None:
    """Their tokens are in the vocabulary all the same: what follows on the device looks them up."""
    logits = normal(9, 9001, dtype=dtype)
    healthy = logits[::2].clone()
    logits[1, 17] = torch.nan
    logits[3] = torch.nan
    logits[5, 9000] = torch.inf
    logits[7] = -torch.inf
    found = confidence(logits, 3, num_splits)
    alone = confidence(healthy, 3, num_splits)
    assert [math.isfinite(prob) for prob in found.probs.tolist()] == [True, False] * 4 + [True]
    assert not found.log_sums[1::2].isfinite().any()
    assert all(0 <= token < 9001 for token in found.tokens.tolist())
    for part, expected in zip(found, alone, strict=True):
        assert torch.equal(part[::2], expected)


def test_fewer_ids_than_the_rows_hold() -> None:
    """A padded vocabulary: what lies past it is not looked at."""
    logits = normal(4, 5000)
    logits[:, 4500:] = 90.0
    logits[2, 4600] = torch.nan
    check(logits[:, :4500], 7, 1)
    check(logits[:, :4500], 7, 2)
