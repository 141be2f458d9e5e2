"""The few sizes to which steps are padded: one CUDA graph each, at most 40 in all.

A size is a kind of step and a number of rows, a power of two or three quarters of one. Its other lengths are
the most that so many rows can have: every row a segment, up to 128, and as many items of attention's work of
each tile shape as these can be cut and split into. Programs of padding end at once. Kinds are told apart by
what costs time where it is not needed:

| kind | rows | attention's tile shapes | adapter | wanted rows |
|---|---|---|---|---|
| steps of one token | up to 128 | the smallest | no | all |
| verifies | up to 64 | the second | no | all |
| blocks | up to 2,048 | all; up to 64 rows the second | yes | all, or at most 1,024 |
| prompts | up to 2,048 | all | yes | 64 |
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

import torch

from replicas.engine.batch import ScheduledBatch, Segment
from replicas.kernels.attention import TILE_SHAPES, queries_per_tile, tile_shape
from replicas.kernels.tiling import FEW_ROWS, few_rows_shape
from replicas.messages import SamplingParams
from replicas.model.config import ModelConfig
from replicas.model.cuda.inputs import StepSize

MAX_GRAPHS = 40
MAX_GRAPH_ROWS = 2048
MAX_GRAPH_SEGMENTS = 128
MAX_GRAPH_RULED = 256
"""Wanted rows whose logits rules change: each takes a line of the vocabulary in float32."""
MAX_GRAPH_LOGITS_BYTES, MAX_GRAPH_RULED_BYTES = 512 << 20, 128 << 20
"""What wanted rows, and those under rules, may take: fewer of them for the largest vocabularies."""
_MANY_WANTED = 1024
_FEW_WANTED = 64
_ROWS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, MAX_GRAPH_ROWS)
_STEP_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_VERIFY_ROWS = (8, 16, 32, 64)
_PROMPT_ROWS = (256, 512, 768, 1024, 1536, MAX_GRAPH_ROWS)
_EAGER_ROWS = 256
_SEGMENT_ROWS = 64
_RANKED = SamplingParams(logprobs=1)


class GraphSizes:
    """The sizes for one model.

    num_places: what attention's work is split for, as of replicas.kernels.attention
    dtype: of the logits
    """

    def __init__(self, config: ModelConfig, num_places: Sequence[int], dtype: torch.dtype = torch.bfloat16):
        self.max_wanted = min(MAX_GRAPH_ROWS, MAX_GRAPH_LOGITS_BYTES // (config.vocab_size * dtype.itemsize))
        """The most wanted rows of a graph."""
        self._max_ruled = min(MAX_GRAPH_RULED, MAX_GRAPH_RULED_BYTES // (config.vocab_size * 4))
        self._queries_per_kv = config.queries_per_kv
        self._num_places = num_places
        self._tiles_per_row = _tiles_per_row(config.queries_per_kv)
        adapts = config.mask_token_id is not None
        step_shape = tile_shape(1, config.queries_per_kv)
        self._longest_step = queries_per_tile(TILE_SHAPES[step_shape], config.queries_per_kv)
        steps = [self._size(rows, rows, False, (step_shape,)) for rows in _STEP_ROWS]
        sizes = [self._size(rows, rows, False) for rows in _VERIFY_ROWS]
        sizes += [self._size(rows, rows, adapts) for rows in _ROWS]
        sizes += [self._size(rows, min(rows, _MANY_WANTED), adapts) for rows in _ROWS]
        sizes += [self._size(rows, _FEW_WANTED, adapts) for rows in _PROMPT_ROWS]
        self._steps = frozenset(steps) - frozenset(sizes)
        self.sizes = tuple(sorted({*steps, *sizes}, key=_cost))
        """All of them, the cheapest first."""
        assert len(self.sizes) <= MAX_GRAPHS

    def padded(self, size: StepSize) -> StepSize | None:
        """The cheapest size that holds a step's; None where none does."""
        return next((held for held in self.sizes if _holds(held, size)), None)

    def up_to(self, max_running: int, max_step_tokens: int) -> tuple[StepSize, ...]:
        """The sizes that an engine with these bounds can ask for."""
        largest = self.padded_rows(max_step_tokens)
        # A segment of a few tokens has a tile of the smallest shape too: the end of a prompt, or a short
        # verify.
        steps = self.padded_rows(min(max_step_tokens, max_running * self._longest_step))
        return tuple(
            size for size in self.sizes if size.num_rows <= (steps if size in self._steps else largest)
        )

    @staticmethod
    def padded_rows(num_rows: int) -> int:
        return next((rows for rows in (*_STEP_ROWS[:3], *_ROWS) if rows >= num_rows), MAX_GRAPH_ROWS)

    def _size(
        self, rows: int, wanted: int, has_adapter: bool, shapes: Sequence[int] | None = None
    ) -> StepSize:
        """A size with attention's tiles of these shapes, or of those that so many rows are cut into."""
        num_segments = min(rows, MAX_GRAPH_SEGMENTS)
        if shapes is None and rows <= FEW_ROWS:
            shapes = (few_rows_shape(rows, self._queries_per_kv, int(has_adapter)),)
        items = [0] * len(TILE_SHAPES)
        for shape in range(len(items)) if shapes is None else shapes:
            tiles = int(rows * self._tiles_per_row[shape]) if shapes is None else rows
            if shape < len(items) - 1:  # the last shape alone cuts a segment into many, in steps of many rows
                tiles = min(tiles, num_segments)
            items[shape] = tiles + self._num_places[shape] if tiles else 0
        wanted = min(wanted, self.max_wanted)
        num_ruled = min(wanted, self._max_ruled)
        return StepSize(rows, wanted, num_ruled, num_segments, tuple(items), has_adapter)


