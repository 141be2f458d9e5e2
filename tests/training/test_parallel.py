"""Two processes that learn together: one set of weights, from the mean of their gradients."""

import os
from dataclasses import replace

import torch
from torch.distributed import TCPStore
from torch.multiprocessing import spawn

from tests.training.test_train import CONFIG
from training.batches import make_batch
from training.model import TriModel
from training.tokenizer import load_tokenizer
from training.train import learning_rate_scale, losses, make_optimizers, train

TOGETHER = replace(CONFIG, steps=6, ar_steps=3, warmup_steps=1, decay_steps=2)
RANKS = 2


def learn(rank, folder):
    """One rank's training; its weights go to `folder/rank{rank}.pt`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    model = train(TOGETHER, folder / "run", compiled=False, progress=False)
    torch.save(model.state_dict(), folder / f"rank{rank}.pt")


def by_mean_gradients(tokenizer):
    """The weights of a lone process that takes the mean of the gradients of the two batches of a step."""
    torch.manual_seed(TOGETHER.seed)
    model = TriModel(replace(TOGETHER.model, vocab_size=tokenizer.get_vocab_size()))
    optimizers = make_optimizers(model, TOGETHER)
    for step in range(TOGETHER.steps):
        for rank in range(RANKS):
            number, joint = step * RANKS + rank, step >= TOGETHER.ar_steps
            ar, noisy = losses(model, make_batch(TOGETHER.data, tokenizer, TOGETHER.seed, number, joint))
            ((ar + TOGETHER.noisy_weight * noisy) / RANKS).backward()
        rates = (TOGETHER.muon_lr, TOGETHER.adam_lr)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate_scale(step, TOGETHER)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return model.state_dict()


def test_two_processes_learn_from_the_mean_of_their_gradients(tmp_path, monkeypatch):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # as torchrun has it: no rank opens the port
    spawn(learn, args=(tmp_path,), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS))
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    expected = by_mean_gradients(tokenizer)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=2e-4, msg=name)
    assert torch.load(tmp_path / "run" / "state.pt")["step"] == TOGETHER.steps
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").exists()
