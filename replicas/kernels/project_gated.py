"""The MLP's first half on a few rows in one pass: norm, both projections, and the gate.

What rms_norm, a product and swiglu do one after the other (replicas.kernels.swiglu has the formula). Rounded
is only what comes out.
"""

import torch
import triton
import triton.language as tl

from replicas.kernels.launch import dependent_launch, dot_dtype, prefetch_weights, wait_for_earlier
from replicas.kernels.normed_product import Norm, block_of, decoded, normed_product
from replicas.kernels.rms_norm import rms_norm_reference
from replicas.kernels.swiglu import swiglu_reference


def project_gated(
    x: torch.Tensor, norm: Norm, weight: torch.Tensor, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """The gated product of x [T, hidden], at most MAX_ROWS rows -> [T, intermediate].

    weight: [2 * intermediate, hidden], gates first
    scales: [2 * intermediate] float32 where the weights are codes (replicas.kernels.normed_product)
    """
    num_rows, size = x.shape
    assert x.is_contiguous()
    assert weight.is_contiguous()
    width = len(weight) // 2
    y = x.new_empty(num_rows, width)
    if not num_rows:
        return y
    block = block_of(num_rows, weight, x.dtype)
    _project_gated[(triton.cdiv(2 * width, block.columns),)](
        x, norm.weight, weight, scales, y, num_rows, norm.eps,
        SIZE=size, WIDTH=width, BLOCK_M=block.rows, BLOCK_COLUMNS=block.columns, BLOCK_INNER=block.inner,
        DOT_DTYPE=dot_dtype(x.dtype),
        num_warps=block.num_warps, num_stages=block.num_stages, enable_fp_fusion=True,
        **dependent_launch(x.device),
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["num_rows"])
def _project_gated(
    x,
    norm,
    weight,
    scales,
    y,
    num_rows,
    eps,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Computes some columns of all rows: the gate of a column and what it gates are neighbours."""
    number = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    weight_row = number // 2 + number % 2 * WIDTH
    if DEPENDENT:
        prefetch_weights(weight, weight_row, 2 * WIDTH, SIZE, BLOCK_COLUMNS)
    wait_for_earlier(DEPENDENT)
    row = tl.arange(0, BLOCK_M)
    is_row = row < num_rows
    both = normed_product(
        x, norm, weight, scales, eps, row, is_row, weight_row, number < 2 * WIDTH,
        SIZE, BLOCK_M, BLOCK_COLUMNS, BLOCK_INNER, DOT_DTYPE,
    )  # fmt: skip
    gate, up = tl.split(tl.reshape(both, (BLOCK_M, BLOCK_COLUMNS // 2, 2)))
    product = gate * tl.sigmoid(gate) * up
    column = tl.program_id(0) * (BLOCK_COLUMNS // 2) + tl.arange(0, BLOCK_COLUMNS // 2)
    at = y + row[:, None] * WIDTH + column[None, :]
    tl.store(at, product.to(y.dtype.element_ty), mask=is_row[:, None] & (column < WIDTH)[None, :])


def project_gated_reference(
    x: torch.Tensor, norm: Norm, weight: torch.Tensor, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """The definition -> [T, intermediate] float64."""
    normed, _ = rms_norm_reference(x, norm.weight, norm.eps)
    return swiglu_reference(normed @ decoded(weight, scales).double().t())
