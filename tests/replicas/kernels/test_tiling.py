"""The lists of attention's work. Pure."""

import heapq
from random import Random

import numpy as np
import pytest

from replicas.kernels.attention import TILE_SHAPES, queries_per_tile
from replicas.kernels.tiling import FEW_ROWS, split_work, tiles_of, work_of

BLOCK = 64


def blocks_in_turn(items: np.ndarray, num_blocks: np.ndarray, num_places: int) -> int:
    """The blocks of keys that pass until the last program has ended, each begun where one has."""
    places = [0] * num_places
    for segment, _, split, num_splits, keys, _ in items.tolist():
        first = split * keys // BLOCK
        end = num_blocks[segment] if split == num_splits - 1 else first + keys // BLOCK
        heapq.heapreplace(places, places[0] + end - first)
    return max(places)


@pytest.mark.parametrize("seed", range(20))
def test_every_key_is_in_one_item_and_the_places_are_full(seed: int) -> None:
    rng = Random(seed)
    num_tiles, num_places = rng.randint(1, 80), rng.choice((1, 7, 49))
    num_keys = np.array([int(10 ** rng.uniform(0, 5)) for _ in range(num_tiles)])
    num_blocks = -(-num_keys // BLOCK)
    tiles = np.stack([np.arange(num_tiles), np.zeros(num_tiles, int)], 1)
    items = split_work(tiles, num_keys, num_places)
    assert len(items) <= num_tiles + num_places
    slots = set()
    for tile in range(num_tiles):
        own = items[items[:, 0] == tile]
        num_splits, keys = own[0, 3], own[0, 4]
        assert sorted(own[:, 2]) == list(range(num_splits))
        assert (num_splits - 1) * keys < num_keys[tile] <= num_splits * keys
        if num_splits > 1:
            taken = set(range(own[0, 5], own[0, 5] + num_splits))
            assert not slots & taken
            slots |= taken
    assert slots <= set(range(2 * num_places))
    share = -(-num_blocks.sum() // num_places)
    assert blocks_in_turn(items, num_blocks, num_places) <= 2 * max(share, 2)


def test_a_long_context_among_short_ones_takes_no_longer_than_its_share() -> None:
    """64 requests of 1,000 tokens and one of 90,000 on an H200, where three programs an SM share 8 heads."""
    starts = [999] * 64 + [89_999]
    items = work_of(starts, [1] * 65, [1] * 65, 4, (49, 33, 16))[0]
    num_blocks = np.array([16] * 64 + [1407])
    assert blocks_in_turn(items, num_blocks, 49) <= 66
    assert num_blocks.sum() / 49 > 49


def test_a_tile_behind_which_segments_go_on_is_split_by_what_it_sees() -> None:
    per_tile = queries_per_tile(TILE_SHAPES[2], 4)
    lists = work_of([0, 0], [4 * per_tile, 4 * per_tile], [4 * per_tile, 0], 4, (1, 1, 1000))
    first = {tuple(row[:2]): row[3] for row in lists[2].tolist()}
    assert [first[0, query] for query in range(0, 128, 32)] == [1] * 4
    lists = work_of([1000, 1000], [64, 64], [64, 0], 4, (1, 1, 1000))
    assert {row[3] for row in lists[2].tolist()} == {9}


@pytest.mark.parametrize("queries_per_kv", [1, 4, 8, 32])
def test_a_step_of_few_rows_has_tiles_of_one_shape(queries_per_kv: int) -> None:
    rng = Random(queries_per_kv)
    for _ in range(100):
        lengths = [rng.randint(1, 20) for _ in range(rng.randint(1, 12))]
        adapts = rng.random() < 0.3
        tiles = tiles_of(lengths, queries_per_kv, int(adapts))
        covered = np.zeros(sum(lengths), int)
        for shape, rows in tiles.items():
            per_tile = queries_per_tile(TILE_SHAPES[shape], queries_per_kv)
            for segment, first in rows.tolist():
                at = sum(lengths[:segment])
                covered[at + first : at + min(first + per_tile, lengths[segment])] += 1
        assert (covered == 1).all()
        if sum(lengths) <= FEW_ROWS:
            assert len(tiles) == 1
            assert not adapts or 0 not in tiles
