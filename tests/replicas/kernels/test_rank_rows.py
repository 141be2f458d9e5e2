"""The most probable tokens of rows against a stable sort."""

import pytest
import torch

from replicas.kernels.rank_rows import rank_rows, rank_rows_reference
from tests.replicas.kernels.cases import DEVICE, DTYPES, normal


@pytest.mark.parametrize("vocab", [23, 9001])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_ranked", [1, 4, 30])
def test_tokens_are_ranked_as_sorted(vocab: int, dtype: torch.dtype, num_ranked: int) -> None:
    """Equal logits too, and impossible ones; and the mask token only where nothing else is left."""
    logits = normal(5, vocab, dtype=dtype, scale=2.0)
    logits[1] = logits[1].round()
    logits[2] = 1.0
    logits[3, 3:] = -torch.inf
    rows = torch.tensor([3, 1, 2, 0], dtype=torch.int32, device=DEVICE)
    found = rank_rows(logits, rows, num_ranked, 5)
    expected = rank_rows_reference(logits, rows, num_ranked, 5)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


def test_rows_that_are_not_finite_end_and_change_no_other() -> None:
    logits = normal(3, 100)
    logits[0, 4] = torch.nan
    logits[1, 7] = torch.inf
    rows = torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE)
    found = rank_rows(logits, rows, 5, None)
    assert bool((found[0] < 100).all())
    assert torch.equal(found[:, 2], rank_rows_reference(logits, rows, 5, None)[:, 2])
