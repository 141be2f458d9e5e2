"""The product of a few normalised rows with a weight matrix, for kernels that go on with it:

    y = (x / sqrt(mean(x^2) + eps) * norm) weight^T  =  ((x * norm) weight^T) / sqrt(mean(x^2) + eps)

A program reads its rows of x whole, a block at a time, so it finds their mean square on the way, and the norm
needs no kernel of its own. Each program reads all of x again, from the L2 cache: for few rows that is little
beside the weights, and for more than MAX_ROWS it is not.

Weights may be codes in 8 bits (CODES) with a scale for each of their rows, an output of the product. They are
multiplied in x's dtype, which holds each code exactly, and the sums are scaled: so the product is that of the
numbers the codes stand for, whatever the kernel and the number of rows.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from replicas.kernels.launch import num_sms

MAX_ROWS = 64
LEAST_ROWS = 16
"""Rows of the smallest block."""
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Steps of a 127th of each row's largest number, or 3 bits behind each number's first."""


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


def block_of(num_rows: int, weight: torch.Tensor, dtype: torch.dtype) -> Block:
    """The block for so many rows, at most MAX_ROWS, all in one: as many columns, since each program reads
    all of x, as leave a program for every streaming multiprocessor.

    dtype: x's
    """
    assert 0 < num_rows <= MAX_ROWS
    rows = max(LEAST_ROWS, triton.next_power_of_2(num_rows))
    if dtype is torch.float32:  # no tensor cores, and twice the registers and shared memory
        return Block(rows, 32, 32, 4 if rows < 64 else 8, 1)
    sizes = (128, 64, 32)
    columns = next((size for size in sizes if len(weight) >= size * num_sms(weight.device)), sizes[-1])
    inner = 64 if columns == 128 else 128
    if weight.itemsize == 1 and rows == LEAST_ROWS and columns == 32:
        inner = 256  # as many bytes on their way as of weights in 16 bits
    return Block(rows, columns, inner, 4, 4 if rows < 64 else 3)


def encoded(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, size] as codes in a dtype of CODES and their scales [N] float32, by each row's largest
    number."""
    is_int8 = dtype is torch.int8
    scales = weight.abs().amax(1).float() / (127.0 if is_int8 else torch.finfo(dtype).max)
    scales = torch.where(scales > 0, scales, 1.0)
    steps = weight.float() / scales[:, None]
    return (steps.round() if is_int8 else steps).to(dtype), scales


def decoded(weight: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """The numbers that codes stand for, in float32; weights without scales as they are."""
    return weight if scales is None else weight.float() * scales[:, None]


@triton.jit
def normed_product(
    x,
    norm,
    weight,
    scales,
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
    """The product of rows of x [T, SIZE] with rows of weight [N, SIZE] -> [rows, columns] float32.

    norm: None for rows as they are; scales: [N], or None for weights that are no codes
    """
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    squares = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, SIZE, BLOCK_INNER):
        inner = start + tl.arange(0, BLOCK_INNER)
        is_inner = inner < SIZE
        at = x + row.to(tl.int64)[:, None] * SIZE + inner[None, :]
        a = tl.load(at, mask=is_row[:, None] & is_inner[None, :], other=0.0)
        at = weight + column.to(tl.int64)[:, None] * SIZE + inner[None, :]
        b = tl.load(at, mask=is_column[:, None] & is_inner[None, :], other=0.0)
        if norm is not None:
            scale = tl.load(norm + inner, mask=is_inner, other=0.0).to(tl.float32)
            a = a.to(tl.float32)
            squares += tl.sum(a * a, 1)
            a = (a * scale[None, :]).to(x.dtype.element_ty)
        sums = tl.dot(a.to(DOT_DTYPE), tl.trans(b.to(DOT_DTYPE)), sums, input_precision="ieee")
    if scales is not None:
        sums *= tl.load(scales + column, mask=is_column, other=0.0)[None, :]
    if norm is not None:
        sums *= tl.rsqrt(squares / SIZE + eps)[:, None]
    return sums
