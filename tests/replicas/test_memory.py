"""Nothing of a request stays behind. benchmarks/memory.py has the resident memory over 10,000 of them."""

import gc
from pathlib import Path

import torch

from policies.modes import Mode
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.engine.sequence import Sequence
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.runner import TorchRunner
from tests.tiny_checkpoint import make_tiny_checkpoint


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def serve(engine: Engine, first: int, count: int) -> None:
    for number in range(first, first + count):
        mode = list(Mode)[number % 3]
        options = DecodingOptions(mode, None if mode is Mode.AR else 4)
        prompt = [6 + (number * 7 + i) % 80 for i in range(5 + number % 40)]
        engine.submit(str(number), prompt, SamplingParams(max_tokens=1 + number % 9), options)
        if number % 10 == 9:
            engine.cancel(str(number - 2))
        while len(engine.scheduler.waiting) > 4:
            engine.step()
    while engine.has_work:
        engine.step()


def num_sequences() -> int:
    """Those that are still alive, other tests' among them."""
    gc.collect()
    return sum(type(thing) is Sequence for thing in gc.get_objects())


def test_requests_leave_nothing_behind(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    runner = TorchRunner.load(str(make_tiny_checkpoint(tmp_path)), num_pages=60, page_size=8)
    engine = Engine(runner, EngineConfig(max_running=8))
    serve(engine, 0, 300)
    before, num_before = resident_bytes(), num_sequences()
    serve(engine, 300, 600)
    engine.check_integrity()
    assert num_sequences() <= num_before
    assert resident_bytes() - before < 8 << 20
