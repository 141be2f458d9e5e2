"""Linear layers behind one small interface: prepacked by oneDNN where it can, plain elsewhere."""

from typing import Protocol

import torch
import torch.nn.functional as F

SINGLE_ROW_BYTES = 8 << 20


class Linear(Protocol):
    """A linear layer: y = x W^T + b, with x [T, in] and W [out, in]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product y: x [T, in] -> [T, out]."""
        ...

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The sum residual [T, out] + y; residual may be overwritten."""
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
    """A linear layer whose weight is reordered once, into oneDNN's blocks.

    A plain product reorders it at every call or never. A small float32 matrix is kept transposed besides: for
    one row its plain product costs half of the packed one, whose call overhead outweighs the arithmetic.
    Large matrices are packed only.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias = bias
        self._single_row: torch.Tensor | None = None
        if keeps_single_row_copy(weight):
            self._single_row = weight.t().contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._single_row is not None and len(x) == 1:
            return (
                x @ self._single_row if self._bias is None else torch.addmm(self._bias, x, self._single_row)
            )
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self._single_row is not None and len(x) == 1:
            if self._bias is not None:
                residual = residual.add_(self._bias)
            return residual.addmm_(x, self._single_row)
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, residual, self._weight, self._bias, "add"
        )
        return y


def keeps_single_row_copy(weight: torch.Tensor) -> bool:
    return weight.dtype is torch.float32 and weight.nbytes <= SINGLE_ROW_BYTES


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """The fastest linear layer for this weight's dtype and this machine."""
    can_pack = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if can_pack and weight.dtype is torch.bfloat16:
        can_pack = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return PackedLinear(weight, bias) if can_pack else PlainLinear(weight, bias)
