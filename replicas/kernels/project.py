"""A product of few rows, or with weights that are codes in 8 bits of any number of rows:

    y = x weight^T + bias    or    y += x weight^T

Codes are multiplied in x's dtype and the sums scaled (replicas.kernels.normed_product). A program sums all of
its columns' products, so no kernel adds parts of sums behind it, as behind cuBLAS's products of few rows.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from replicas.kernels.launch import dependent_launch, dot_dtype, prefetch_weights, wait_for_earlier
from replicas.kernels.normed_product import MAX_ROWS, Block, block_of, decoded, normed_product

_MANY_ROWS = Block(128, 128, 64, 8, 3)
_MANY_WIDE = Block(64, 32, 32, 8, 1)
"""For float32, which no tensor core multiplies exactly."""


def project(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product of x [T, in] -> [T, out], in x's dtype, into `out` or added to `add_to` if given.

    weight: [out, in], codes (replicas.kernels.normed_product) with scales [out] float32, or in x's dtype
    without
    bias: [out]
    """
    num_rows, size = x.shape
    assert x.is_contiguous()
    assert weight.is_contiguous()
    y = out if add_to is None else add_to
    if y is None:
        y = x.new_empty(num_rows, len(weight))
    assert y.is_contiguous()
    if not num_rows:
        return y
    if num_rows <= MAX_ROWS:
        block = block_of(num_rows, weight, x.dtype)
        if weight.itemsize == 1 and (block.rows, block.columns) == (32, 128):
            block = replace(block, num_warps=8)  # four spill on sm_100
    else:
        block = _MANY_WIDE if x.dtype is torch.float32 else _MANY_ROWS
    # Programs of the same columns begin together, so that all but one find them in the L2 cache.
    _project[(triton.cdiv(num_rows, block.rows), triton.cdiv(len(weight), block.columns))](
        x, weight, scales, bias, y, num_rows,
        SIZE=size, NUM_COLUMNS=len(weight), ADDS=add_to is not None,
        BLOCK_M=block.rows, BLOCK_COLUMNS=block.columns, BLOCK_INNER=block.inner,
        DOT_DTYPE=dot_dtype(x.dtype),
        num_warps=block.num_warps, num_stages=block.num_stages, enable_fp_fusion=True,
        **dependent_launch(x.device),
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["num_rows"])
def _project(
    x,
    weight,
    scales,
    bias,
    y,
    num_rows,
    SIZE: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Computes some columns of some rows."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    if DEPENDENT:
        prefetch_weights(weight, column, NUM_COLUMNS, SIZE, BLOCK_COLUMNS)
    wait_for_earlier(DEPENDENT)
    is_row, is_column = row < num_rows, column < NUM_COLUMNS
    sums = normed_product(
        x, None, weight, scales, 0.0, row, is_row, column, is_column,
        SIZE, BLOCK_M, BLOCK_COLUMNS, BLOCK_INNER, DOT_DTYPE,
    )  # fmt: skip
    if bias is not None:
        sums += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    at = y + row.to(tl.int64)[:, None] * NUM_COLUMNS + column[None, :]
    is_element = is_row[:, None] & is_column[None, :]
    if ADDS:
        sums += tl.load(at, mask=is_element, other=0.0).to(tl.float32)
    tl.store(at, sums.to(y.dtype.element_ty), mask=is_element)


def project_reference(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The definition -> [T, out] float64."""
    y = x.double() @ decoded(weight, scales).double().t()
    return y if bias is None else y + bias.double()
