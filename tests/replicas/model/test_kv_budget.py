"""The pages of a replica that was told no number: a share of what is free, and a clear error past it."""

import os
from pathlib import Path

import pytest

from replicas.config import ReplicaConfig
from replicas.model import checkpoint, kv_budget
from replicas.model.checkpoint import CheckpointError
from replicas.model.kv_budget import check_pool, cpu_budget_bytes, left_for_pages
from replicas.model.runner import TorchRunner
from replicas.runner_loader import load_runner
from tests.tiny_checkpoint import make_tiny_checkpoint

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("free", "weights", "num_sharing", "expected"),
    [
        (8 * GIB, 0, 1, 2 * GIB),
        (8 * GIB, 2 * GIB, 1, 1536 * MIB),
        (8 * GIB, 0, 4, 512 * MIB),
        (8 * GIB, 2 * GIB, 4, 256 * MIB),  # no room at all: the least, and the check of the memory says so
        (100 * GIB, GIB, 1, 4 * GIB),
    ],
)
def test_a_cpus_share(
    monkeypatch: pytest.MonkeyPatch, free: int, weights: int, num_sharing: int, expected: int
) -> None:
    monkeypatch.setattr(kv_budget, "available_bytes", lambda: free)
    assert cpu_budget_bytes(weights, num_sharing) == expected


def test_a_gpus_rest() -> None:
    """All that is free but the room for steps; of a GPU that two share, half, whoever comes first."""
    assert left_for_pages(60 * GIB, 80 * GIB, 18 * GIB, 1.0) == 58 * GIB
    assert left_for_pages(60 * GIB, 80 * GIB, 18 * GIB, 0.5) == 20 * GIB
    assert left_for_pages(1 * GIB, 80 * GIB, 18 * GIB, 1.0) < 0


def test_a_pool_that_does_not_fit_is_a_checkpoint_error() -> None:
    check_pool(GIB, GIB)
    with pytest.raises(
        CheckpointError, match=r"12\.0 GiB of K/V pages do not fit.*11\.0 GiB.*lower kv_cache_mb"
    ):
        check_pool(12 * GIB, 11 * GIB)


def test_what_is_configured_or_left_out_reaches_the_runner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make_tiny_checkpoint(tmp_path, num_hidden_layers=1))
    for module in (kv_budget, checkpoint):
        monkeypatch.setattr(module, "available_bytes", lambda: 2 * GIB)
    given = {"model": folder, "num_threads": 1, "forward": "torch"}
    taken = load_runner(ReplicaConfig(**given)).spec
    page_bytes = 2 * 2 * 12 * 16 * 4  # one layer's keys and values, 2 heads of 12 floats
    half = (2 * GIB - 1000) // 4 // page_bytes
    assert taken.page_size == 16
    assert 0.99 * half < taken.num_pages <= half + 1
    shared = load_runner(ReplicaConfig(**given, num_replicas=2)).spec
    assert shared.num_pages == pytest.approx(256 * MIB // page_bytes, rel=0.01)
    told = load_runner(ReplicaConfig(**given, kv_cache_mb=1, page_size=8)).spec
    assert (told.page_size, told.num_pages) == (8, MIB // (page_bytes // 2))


def test_page_sizes_by_device() -> None:
    assert ReplicaConfig().kv_page_size == 16
    assert ReplicaConfig(num_gpus=1).kv_page_size == 64
    assert ReplicaConfig(num_gpus=1, page_size=32).kv_page_size == 32


def test_too_many_pages_for_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(make_tiny_checkpoint(tmp_path, num_hidden_layers=1))
    monkeypatch.setattr(kv_budget, "available_bytes", lambda: 8 * MIB)
    monkeypatch.setattr(checkpoint, "available_bytes", lambda: 8 * MIB)
    with pytest.raises(CheckpointError, match="kv_cache_mb"):
        TorchRunner.load(folder)


@pytest.mark.parametrize("forward", ["torch", "native"])
def test_pages_take_no_memory_before_they_are_used(tmp_path: Path, forward: str) -> None:
    folder = str(make_tiny_checkpoint(tmp_path, num_hidden_layers=1))
    before = resident_bytes()
    runner = TorchRunner.load(folder, kv_budget_bytes=400 * MIB, num_threads=1, forward=forward)
    assert resident_bytes() - before < 100 * MIB
    assert all(part.data_ptr() % 64 == 0 for part in runner._model.pages)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
