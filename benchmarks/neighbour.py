"""What a process that keeps a core busy costs the engine: `python -m benchmarks.neighbour`.

The engine alone, `ar`, with as many threads as cores and with one, at each number of sequences; short turns
with the neighbour and without it alternate. The neighbour is pinned to a core unless `--core any`. Medians.
"""

import argparse
import os
import statistics
import time
from collections import defaultdict

from benchmarks.modes import CHECKPOINT
from benchmarks.policy.neighbour import neighbour
from policies.modes import Mode
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.machine import default_num_threads
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.runner import TorchRunner

SAMPLING = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
SETTLE_S = 0.2
MAX_BUSY_S = 600.0
"""The neighbour's end, should nobody end it."""


def tokens_per_s(runner: TorchRunner, num_sequences: int, seconds: float) -> float:
    """Runs so many sequences at a time, each after a prompt of 30 tokens of its own."""
    engine = Engine(runner, EngineConfig(max_running=num_sequences, max_waiting=0))
    num_asked = num_running = num_tokens = 0
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < seconds:
        while num_running < num_sequences:
            prompt = [(7 * index + num_asked) % 1600 + 10 for index in range(30)]
            engine.submit(str(num_asked), prompt, SAMPLING, DecodingOptions(Mode.AR))
            num_asked, num_running = num_asked + 1, num_running + 1
        for made in engine.step():
            num_tokens += len(made.token_ids)
            num_running -= made.ended
    return num_tokens / (time.perf_counter() - began_s)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="benchmarks.neighbour"
    )
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 64], help="numbers of sequences")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.8, help="of a turn")
    parser.add_argument("--core", default="1", help="the neighbour's, or any")
    options = parser.parse_args()
    runners = {
        threads: TorchRunner.load(str(CHECKPOINT), num_pages=3000, num_threads=threads)
        for threads in (default_num_threads(1), 1)
    }
    rates: dict[tuple[int, int, bool], list[float]] = defaultdict(list)

    def turn(is_beside: bool) -> None:
        for level in options.levels:
            for threads, runner in runners.items():
                rates[level, threads, is_beside].append(tokens_per_s(runner, level, options.seconds))

    for _ in range(options.turns):
        turn(False)
        with neighbour(MAX_BUSY_S) as process:
            if options.core != "any":
                os.sched_setaffinity(process.pid, {int(options.core)})
            time.sleep(SETTLE_S)
            turn(True)
    print(f"tokens/s, medians of {options.turns} turns; load average {os.getloadavg()[0]:.0f}")
    for level in options.levels:
        for threads in runners:
            alone, beside = (statistics.median(rates[level, threads, each]) for each in (False, True))
            print(
                f"{level:>3} sequences, {threads} threads: {alone:8,.0f} alone, {beside:8,.0f} beside the "
                f"neighbour, {beside / alone:.2f} of it"
            )


if __name__ == "__main__":
    main()
