"""An engine under load over a model that costs nothing: `python -m benchmarks.gpu.offline.load`.

The real engine and the real runner, on meta tensors (benchmarks.gpu.offline.trace), after the warm-up of a
replica. Counted are the steps that were begun ahead, the segments begun in vain, the steps that ran without a
graph, and the graphs and kernels that the warm-up had not met: each would hold up all streams while it is
captured or compiled.
"""

import argparse
import json
import os
import random
from dataclasses import asdict, dataclass, replace

os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are imported

from benchmarks.gpu.model import Work, make_runner
from benchmarks.gpu.offline.devices import DEVICES
from benchmarks.gpu.offline.trace import META, Trace, standing_in
from policies.modes import Mode
from replicas.calibration import warm_up
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.cuda.runner import CudaRunner, Options

MODES = {mode.value: (mode,) for mode in Mode} | {"mixed": tuple(Mode)}
_BLOCK_LENGTH = 16
_GREEDY = SamplingParams()
_MAX_PROMPT, _MEAN_PROMPT, _MEAN_COMPLETION = 3000, 600, 250
_FILLING_STEPS = 300
_MAX_STEP_TOKENS, _MAX_PREFILL_TOKENS = 2048, 256


@dataclass(frozen=True, slots=True)
class Counted:
    """What came of a load."""

    mode: str
    concurrency: int
    page_size: int
    steps: int
    ahead: float
    """The share of steps that were begun ahead of their turn."""
    in_vain: float
    """The share of segments that were begun ahead and of no use."""
    unused: float
    """The share of rows that were begun ahead and not needed, as less was worth verifying or accepted."""
    eager: float
    """The share of forwards without a graph."""
    graphs: int
    """Graphs captured in the warm-up."""
    late_graphs: int
    """Graphs captured after it."""
    kernels: int
    """Kernels compiled in the warm-up, counted once a specialization."""
    late_kernels: tuple[str, ...]
    """Kernels compiled after it, by name."""


class _Requests:
    """A closed loop: one that ends is followed by the next."""

    def __init__(self, engine: Engine, mode: str, sampling: SamplingParams, rng: random.Random):
        self._engine, self._mode, self._sampling, self._rng = engine, mode, sampling, rng
        self._count = 0

    def submit(self) -> None:
        rng = self._rng
        self._count += 1
        mode = rng.choice(MODES[self._mode])
        prompt_len = min(_MAX_PROMPT, 16 + int(rng.expovariate(1 / _MEAN_PROMPT)))
        max_tokens = min(1000, 8 + int(rng.expovariate(1 / _MEAN_COMPLETION)))
        self._engine.submit(
            str(self._count),
            [rng.randrange(1000, 60000) for _ in range(prompt_len)],
            replace(self._sampling, max_tokens=max_tokens, ignore_eos=True, seed=self._count),
            DecodingOptions(mode, None if mode is Mode.AR else _BLOCK_LENGTH),
        )


class _Sizes:
    """Counts a runner's forwards, and those that no graph held."""

    def __init__(self, runner: CudaRunner):
        self.forwards = self.eager = self.rows = 0
        size_of = runner._size

        def counted(host: object) -> object:
            size, graphs = size_of(host)  # type: ignore[arg-type]
            self.forwards += 1
            self.rows += host.size.num_rows  # type: ignore[attr-defined]
            self.eager += graphs is None
            return size, graphs

        runner._size = counted  # type: ignore[assignment, method-assign]


def count(
    mode: str,
    concurrency: int,
    page_size: int = 64,
    *,
    steps: int = 400,
    sampling: SamplingParams = _GREEDY,
    seed: int = 0,
) -> Counted:
    """Runs a load of so many requests at once for so many steps, after those in which it fills."""
    trace, rng = Trace(), random.Random(seed)
    work = Work(
        "8B", page_size=page_size, num_cached=4096, max_concurrency=max(2 * concurrency, 4), num_layers=1
    )
    config = EngineConfig(
        max_running=concurrency, max_step_tokens=_MAX_STEP_TOKENS, max_prefill_tokens=_MAX_PREFILL_TOKENS
    )
    with standing_in(DEVICES["sm_90"], trace):
        runner = make_runner(work, META, Options())
        graphs = runner._graphs
        assert graphs is not None
        warm_up(runner, max_running=config.max_running, max_step_tokens=config.max_step_tokens)
        num_graphs, num_kernels = len(graphs), len(trace.variants)
        engine = Engine(runner, config)
        counters = engine.scheduler.counters
        requests = _Requests(engine, mode, sampling, rng)
        for _ in range(concurrency):
            requests.submit()
        num_needed = 0
        for step in range(-_FILLING_STEPS, steps):
            if step == 0:
                num_needed = 0
                counted, before = _Sizes(runner), (counters.num_steps, counters.num_ahead)
                engine.forwards.clear()
            for made in engine.step():
                if made.ended:
                    requests.submit()
            num_needed += sum(engine.forwards.popleft().num_tokens for _ in tuple(engine.forwards))
        num_steps, num_ahead = counters.num_steps - before[0], counters.num_ahead - before[1]
        forwards, eager = counted.forwards, counted.eager
    return Counted(
        mode=mode,
        concurrency=concurrency,
        page_size=page_size,
        steps=steps,
        ahead=round(num_ahead / num_steps, 3),
        in_vain=round(counters.num_in_vain / counters.num_segments, 4),
        unused=round(1 - num_needed / counted.rows, 3),
        eager=round(eager / forwards, 3),
        graphs=num_graphs,
        late_graphs=len(graphs) - num_graphs,
        kernels=num_kernels,
        late_kernels=tuple(variant.label for variant in list(trace.variants.values())[num_kernels:]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["ar", "self_speculation", "mixed"])
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--page-sizes", nargs="+", type=int, default=[64])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    sampling = SamplingParams(temperature=options.temperature, top_p=options.top_p)
    for mode in options.modes:
        for concurrency in options.concurrency:
            for page_size in options.page_sizes:
                found = count(mode, concurrency, page_size, steps=options.steps, sampling=sampling)
                print(json.dumps(asdict(found)), flush=True)


if __name__ == "__main__":
    main()
