"""What is given back to the system: no more than was meant, and really."""

import ctypes
import mmap
import re
import sys
from pathlib import Path

import pytest
import torch

from replicas.engine.batch import ScheduledBatch, Segment
from replicas.messages import SamplingParams
from replicas.model.checkpoint import load_weights
from replicas.model.config import ModelConfig
from replicas.model.runner import TorchRunner
from replicas.resident import forget, forget_code
from tests.tiny_checkpoint import make_tiny_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nothing is given back")
"""Linux alone has /proc and this madvise."""

PAGE = mmap.PAGESIZE


def resident(name: str) -> int:
    """Bytes resident of this process's mappings of files with such a name."""
    mappings = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    ours = "\n".join(text for text in mappings if text.partition("\n")[0].endswith(name))
    return sum(int(kib) << 10 for kib in re.findall(r"^Rss: +(\d+)", ours, re.MULTILINE))


@pytest.mark.parametrize("begin", [0, 1, PAGE - 1])
@pytest.mark.parametrize("length", [0, 1, PAGE - 1, PAGE, 2 * PAGE, 3 * PAGE + 5])
def test_whole_pages_alone_are_forgotten(begin: int, length: int) -> None:
    with mmap.mmap(-1, 8 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(b"x" * len(memory))
        held = ctypes.c_char.from_buffer(memory)
        forget(ctypes.addressof(held) + begin, length)
        del held
        first, end = -(-begin // PAGE), (begin + length) // PAGE
        for page in range(8):
            expected = b"\0" if first <= page < end else b"x"
            assert memory[page * PAGE : (page + 1) * PAGE] == expected * PAGE


def test_code_that_is_forgotten_runs_all_the_same() -> None:
    folder = Path(torch.__file__).parent / "lib"
    left, right = torch.randn(64, 64), torch.randn(64, 64)
    expected = left @ right
    before = resident("libtorch_cpu.so")
    forget_code(folder)
    assert resident("libtorch_cpu.so") < before
    assert torch.equal(left @ right, expected)


def test_loaded_weights_leave_no_file_mapped(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    weights = load_weights(folder, ModelConfig.from_folder(folder), torch.float32)
    assert "model.safetensors" not in Path("/proc/self/maps").read_text()
    assert weights.embedding.isfinite().all()


@pytest.mark.parametrize("forward", ["auto", "torch"])
def test_a_runner_that_has_settled_computes_as_before_and_keeps_no_page(tmp_path: Path, forward: str) -> None:
    runner = TorchRunner.load(str(make_tiny_checkpoint(tmp_path)), num_pages=4096, forward=forward)
    prefill = Segment(
        seq_id=0,
        start=0,
        token_ids=tuple(range(10, 50)),
        pages=(2000, 2001, 2002),  # none beside the ends of the memory, of which only whole pages go
        num_causal=40,
        adapter=False,
        wanted=(39,),
        sampling=SamplingParams(),
    )
    before = runner.run(ScheduledBatch((prefill,)))
    assert all(bool(layer.any()) for layer in runner._model.pages)
    runner.settle()
    assert not any(bool(layer.any()) for layer in runner._model.pages)
    assert runner.run(ScheduledBatch((prefill,))) == before
