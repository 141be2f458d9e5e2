"""Muon with the matrices of one shape orthogonalised together.

The same update as `torch.optim.Muon` (Newton-Schulz in bfloat16 on the Nesterov momentum), but in a few
batched products instead of fifteen small ones a matrix, and in float32 where a processor has no products of
bfloat16.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are fast there; a CPU without them emulates them, 30 times slower."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def orthogonalise(stack: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz iteration on each matrix of stack [n, rows, columns], rows <= columns."""
    a, b, c = coefficients
    x = stack.bfloat16() if multiplies_bfloat16(stack.device) else stack.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon`, batched; its state is interchangeable with the original's."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            buffers: list[Tensor] = []
            self._init_group(group, parameters, gradients, buffers)
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, buffers, group["momentum"])
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter, update in zip(parameters, updates, strict=True):
                rows, columns = sorted(parameter.shape)
                tall = parameter.shape[0] > parameter.shape[1]
                by_shape[rows, columns].append((parameter, update.T if tall else update))
            for same in by_shape.values():
                stack = orthogonalise(
                    torch.stack([update for _, update in same]),
                    group["ns_coefficients"],
                    group["ns_steps"],
                    group["eps"],
                )
                for (parameter, _), update in zip(same, stack, strict=True):
                    rows, columns = parameter.shape
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    adjusted = group["lr"] * math.sqrt(max(1, rows / columns))
                    parameter.add_(update.T if rows > columns else update, alpha=-adjusted)
