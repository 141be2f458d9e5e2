"""A model split between two processes gives the tokens of the whole one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from replicas.model.checkpoint import CheckpointError, load_weights
from replicas.model.config import ModelConfig
from replicas.model.parallel import Parallel, shard
from tests.reference import Reference
from tests.replicas.model.conftest import prompt
from tests.tiny_checkpoint import make_tiny_checkpoint

ROOT = Path(__file__).parents[4]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(
        tmp_path / "tiny", seed=3, num_hidden_layers=1, vocab_size=98, adapter_targets=TARGETS
    )
    worker = Path(__file__).with_name("parallel_process.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(tmp_path / "store"), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], results
    asked = prompt(9, seed=1)
    expected = Reference(folder).self_speculation(asked, 4, 3, ignore_eos=True).token_ids
    assert results[0][0].split() == [str(token) for token in expected]


def test_shards_put_together_are_the_whole(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, num_hidden_layers=1, vocab_size=98)
    config = ModelConfig.from_folder(folder)
    whole = load_weights(folder, config, torch.float32)
    parts = [shard(config, whole, Parallel(rank, 2)) for rank in range(2)]
    assert {(part.num_heads, part.num_kv_heads, part.intermediate_size) for part, _ in parts} == {(3, 1, 36)}
    assert torch.cat([weights.head for _, weights in parts]).equal(whole.head)
    x = torch.randn(2, 72)
    halves = [part.intermediate_size for part, _ in parts]
    down = sum(
        piece @ weights.layers[0].down.t()
        for piece, (_, weights) in zip(x.split(halves, 1), parts, strict=True)
    )
    torch.testing.assert_close(down, x @ whole.layers[0].down.t())


def test_a_model_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, num_hidden_layers=1)
    config = ModelConfig.from_folder(folder)
    with pytest.raises(CheckpointError, match="num_kv_heads"):
        shard(config, load_weights(folder, config, torch.float32), Parallel(0, 3))
