"""Tokens chosen from logits that are split among processes are those chosen from whole rows."""

import pytest

from replicas.model.parallel import Parallel, VocabPart
from tests.replicas.model.ranks import ranks


def test_brute_force_with_equal_and_odd_logits() -> None:
    """Vocabularies of 3 to 69 tokens among 3 processes, so parts of padding too."""
    with ranks("split_choice", 3) as processes:
        results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, results
    assert results[0][0] == "0 True True\n"


@pytest.mark.parametrize("size", range(1, 9))
def test_each_token_is_in_one_part(size: int) -> None:
    for vocab_size in (1, 7, 8, 97):
        parts = [VocabPart.of(vocab_size, Parallel(rank, size)) for rank in range(size)]
        assert sum(part.num_tokens for part in parts) == vocab_size
        for token in range(vocab_size):
            columns = [(part.first, part.column(token)) for part in parts]
            (found,) = [(first, column) for first, column in columns if column is not None]
            assert sum(found) == token
        assert all(part.column(None) is None for part in parts)
