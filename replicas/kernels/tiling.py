"""A step's attention as lists of work for the kernel: segments cut into tiles, long tiles split. Pure."""

from collections.abc import Sequence

import numpy as np

from replicas.kernels.attention import TILE_SHAPES, WORK_FIELDS, queries_per_tile, tile_shape

FEW_ROWS = 64
"""Rows of a step up to which all its tiles are of one shape, so that attention is one launch."""
_BLOCK_KEYS = 64
_MIN_SPLIT_BLOCKS = 2


def work_of(
    starts: Sequence[int],
    lengths: Sequence[int],
    num_causal: Sequence[int],
    queries_per_kv: int,
    num_places: Sequence[int],
    least_shape: int = 0,
) -> dict[int, np.ndarray]:
    """The work on segments by index in TILE_SHAPES: [N, 6] int32, as `split_work` makes it.

    starts, lengths, num_causal: of each segment, or the most that it may come to be
    num_places: for each tile shape, the number of tiles that the device works on at once
    least_shape: of a step of up to FEW_ROWS rows
    """
    lists = {}
    ends = np.add(starts, lengths)
    for index, tiles in tiles_of(lengths, queries_per_kv, least_shape).items():
        segment, first_query = tiles.T
        end_query = first_query + queries_per_tile(TILE_SHAPES[index], queries_per_kv)
        is_causal = end_query <= np.asarray(num_causal)[segment]
        num_keys = np.where(is_causal, np.asarray(starts)[segment] + end_query, ends[segment])
        lists[index] = split_work(tiles, num_keys, num_places[index])
    return lists


def tiles_of(lengths: Sequence[int], queries_per_kv: int, least_shape: int = 0) -> dict[int, np.ndarray]:
    """The tiles by index in TILE_SHAPES: [N, 2] int32, each tile's segment and its first query in it."""
    shapes = [tile_shape(length, queries_per_kv) for length in lengths]
    if sum(lengths) <= FEW_ROWS:
        shapes = [few_rows_shape(max(lengths), queries_per_kv, least_shape)] * len(lengths)
    found: dict[int, list[tuple[int, int]]] = {}
    for segment, (length, index) in enumerate(zip(lengths, shapes, strict=True)):
        step = queries_per_tile(TILE_SHAPES[index], queries_per_kv)
        found.setdefault(index, []).extend((segment, first) for first in range(0, length, step))
    return {index: np.array(rows, dtype=np.int32) for index, rows in sorted(found.items()) if rows}


def few_rows_shape(longest: int, queries_per_kv: int, least_shape: int = 0) -> int:
    """The shape of all tiles of a step of few rows: the second shape where its longest segment does not fit
    the first."""
    return max(tile_shape(1, queries_per_kv), min(tile_shape(longest, queries_per_kv), 1), least_shape)


def split_work(tiles: np.ndarray, num_keys: np.ndarray, num_places: int) -> np.ndarray:
    """The tiles as items of about as many keys as each place has to work on: [N, 6] int32: segment, first
    query, split, number of splits, keys of a split, and the first of the tile's slots in the scratch.

    The longest come first, as programs begin in their order. There are at most num_places items more than
    tiles, and at most 2 num_places slots: of all keys each split but a tile's last has a place's share.

    tiles: [T, 2]; num_keys: [T], at least 1 each
    """
    num_blocks = -(-num_keys // _BLOCK_KEYS)
    split_blocks = max(_MIN_SPLIT_BLOCKS, -(-int(num_blocks.sum()) // num_places))
    num_splits = -(-num_blocks // split_blocks)
    num_slots = np.where(num_splits > 1, num_splits, 0)
    tile = np.repeat(np.arange(len(tiles)), num_splits)
    split = np.arange(len(tile)) - (num_splits.cumsum() - num_splits)[tile]
    first_slot = (num_slots.cumsum() - num_slots)[tile]
    keys = np.full(len(tile), split_blocks * _BLOCK_KEYS)
    items = np.stack([*tiles[tile].T, split, num_splits[tile], keys, first_slot], 1).astype(np.int32)
    assert items.shape[1] == WORK_FIELDS.value
    left = np.minimum(num_blocks[tile] - split * split_blocks, split_blocks)
    ordered: np.ndarray = items[np.argsort(-left, kind="stable")]
    return ordered
