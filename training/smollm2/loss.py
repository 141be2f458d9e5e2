"""Cross-entropy of the noisy half against its tokens and the base's own distribution, chunk by chunk.

For a position with target y and the base's distribution t for it, both without the mask token:
    loss = -(1 - a) log p(y) - a sum_v t(v) log p(v),    d loss / d logits = p - (1 - a) onehot(y) - a t.
Logits are [positions, vocab]: too large to keep, so each chunk's gradient is taken while it is there.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 4096
ChunkLoss = Callable[..., tuple[Tensor, Tensor]]
_NEVER = -1e30
"""A logit whose probability is 0, finite so that 0 times it is 0."""


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    shares: Tensor,
    mask_token_id: int,
    chunk: "ChunkLoss | None" = None,
) -> Tensor:
    """The weighted sum over positions, a scalar; differentiable by `student` alone.

    student, teacher: normed hidden states [n, hidden]; head: [vocab, hidden]; targets: int64 [n]
    weights, shares: float32 [n]; shares is `a`, the teacher's share of the target
    chunk: chunk_loss, or a compiled one
    """
    chunk = chunk or chunk_loss
    return _Distillation.apply(student, teacher, head, targets, weights, shares, mask_token_id, chunk)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, head, targets, weights, shares, mask_token_id, chunk):  # type: ignore[no-untyped-def]
        gradient = torch.empty_like(student)
        total = torch.zeros((), device=student.device)
        for start in range(0, len(student), CHUNK):
            span = slice(start, start + CHUNK)
            rows = [_padded(x[span]) for x in (student, teacher, targets, weights, shares)]
            loss, part = chunk(*rows, head, mask_token_id)
            total += loss
            gradient[span] = part[: len(student[span])]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None, None, None, None


def _padded(x: Tensor) -> Tensor:
    """Pads x with zeros to CHUNK rows, so that every chunk has one shape; such rows weigh 0."""
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, CHUNK - len(x)))


def chunk_loss(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    weights: Tensor,
    shares: Tensor,
    head: Tensor,
    mask_token_id: int,
) -> tuple[Tensor, Tensor]:
    """The loss of CHUNK positions, and its gradient by `student`."""
    never = torch.arange(len(head), device=head.device) == mask_token_id
    logits = F.linear(student, head).float().masked_fill(never, _NEVER)
    wanted = F.linear(teacher, head).float().masked_fill(never, _NEVER).softmax(-1) * shares[:, None]
    rest = (1 - shares)[:, None]
    log_probs = logits.log_softmax(-1)
    likelihood = (wanted * log_probs).sum(-1) + rest[:, 0] * log_probs.gather(1, targets[:, None])[:, 0]
    gradient = (log_probs.exp() - wanted).scatter_add(1, targets[:, None], -rest) * weights[:, None]
    return -(likelihood * weights).sum(), gradient.to(head.dtype) @ head
