"""The MLP's gate: y = silu(gate) * up, with silu(g) = g / (1 + exp(-g)) (GLU variants, arXiv 2002.05202)."""

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """The gated product of gate_up [T, 2 * intermediate], gates first -> [T, intermediate]."""
    num_rows, double_size = gate_up.shape
    size = double_size // 2
    assert gate_up.is_contiguous()
    y = gate_up.new_empty(num_rows, size)
    if num_rows:
        _swiglu[(num_rows, triton.cdiv(size, _BLOCK))](
            gate_up, y, SIZE=size, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return y


@triton.jit
def _swiglu(gate_up, y, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_element = column < SIZE
    at = gate_up + row * (2 * SIZE) + column
    gate = tl.load(at, mask=is_element, other=0.0).to(tl.float32)
    up = tl.load(at + SIZE, mask=is_element, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    tl.store(y + row * SIZE + column, product.to(y.dtype.element_ty), mask=is_element)


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """The definition: [T, 2 * intermediate] -> [T, intermediate] float64."""
    gate, up = gate_up.double().chunk(2, -1)
    return gate * gate.sigmoid() * up
