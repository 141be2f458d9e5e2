"""The few sizes to which steps are padded: one CUDA graph each, at most 40 in all.

A size is a kind of step and a number of rows, a power of two or three quarters of one. Its other lengths are
the most that so many rows can have: every row a segment, up to 128, and as many tiles of each shape as these
can be cut into. Programs of padding end at once. Kinds are told apart by what costs time where it is not
needed:

| kind | rows | attention's tile shapes | adapter | wanted rows |
|---|---|---|---|---|
| steps of one token | up to 128 | the smallest | no | all |
| verifies | up to 64 | all | no | all |
| blocks | up to 2,048 | all | yes | all, or at most 1,024 |
| prompts | up to 2,048 | all | yes | 64 |
"""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

from replicas.engine.batch import ScheduledBatch, Segment
from replicas.kernels.attention import TILE_SHAPES, queries_per_tile, tile_shape
from replicas.messages import SamplingParams
from replicas.model.config import ModelConfig
from replicas.model.cuda.inputs import StepSize

MAX_GRAPHS = 40
MAX_GRAPH_ROWS = 2048
MAX_GRAPH_WANTED = MAX_GRAPH_ROWS
MAX_GRAPH_SEGMENTS = 128
MAX_GRAPH_RULED = 256
"""Wanted rows whose logits rules change: each takes a line of the vocabulary in float32."""
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
    """The sizes for one model."""

    def __init__(self, config: ModelConfig):
        self._tiles_per_row = _tiles_per_row(config.queries_per_kv)
        adapts = config.mask_token_id is not None
        least = tile_shape(1, config.queries_per_kv) + 1
        self._num_step_shapes = least
        self._longest_step = queries_per_tile(TILE_SHAPES[least - 1], config.queries_per_kv)
        sizes = [self._size(rows, rows, False, num_shapes=least) for rows in _STEP_ROWS]
        sizes += [self._size(rows, rows, False) for rows in _VERIFY_ROWS]
        sizes += [self._size(rows, rows, adapts) for rows in _ROWS]
        sizes += [self._size(rows, min(rows, _MANY_WANTED), adapts) for rows in _ROWS]
        sizes += [self._size(rows, _FEW_WANTED, adapts) for rows in _PROMPT_ROWS]
        self.sizes = tuple(sorted(set(sizes), key=_cost))
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
            size
            for size in self.sizes
            if size.num_rows <= (largest if any(size.num_tiles[self._num_step_shapes :]) else steps)
        )

    @staticmethod
    def padded_rows(num_rows: int) -> int:
        return next((rows for rows in (*_STEP_ROWS[:3], *_ROWS) if rows >= num_rows), MAX_GRAPH_ROWS)

    def _size(
        self, rows: int, wanted: int, has_adapter: bool, num_shapes: int = len(TILE_SHAPES)
    ) -> StepSize:
        num_segments = min(rows, MAX_GRAPH_SEGMENTS)
        tiles = [min(int(rows * per_row), num_segments) for per_row in self._tiles_per_row[:-1]]
        tiles.append(int(rows * self._tiles_per_row[-1]))  # the last shape alone cuts a segment into many
        tiles[num_shapes:] = [0] * (len(tiles) - num_shapes)
        num_ruled = min(wanted, MAX_GRAPH_RULED)
        return StepSize(rows, wanted, num_ruled, num_segments, tuple(tiles), has_adapter)


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
        rows = length if any(size.num_tiles[1:]) else 1
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
    return size.num_rows, size.num_wanted, size.has_adapter, sum(size.num_tiles)


def _holds(held: StepSize, size: StepSize) -> bool:
    return (
        size.num_rows <= held.num_rows
        and size.num_wanted <= held.num_wanted
        and size.num_ruled <= held.num_ruled
        and size.num_segments <= held.num_segments
        and all(count <= most for count, most in zip(size.num_tiles, held.num_tiles, strict=True))
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
