"""Adaptive drafts against fixed blocks, by concurrency: `python -m benchmarks.adaptive [--json PATH]`.

The engine alone, in this process, with the embedded checkpoint. Every setting answers the same
held-out prompts in self_speculation; at concurrency C, C requests are kept running. Settings take
turns within each concurrency, for several turns, and the median counts. `ar` is there to compare.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.modes import CHECKPOINT, prompts
from policies.cost import StepCost
from policies.modes import DecodePlan, Mode
from replicas.engine.engine import Engine
from replicas.engine.plan import Segment, StepPlan
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec

FIXED = (1, 4, 8, 16, 32)
"""Block lengths; 1 is ar."""
MOST = 32
"""What adaptive blocks may have."""
SWEPT = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def sweep(runner: TorchRunner, clock: Callable[[], float]) -> StepCost:
    """What forwards take by query tokens, segments and cached tokens; of several turns the fastest."""

    def ms(num_segments: int, length: int, num_cached: int = 0) -> float:
        plan = _plan(runner.spec.page_size, num_segments, length, num_cached)
        took_s = []
        for _ in range(8):
            began_s = clock()
            runner.run(plan)
            took_s.append(clock() - began_s)
        return 1000 * min(took_s)

    segment_ms = max(0.0, (ms(32, 1) - ms(1, 32)) / 31)
    cached_ms = max(0.0, (ms(32, 1, 256) - ms(32, 1)) / (32 * 0.256))
    knot_ms: list[float] = []
    for num_tokens in SWEPT:
        num_segments = max(1, num_tokens // 32)
        alone = ms(num_segments, num_tokens // num_segments) - (num_segments - 1) * segment_ms
        knot_ms.append(max(alone, knot_ms[-1] if knot_ms else 0.01))
    return StepCost(SWEPT, tuple(knot_ms), segment_ms, cached_ms)


def _plan(page_size: int, num_segments: int, length: int, num_cached: int) -> StepPlan:
    num_pages = -(-(num_cached + length) // page_size)
    return StepPlan(
        tuple(
            Segment(
                seq_id=number,
                start=num_cached,
                token_ids=(7,) * length,
                pages=tuple(range(number * num_pages, (number + 1) * num_pages)),
                causal=True,
                adapter=False,
                wanted=tuple(range(length)),
                sampling=SamplingParams(),
            )
            for number in range(num_segments)
        )
    )


def measure(
    runner: TorchRunner,
    block_length: int | None,
    asked: list[list[int]],
    concurrency: int,
    cost: StepCost,
    clock: Callable[[], float],
) -> tuple[float, float]:
    """block_length: None is adaptive. Tokens a second over all prompts, and tokens a forward."""
    engine = Engine(
        runner, max_running=concurrency, max_waiting=len(asked), adaptive_speculation=block_length is None
    )
    engine.set_step_cost(cost)
    engine.set_plan(DecodePlan(Mode.SELF_SPECULATION, MOST), "benchmark")
    options = DecodingOptions(lossless=True)
    if block_length is not None:
        options = (
            DecodingOptions(Mode.AR)
            if block_length == 1
            else DecodingOptions(Mode.SELF_SPECULATION, block_length)
        )
    sequences = [
        engine.submit(str(number), prompt, SamplingParams(max_tokens=200), options)
        for number, prompt in enumerate(asked)
    ]
    began_s = clock()
    while engine.has_work:
        engine.step()
    took_s = clock() - began_s
    num_forwards = sum(sequence.num_forwards for sequence in sequences)
    return engine.scheduler.num_tokens / took_s, engine.scheduler.num_tokens / num_forwards


def rows(
    num_turns: int, concurrencies: tuple[int, ...], num_threads: int, clock: Callable[[], float]
) -> Iterator[dict[str, object]]:
    runner = TorchRunner.load(str(CHECKPOINT), num_threads=num_threads)
    asked = prompts(TextCodec.load(str(CHECKPOINT)))
    measure(runner, 8, asked[:4], 4, sweep(runner, clock), clock)  # warm-up
    cost = sweep(runner, clock)
    line = ", ".join(f"{q}: {ms:.1f}" for q, ms in zip(cost.knots, cost.knot_ms, strict=True))
    print(
        f"ms a forward by tokens: {line}; a segment {cost.segment_ms:.2f}, 1,000 cached {cost.cached_ms:.2f}"
    )
    settings = (*FIXED, None)
    for concurrency in concurrencies:
        some = asked[: 26 if concurrency == 1 else 104]
        turns = [
            [measure(runner, setting, some, concurrency, cost, clock) for setting in settings]
            for _ in range(num_turns)
        ]
        for setting, found in zip(settings, zip(*turns, strict=True), strict=True):
            yield {
                "concurrency": concurrency,
                "block": "adaptive" if setting is None else setting,
                "tokens_per_s": round(statistics.median(rate for rate, _ in found), 1),
                "tokens_per_forward": round(found[0][1], 2),
                "turns": [round(rate, 1) for rate, _ in found],
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="of this process, for a machine that is busy")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    found = []
    kind = "CPU time" if options.cpu_time else "wall time"
    print(f"CPU, {options.threads} threads, float32; tokens/s by {kind}, median of {options.turns} turns")
    for row in rows(options.turns, tuple(options.concurrency), options.threads, clock):
        found.append(row)
        name, rate = f"block {row['block']}", row["tokens_per_s"]
        print(f"{row['concurrency']:>4}  {name:<15} {rate:>8} {row['tokens_per_forward']:>6}", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
