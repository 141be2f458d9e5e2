"""Which threads of a process work in a step with the native forward."""

from pathlib import Path

import pytest

from policies.modes import Mode
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.runner import TorchRunner

CHECKPOINT = Path(__file__).parents[3] / "replicas" / "checkpoints" / "triad-5m"
TASKS = Path("/proc/self/task")
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=40, temperature=0.8, seed=1, ignore_eos=True)


def cpu_ns() -> dict[str, int]:
    """The CPU time of each of this process's threads."""
    return {task.name: int((task / "schedstat").read_text().split()[0]) for task in TASKS.iterdir()}


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel does not tell CPU times")
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("mode", list(Mode))
def test_no_thread_but_the_forwards_works_in_a_step(mode: Mode, sampling: SamplingParams) -> None:
    """torch's own threads would spin behind each operation, on the cores of the next forward."""
    runner = TorchRunner.load(str(CHECKPOINT), num_threads=2, forward="native", num_pages=400)
    engine = Engine(runner, EngineConfig(max_running=24))
    spent: dict[str, int] = {}
    for turn in range(2):  # in the first one the threads that loaded the weights may still spin
        for number in range(24):
            prompt = [10 + (number * 31 + at) % 500 for at in range(12)]
            engine.submit(f"{turn} {number}", prompt, sampling, DecodingOptions(mode))
        before = cpu_ns()
        while engine.has_work:
            engine.step()
        spent = {name: now - before.get(name, 0) for name, now in cpu_ns().items()}
    assert sum(ns > 2_000_000 for ns in spent.values()) <= 2
