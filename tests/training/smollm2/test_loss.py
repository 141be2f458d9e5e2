"""The chunked loss and its hand-made gradient against plain autograd over all logits."""

import pytest
import torch
from torch.nn import functional as F

from training.smollm2 import loss as module
from training.smollm2.loss import distillation_loss

HIDDEN, VOCAB, MASK = 12, 37, 5


@pytest.mark.parametrize("count", [1, 7, 8, 21])
def test_loss_and_gradient(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 8)
    generator = torch.Generator().manual_seed(count)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    student = normal(count, HIDDEN).requires_grad_()
    teacher, head = normal(count, HIDDEN), normal(VOCAB, HIDDEN)
    targets = torch.randint(6, VOCAB, (count,), generator=generator)
    weights, shares = torch.rand(count, generator=generator), torch.rand(count, generator=generator)
    found = distillation_loss(student, teacher, head, targets, weights, shares, MASK)
    (gradient,) = torch.autograd.grad(3 * found, student)

    rest = torch.arange(VOCAB) != MASK
    log_probs = (student @ head.T)[:, rest].log_softmax(-1)
    soft = (teacher @ head.T)[:, rest].softmax(-1)
    hard = F.one_hot(targets, VOCAB)[:, rest]
    mixed = shares[:, None] * soft + (1 - shares)[:, None] * hard
    wanted = -(weights[:, None] * mixed * log_probs).sum()
    (wanted_gradient,) = torch.autograd.grad(3 * wanted, student)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradient, wanted_gradient)
