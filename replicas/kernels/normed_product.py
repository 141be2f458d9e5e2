"""The product of a few normalised rows with a weight matrix, for kernels that go on with it:

    y = (x / sqrt(mean(x^2) + eps) * norm) weight^T  =  ((x * norm) weight^T) / sqrt(mean(x^2) + eps)

A program reads its rows of x whole, a block at a time, so it finds their mean square on the way, and the norm
needs no kernel of its own. Each program reads all of x again, from the L2 cache: for few rows that is little
beside the weights, and for more than MAX_ROWS it is not.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from replicas.kernels.launch import num_sms

MAX_ROWS = 64


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm's weight and epsilon."""

    weight: torch.Tensor
    """[hidden]"""
    eps: float


@dataclass(frozen=True, slots=True)
class Block:
    """What a program computes, and how it is launched."""

    rows: int
    columns: int
    """Of the weights' rows."""
    inner: int
    num_warps: int
    num_stages: int


def block_of(num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> Block:
    """The block for so many rows, at most MAX_ROWS, all in one: as many columns, since each program reads
    all of x, as leave a program for every streaming multiprocessor."""
    assert 0 < num_rows <= MAX_ROWS
    rows = max(16, triton.next_power_of_2(num_rows))
    if dtype is torch.float32:  # no tensor cores, and twice the registers and shared memory
        return Block(rows, 32, 32, 4 if rows < 64 else 8, 1)
    sizes = (128, 64, 32)
    columns = next((size for size in sizes if num_columns >= size * num_sms(device)), sizes[-1])
    return Block(rows, columns, 64 if columns == 128 else 128, 4, 4 if rows < 64 else 3)


@triton.jit
def normed_product(
    x,
    norm,
    weight,
    eps,
    row,
    is_row,
    column,
    is_column,
    SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """The product of rows of x [T, SIZE] with rows of weight [N, SIZE] -> [rows, columns] float32."""
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    squares = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, SIZE, BLOCK_INNER):
        inner = start + tl.arange(0, BLOCK_INNER)
        is_inner = inner < SIZE
        at = x + row.to(tl.int64)[:, None] * SIZE + inner[None, :]
        a = tl.load(at, mask=is_row[:, None] & is_inner[None, :], other=0.0).to(tl.float32)
        scale = tl.load(norm + inner, mask=is_inner, other=0.0).to(tl.float32)
        at = weight + column.to(tl.int64)[:, None] * SIZE + inner[None, :]
        b = tl.load(at, mask=is_column[:, None] & is_inner[None, :], other=0.0)
        squares += tl.sum(a * a, 1)
        a = (a * scale[None, :]).to(x.dtype.element_ty).to(DOT_DTYPE)
        sums = tl.dot(a, tl.trans(b.to(DOT_DTYPE)), sums, input_precision="ieee")
    return sums * tl.rsqrt(squares / SIZE + eps)[:, None]
