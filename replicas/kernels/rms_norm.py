"""RMSNorm with the residual's addition before it.

    residual <- residual + x
    y = residual / sqrt(mean(residual^2) + eps) * weight

over the last axis (arXiv 1910.07467). As in the published models the normalised row is rounded to the
dtype before it is multiplied by the weight.
"""

import torch
import triton
import triton.language as tl


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Norm of x [T, hidden] by weight [hidden] -> [T, hidden]; residual [T, hidden] is changed in place.

    Without a residual x itself is normalised, and left as it is.
    """
    num_rows, size = x.shape
    assert x.is_contiguous()
    assert residual is None or residual.is_contiguous()
    y = torch.empty_like(x)
    if num_rows:
        block = triton.next_power_of_2(size)
        _rms_norm[(num_rows,)](
            x,
            residual,
            weight,
            y,
            eps,
            SIZE=size,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
            enable_fp_fusion=True,
        )
    return y


@triton.jit
def _rms_norm(x, residual, weight, y, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Normalises one row."""
    column = tl.arange(0, BLOCK)
    is_element = column < SIZE
    at = tl.program_id(0).to(tl.int64) * SIZE + column
    row = tl.load(x + at, mask=is_element, other=0.0).to(tl.float32)
    if residual is not None:
        total = row + tl.load(residual + at, mask=is_element, other=0.0).to(tl.float32)
        rounded = total.to(residual.dtype.element_ty)
        tl.store(residual + at, rounded, mask=is_element)
        row = rounded.to(tl.float32)
    normal = row * tl.rsqrt(tl.sum(row * row, 0) / SIZE + eps)
    scale = tl.load(weight + column, mask=is_element, other=0.0).to(tl.float32)
    normal = normal.to(y.dtype.element_ty).to(tl.float32) * scale
    tl.store(y + at, normal.to(y.dtype.element_ty), mask=is_element)


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition -> y and the new residual, both float64; the residual is x where there is none."""
    total = x.double() if residual is None else x.double() + residual.double()
    return total * (total.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double(), total
