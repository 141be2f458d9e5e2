"""The batched Muon against torch's."""

import torch

from training.muon import BatchedMuon


def test_equals_torch_muon():
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 16), (8, 16), (40, 16), (16, 40), (16, 16), (40, 16)]
    ours = [torch.randn(s, generator=generator) for s in shapes]
    theirs = [p.clone() for p in ours]
    optimizers = [
        BatchedMuon(ours, lr=0.02, weight_decay=0.01, momentum=0.95),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.01, momentum=0.95),
    ]
    before = [p.clone() for p in ours]
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, was in zip(ours, theirs, before, strict=True):
        assert (a - was).norm() > 0.1
        assert (a - b).norm() < 0.02 * (a - was).norm()
    for a, b in zip(ours, theirs, strict=True):
        state_a, state_b = optimizers[0].state[a], optimizers[1].state[b]
        torch.testing.assert_close(state_a["momentum_buffer"], state_b["momentum_buffer"])
