"""A model split between two processes gives the tokens of the whole one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from replicas.model.checkpoint import CheckpointError, load_weights
from replicas.model.config import ModelConfig
from replicas.model.parallel import Parallel, shard, shard_config
from tests.reference import Reference
from tests.replicas.model.conftest import prompt
from tests.tiny_checkpoint import make_tiny_checkpoint

ROOT = Path(__file__).parents[3]
WORKER = Path(__file__).with_name("parallel_process.py")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@contextmanager
def two_processes(kind: str, folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Ranks 0 and 1 of a runner's kind; rank 0 has told rank 1 where to meet."""
    with ExitStack() as stack:
        leader = start(stack, kind, folder)
        assert leader.stdout is not None
        yield [leader, start(stack, kind, folder, leader.stdout.readline().strip())]


def start(stack: ExitStack, kind: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), kind, str(folder), *arguments]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def begin(leader: subprocess.Popen[str], requests: str) -> None:
    """Has the leader begin requests; returns after the first step."""
    assert leader.stdin is not None
    assert leader.stdout is not None
    assert leader.stdout.readline() == "ready\n"
    leader.stdin.write(requests + "\n")
    leader.stdin.flush()
    assert leader.stdout.readline() == "begun\n"


def shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "num_layers"), [("cuda", 1), ("torch", 3)])
def test_two_processes_equal_one(tmp_path: Path, kind: str, num_layers: int) -> None:
    """An odd vocabulary and an adapter everywhere; every mode, greedy, sampled and with rules, side by
    side."""
    folder = make_tiny_checkpoint(tmp_path, seed=3, num_hidden_layers=num_layers, adapter_targets=TARGETS)
    with ExitStack() as stack:
        apart = start(stack, kind, folder, "alone", "mixed")
        processes = [*stack.enter_context(two_processes(kind, folder)), apart]
        results = [process.communicate("mixed\n", timeout=500) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    split, _, alone = (printed.splitlines() for printed, _ in results)
    assert split[1:] == alone
    assert len(alone) == 1 + 3 * 4
    reference, asked = Reference(folder), prompt(9, seed=1)
    expected = [
        reference.ar(asked, 3, ignore_eos=True).token_ids,
        reference.self_speculation(asked, 3, 3, ignore_eos=True).token_ids,
        reference.diffusion(asked, 3, 3, 0.9, ignore_eos=True).token_ids,
    ]
    assert [line.split() for line in alone[1:4]] == [[str(token) for token in tokens] for tokens in expected]


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_dead_process_ends_the_other_with_an_error(tmp_path: Path, is_begun: bool) -> None:
    folder = make_tiny_checkpoint(tmp_path, num_hidden_layers=1)
    before = shared_memory()
    with two_processes("torch", folder) as (leader, follower):
        assert leader.stdout is not None
        if is_begun:
            begin(leader, "long")
        else:
            assert leader.stdout.readline() == "ready\n"
        follower.kill()
        follower.wait()
        _, errors = leader.communicate("greedy\n", timeout=60)
    assert leader.returncode == 1
    assert "RunnerLost: a step failed on a part of the model" in errors
    assert shared_memory() <= before


def test_a_dead_leader_ends_the_others_with_an_error(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, num_hidden_layers=1)
    before = shared_memory()
    with two_processes("torch", folder) as (leader, follower):
        begin(leader, "long")
        leader.kill()
        leader.wait()
        _, errors = follower.communicate(timeout=60)
    assert follower.returncode == 1
    assert "Error" in errors
    assert shared_memory() <= before


def test_shards_put_together_are_the_whole(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, num_hidden_layers=1)
    config = ModelConfig.from_folder(folder)
    whole = load_weights(folder, config, torch.float32)
    down = whole.layers[0].down
    part = shard_config(config, Parallel(0, 2))
    assert (part.num_heads, part.num_kv_heads, part.intermediate_size) == (3, 1, 36)
    parts = [
        shard(config, load_weights(folder, config, torch.float32), Parallel(rank, 2)) for rank in range(2)
    ]
    head = torch.cat([weights.head for weights in parts])
    assert head[:97].equal(whole.head)
    assert head[97:].tolist() == [[0.0] * 40]
    x = torch.randn(2, 72)
    products = [
        piece @ weights.layers[0].down.t() for piece, weights in zip(x.split(36, 1), parts, strict=True)
    ]
    torch.testing.assert_close(products[0] + products[1], x @ down.t())


def test_a_model_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, num_hidden_layers=1)
    config = ModelConfig.from_folder(folder)
    with pytest.raises(CheckpointError, match="num_kv_heads, 2, can't be split among 3 processes"):
        shard_config(config, Parallel(0, 3))