def eager(size: StepSize) -> StepSize:
    """The size of a step that no graph holds: rows are rounded up, so that few kernels are compiled for
    it."""
    rows = -(-size.num_rows // _EAGER_ROWS) * _EAGER_ROWS
    return replace(size, num_rows=rows)


def batches(
    sizes: tuple[StepSize, ...], page_size: int, num_pages: int, max_context: int
) -> Iterator[ScheduledBatch]:
    """A batch that is padded to each of the sizes, the largest first, as its memory is then enough for all;
    and one whose most probable tokens are asked for. They write garbage into the first pages."""
    length = min(_SEGMENT_ROWS, max_context // 2, page_size * num_pages // 2)
    pages = tuple(range(-(-2 * length // page_size)))

    def segment(number: int, rows: int, wanted: int, size: StepSize) -> Segment:
        is_draft = size.has_adapter and size.num_wanted >= min(size.num_rows, _MANY_WANTED)
        return Segment(
            seq_id=number,
            start=0,
            token_ids=(1,) * rows,
            pages=pages,
            num_causal=0 if is_draft else rows,
            adapter=is_draft,
            wanted=tuple(range(rows - wanted, rows)),
            sampling=SamplingParams(),
        )

    for size in reversed(sizes):
        rows = length if any(size.num_items[1:]) else 1
        counts = [min(rows, size.num_rows - first) for first in range(0, size.num_rows, rows)]
        left = size.num_wanted
        segments = []
        for number, count in enumerate(counts):
            wanted = min(count, left)
            left -= wanted
            segments.append(segment(number, count, wanted, size))
        yield ScheduledBatch(tuple(segments))
    ranked = Segment(0, 0, (1,), pages, 1, False, (0,), _RANKED)
    yield ScheduledBatch((ranked,))


def _cost(size: StepSize) -> tuple[int, int, bool, int]:
    return size.num_rows, size.num_wanted, size.has_adapter, sum(size.num_items)


def _holds(held: StepSize, size: StepSize) -> bool:
    return (
        size.num_rows <= held.num_rows
        and size.num_wanted <= held.num_wanted
        and size.num_ruled <= held.num_ruled
        and size.num_segments <= held.num_segments
        and all(count <= most for count, most in zip(size.num_items, held.num_items, strict=True))
        and size.has_adapter <= held.has_adapter
    )


def _tiles_per_row(queries_per_kv: int) -> tuple[Fraction, ...]:
    """For each tile shape the most tiles a row that segments can have."""
    most = [Fraction(0)] * len(TILE_SHAPES)
    longest = 2 * queries_per_tile(TILE_SHAPES[-1], queries_per_kv)  # longer ones have fewer a row
    for length in range(1, longest + 1):
        shape = tile_shape(length, queries_per_kv)
        tiles = -(-length // queries_per_tile(TILE_SHAPES[shape], queries_per_kv))
        most[shape] = max(most[shape], Fraction(tiles, length))
    return tuple(most)
