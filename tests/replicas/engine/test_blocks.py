"""The page pool against a plain model of what it must know: whole prefixes, compared token for token."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas.engine.blocks import ROOT, PagePool
from tests.thorough import examples


@examples(50)
@given(seed=st.integers(0, 10**9), num_pages=st.integers(1, 12), page_size=st.integers(1, 3))
def test_random_use_keeps_the_books(seed: int, num_pages: int, page_size: int) -> None:
    """content: what each page really holds, as (prefix, tokens); a found page must hold what was asked."""
    rng = random.Random(seed)
    pool = PagePool(num_pages, page_size)
    content: dict[int, tuple[int, ...]] = {}
    live: list[list[int]] = []
    for _ in range(80):
        if live and rng.random() < 0.4:
            ended = live.pop(rng.randrange(len(live)))
            if rng.random() < 0.2:
                pool.forget(ended)
                forgotten = content[ended[-1]] if ended else ()
                found, _ = pool.find(forgotten)
                assert not set(found) & set(ended)
                pool.release(found)
            pool.release(ended)
        else:
            num_full = rng.randint(0, 4)
            tokens = tuple(rng.randint(0, 1) for _ in range(num_full * page_size))
            pages, number = pool.find(tokens)
            for index, page in enumerate(pages):
                assert content[page] == tokens[: (index + 1) * page_size]
            fresh = pool.allocate(num_full - len(pages))
            if fresh is None:
                assert num_full - len(pages) > pool.num_free
                pool.release(pages)
            else:
                for page in fresh:
                    pages.append(page)
                    end = len(pages) * page_size
                    content[page] = tokens[:end]
                    number = pool.keep(page, number, tokens[end - page_size : end])
                live.append(pages)
        pool.check_integrity(page for pages in live for page in pages)
    for pages in live:
        pool.release(pages)
    pool.check_integrity([])
    assert pool.num_free == num_pages


def test_the_longest_unused_goes_first_and_a_prefix_outlives_what_follows() -> None:
    pool = PagePool(3, 1)
    old = pool.allocate(2)
    assert old is not None
    number = pool.keep(old[0], ROOT, (1,))
    pool.keep(old[1], number, (2,))
    pool.release(old)
    assert pool.find([1, 2])[0] == old
    pool.release(old)
    taken = pool.allocate(2)  # the free page, then the end of the old prefix
    assert taken is not None
    assert old[0] not in taken
    assert pool.find([1, 2])[0] == old[:1]


def test_equal_content_is_found_once() -> None:
    pool = PagePool(4, 2)
    first, second = pool.allocate(1), pool.allocate(1)
    assert first is not None
    assert second is not None
    assert pool.keep(first[0], ROOT, (1, 2)) == pool.keep(second[0], ROOT, (1, 2))
    pool.release(second)
    assert pool.num_free == 3
    assert pool.find([1, 2])[0] == first


def test_misuse_is_an_error() -> None:
    pool = PagePool(2, 4)
    with pytest.raises(KeyError):
        pool.release([0])
    assert pool.allocate(3) is None
    with pytest.raises(ValueError, match="at least 1"):
        PagePool(0, 4)
