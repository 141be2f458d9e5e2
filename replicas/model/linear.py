"""Linear layers behind one small interface: plain for float32, prepacked for bfloat16 on the CPU."""

from typing import Protocol

import torch
import torch.nn.functional as F


class Linear(Protocol):
    """y = x W^T + b, with x [T, in] and W [out, in]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out]"""
        ...

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual [T, out] + y; residual may be overwritten."""
        ...


class PlainLinear:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self._bias is not None:
            residual = residual.add_(self._bias)
        return residual.addmm_(x, self._weight.t())


class PackedLinear:
    """The weight reordered once into oneDNN's blocks, which a plain bfloat16 product does at every call."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, residual, self._weight, self._bias, "add"
        )
        return y


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """The faster of the two for this weight's dtype and this machine."""
    can_pack = (
        weight.dtype is torch.bfloat16
        and weight.device.type == "cpu"
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return PackedLinear(weight, bias) if can_pack else PlainLinear(weight, bias)
