"""Segments cut into the tiles of the attention kernel. Pure."""

from collections.abc import Sequence

import numpy as np

from replicas.kernels.attention import TILE_SHAPES, queries_per_tile, tile_shape


def tiles_of(lengths: Sequence[int], queries_per_kv: int) -> dict[int, np.ndarray]:
    """The tiles by index in TILE_SHAPES: [N, 2] int32, each tile's segment and its first query in it."""
    found: dict[int, list[tuple[int, int]]] = {}
    for segment, length in enumerate(lengths):
        index = tile_shape(length, queries_per_kv)
        step = queries_per_tile(TILE_SHAPES[index], queries_per_kv)
        found.setdefault(index, []).extend((segment, first) for first in range(0, length, step))
    return {index: np.array(rows, dtype=np.int32) for index, rows in sorted(found.items()) if rows}
