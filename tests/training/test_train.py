"""A training run at tiny scale: it learns, and stopping in the middle changes nothing."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from training.batches import DataConfig
from training.export import load_run
from training.model import ModelConfig
from training.train import TrainConfig, learning_rate_scale, train

CONFIG = TrainConfig(
    steps=24, ar_steps=12, decay_steps=4, warmup_steps=2, tokenizer_chats=200, vocab_size=500, eval_every=12,
    save_every=15, eval_per_family=1,
    data=DataConfig(rows=1, clean_len=256, noisy_len=64),
    model=ModelConfig(0, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2),
)  # fmt: skip


def test_resuming_gives_identical_weights(tmp_path):
    whole = train(CONFIG, tmp_path / "whole", compiled=False, progress=False)
    parts = tmp_path / "parts"
    train(CONFIG, parts, compiled=False, progress=False, stop_at=15)
    assert torch.load(parts / "state.pt")["step"] == 15
    resumed = train(CONFIG, parts, compiled=False, progress=False)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    entries = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [12, 24]
    assert entries[0]["noisy"] == 0
    assert entries[1]["noisy"] > 0
    assert entries[1]["ar"] < entries[0]["ar"]
    exported = load_file(tmp_path / "whole" / "checkpoint" / "model.safetensors")
    for name, tensor in load_run(tmp_path / "whole", CONFIG.model)[0].published_state().items():
        assert torch.equal(tensor, exported[name])


def test_training_goes_on_from_a_checkpoint(tmp_path):
    """With its tokenizer and weights, and if stopped from its own state."""
    first = train(replace(CONFIG, steps=6), tmp_path / "first", compiled=False, progress=False)
    checkpoint = tmp_path / "first" / "checkpoint"
    longer = replace(CONFIG, steps=6, ar_steps=0)
    given = {"start": checkpoint, "compiled": False, "progress": False}
    begun = train(longer, tmp_path / "parts", stop_at=0, **given)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, begun.state_dict()[name]), name
    whole = train(longer, tmp_path / "whole", **given)
    train(longer, tmp_path / "parts", stop_at=3, **given)
    resumed = train(longer, tmp_path / "parts", **given)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
        assert "norm" in name or not torch.equal(tensor, first.state_dict()[name]), name
    assert (tmp_path / "whole" / "tokenizer.json").read_text() == (checkpoint / "tokenizer.json").read_text()


def test_learning_rate_warms_up_stays_and_decays():
    config = replace(CONFIG, steps=100, warmup_steps=10, decay_steps=20)
    scales = [learning_rate_scale(step, config) for step in range(100)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[9:81] == [1.0] * 72
    assert scales[90] == pytest.approx(0.5)
    assert scales[99] == pytest.approx(0.05)
