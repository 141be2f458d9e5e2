"""Logits as rules change them, against the definition."""

import numpy as np
import pytest
import torch

from replicas.kernels.rules import apply_rules, apply_rules_reference
from tests.replicas.kernels.cases import DEVICE, DTYPES, normal


def as_words(rules: list[tuple[int, float, float, float]]) -> list[int]:
    words: list[int] = []
    for token, *amounts in rules:
        words += [token, *np.array(amounts, np.float32).view(np.int32).tolist()]
    return words


@pytest.mark.parametrize("vocab", [40, 97, 9001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rules_change_logits_as_defined(vocab: int, dtype: torch.dtype) -> None:
    """Shared rules, own ones instead of them, more than a block of them, masks, and rows without any."""
    rng = np.random.default_rng(vocab)
    logits = normal(6, vocab, dtype=dtype, scale=3.0)
    logits[1, 7] = -torch.inf
    shared_ids = rng.permutation(vocab)[: min(vocab, 700)].tolist()
    shared = [(token, 1.3, float(rng.normal()), float(rng.normal())) for token in shared_ids]
    own = [(token, 0.7, 0.5, -2.0) for token in (*shared_ids[:5], 7)]
    own += [(2, 1.0, 0.0, -np.inf)]
    mask = rng.integers(-(2**31), 2**31, -(-vocab // 32)).tolist()
    words = torch.tensor([9, 9, 9, *as_words(shared), *as_words(own), *mask], dtype=torch.int32)
    at_own = 3 + 4 * len(shared)
    at_mask = at_own + 4 * len(own)
    ruled = [
        (4, 3, len(shared), at_own, len(own), -1),
        (1, 3, len(shared), at_own, len(own), at_mask),
        (-1, -1, -1, -1, -1, -1),
        (0, 3, 0, at_own, len(own), -1),
        (5, 3, 0, 3, 0, at_mask),
        (2, 3, len(shared), 3, 0, -1),
        (-1, -1, -1, -1, -1, -1),
    ]
    table = torch.tensor(ruled, dtype=torch.int32, device=DEVICE)
    kept = logits.clone()
    found = apply_rules(logits, table, words.to(DEVICE), 5)
    expected = apply_rules_reference(logits, table, words.to(DEVICE), 5)
    assert torch.equal(logits, kept)
    torch.testing.assert_close(found, expected, atol=0.0, rtol=0.0, equal_nan=True)


def test_rows_without_rules_need_no_lines() -> None:
    empty = torch.empty(0, 6, dtype=torch.int32, device=DEVICE)
    assert apply_rules(
        normal(3, 50), empty, torch.zeros(4, dtype=torch.int32, device=DEVICE), None
    ).shape == (
        0,
        50,
    )
