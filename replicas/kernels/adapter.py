"""The draft adapter (LoRA, arXiv 2106.09685) on the flagged rows only:

    y_r <- y_r + (x_r down^T) up^T    for r in rows

with the adapter's scale in `up`. The weights stay as they are, so rows with and without it share a batch.
The first product is long and thin, so its inner dimension is split among programs; the second sums the
parts as it reads them.
"""

import torch
import triton
import triton.language as tl

from replicas.kernels.launch import dependent_launch, dot_dtype, splits_to_fill, wait_for_earlier

_BLOCK_ROWS = 16
_BLOCK_RANK = 64
_BLOCK_IN = 128
_BLOCK_OUT = 128
_MAX_SPLITS = 16


def add_adapter(
    y: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, rows: torch.Tensor
) -> None:
    """Adds the adapter's product of x [T, in] to y [T, out] in place, at `rows` alone; all contiguous.

    down: [rank, in]; up: [out, rank]; rows: [R] int32, each once, or -1 for none
    """
    rank, size_in = down.shape
    size_out = len(up)
    assert all(tensor.is_contiguous() for tensor in (y, x, down, up))
    if not len(rows):
        return
    row_tiles, rank_tiles = triton.cdiv(len(rows), _BLOCK_ROWS), triton.cdiv(rank, _BLOCK_RANK)
    num_blocks = triton.cdiv(size_in, _BLOCK_IN)
    max_splits = min(_MAX_SPLITS, 1 << num_blocks.bit_length() - 1)
    num_splits = splits_to_fill(row_tiles * rank_tiles, x.device, max_splits)
    num_stages = 1 if x.dtype is torch.float32 else 3  # float32 takes twice the shared memory
    parts = torch.empty(num_splits, len(rows), rank, dtype=torch.float32, device=x.device)
    _project_down[(row_tiles, rank_tiles, num_splits)](
        x, down, rows, parts, len(rows),
        SIZE_IN=size_in, RANK=rank, BLOCKS_PER_SPLIT=triton.cdiv(num_blocks, num_splits),
        BLOCK_ROWS=_BLOCK_ROWS, BLOCK_RANK=_BLOCK_RANK, BLOCK_IN=_BLOCK_IN, DOT_DTYPE=dot_dtype(x.dtype),
        num_warps=4, num_stages=num_stages, enable_fp_fusion=True, **dependent_launch(x.device),
    )  # fmt: skip
    _project_up[(row_tiles, triton.cdiv(size_out, _BLOCK_OUT))](
        y, up, rows, parts, len(rows),
        SIZE_OUT=size_out, RANK=rank, NUM_SPLITS=num_splits,
        BLOCK_ROWS=_BLOCK_ROWS, BLOCK_RANK=_BLOCK_RANK, BLOCK_OUT=_BLOCK_OUT, DOT_DTYPE=dot_dtype(x.dtype),
        num_warps=4, num_stages=2, enable_fp_fusion=True, **dependent_launch(x.device),
    )  # fmt: skip


@triton.jit
def _project_down(
    x,
    down,
    rows,
    parts,
    num_rows,
    SIZE_IN: tl.constexpr,
    RANK: tl.constexpr,
    BLOCKS_PER_SPLIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Multiplies some rows by some of the rank, over one split of the inner dimension."""
    wait_for_earlier(DEPENDENT)
    place = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.load(rows + place, mask=place < num_rows, other=-1)
    if tl.max(row, 0) < 0:
        return
    rank = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    split = tl.program_id(2)
    is_row, is_rank = row >= 0, rank < RANK
    sums = tl.zeros((BLOCK_ROWS, BLOCK_RANK), tl.float32)
    first = split * BLOCKS_PER_SPLIT * BLOCK_IN
    for start in range(first, tl.minimum(first + BLOCKS_PER_SPLIT * BLOCK_IN, SIZE_IN), BLOCK_IN):
        column = start + tl.arange(0, BLOCK_IN)
        is_column = column < SIZE_IN
        a = tl.load(
            x + row.to(tl.int64)[:, None] * SIZE_IN + column[None, :],
            mask=is_row[:, None] & is_column[None, :],
            other=0.0,
        )
        b = tl.load(
            down + rank[:, None] * SIZE_IN + column[None, :],
            mask=is_rank[:, None] & is_column[None, :],
            other=0.0,
        )
        sums = tl.dot(a.to(DOT_DTYPE), tl.trans(b.to(DOT_DTYPE)), sums, input_precision="ieee")
    at = parts + (split.to(tl.int64) * num_rows + place)[:, None] * RANK + rank[None, :]
    tl.store(at, sums, mask=is_row[:, None] & is_rank[None, :])


@triton.jit
def _project_up(
    y,
    up,
    rows,
    parts,
    num_rows,
    SIZE_OUT: tl.constexpr,
    RANK: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Computes some of the outputs of some rows, and adds them to y."""
    wait_for_earlier(DEPENDENT)
    place = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.load(rows + place, mask=place < num_rows, other=-1)
    if tl.max(row, 0) < 0:
        return
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_row, is_column = row >= 0, column < SIZE_OUT
    sums = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for start in range(0, RANK, BLOCK_RANK):
        rank = start + tl.arange(0, BLOCK_RANK)
        is_part = is_row[:, None] & (rank < RANK)[None, :]
        hidden = tl.zeros((BLOCK_ROWS, BLOCK_RANK), tl.float32)
        for split in range(NUM_SPLITS):
            at = parts + (split * num_rows + place).to(tl.int64)[:, None] * RANK + rank[None, :]
            hidden += tl.load(at, mask=is_part, other=0.0)
        weight = tl.load(
            up + column[:, None] * RANK + rank[None, :],
            mask=is_column[:, None] & (rank < RANK)[None, :],
            other=0.0,
        )
        sums = tl.dot(
            hidden.to(DOT_DTYPE), tl.trans(weight.to(DOT_DTYPE)), sums, input_precision="ieee"
        )  # fmt: skip
    at = y + row.to(tl.int64)[:, None] * SIZE_OUT + column[None, :]
    is_element = is_row[:, None] & is_column[None, :]
    sums += tl.load(at, mask=is_element, other=0.0).to(tl.float32)
    tl.store(at, sums.to(y.dtype.element_ty), mask=is_element)


def add_adapter_reference(
    y: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """The new y by the definition, float64."""
    expected = y.double()
    flagged = rows[rows >= 0].long()
    expected[flagged] += x[flagged].double() @ down.double().t() @ up.double().t()
    return expected
