"""Adaptive drafts against fixed blocks, by concurrency: `python -m benchmarks.adaptive [--json PATH]`.

The engine alone, in this process, with the embedded checkpoint. Every setting answers the same prompts in
self_speculation; at concurrency C, C requests are kept running. Settings take turns within each
concurrency, for several turns, and the median counts. `ar` is there to compare.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.load import PROMPTS as QUESTIONS
from benchmarks.modes import CHECKPOINT, held_out_prompts
from policies.cost import StepCost
from policies.modes import DecodePlan, Mode
from replicas.calibration import calibrate
from replicas.engine.engine import Engine
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec

FIXED = (1, 4, 8, 16, 32)
"""Fixed block lengths; 1 is ar."""
MOST = 32
"""The longest that an adaptive block may be."""
NUM_PROMPTS = 104
MAX_TOKENS = 120


def texts() -> dict[str, list[str]]:
    """The prompts by workload.

    held-out: held-out ones of the embedded model's task families, which alternate
    mixed: the same with every second one a question that the model has not learned to answer, so that its
    drafts survive less often
    """
    known = held_out_prompts()
    foreign = [
        f"{opening}{question}"
        for opening in ("", "Please: ", "Tell me. ", "I ask you: ", "Now, ")
        for question in QUESTIONS
    ]
    mixed = [prompt for pair in zip(known, foreign, strict=False) for prompt in pair]
    return {"held-out": known, "mixed": mixed}


def workloads(codec: TextCodec) -> dict[str, list[list[int]]]:
    return {
        name: [codec.encode(({"role": "user", "content": prompt},)) for prompt in prompts[:NUM_PROMPTS]]
        for name, prompts in texts().items()
    }


def measure(
    runner: TorchRunner,
    block_length: int | None,
    asked: list[list[int]],
    concurrency: int,
    cost: StepCost,
    clock: Callable[[], float],
) -> tuple[float, float]:
    """Tokens a second over all prompts, and tokens a forward.

    block_length: None is adaptive
    """
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
        engine.submit(str(number), prompt, SamplingParams(max_tokens=MAX_TOKENS), options)
        for number, prompt in enumerate(asked)
    ]
    began_s = clock()
    while engine.has_work:
        engine.step()
    took_s = clock() - began_s
    num_forwards = sum(sequence.num_forwards for sequence in sequences)
    return engine.scheduler.num_tokens / took_s, engine.scheduler.num_tokens / num_forwards


def rows(options: argparse.Namespace, clock: Callable[[], float]) -> Iterator[dict[str, object]]:
    runner = TorchRunner.load(str(CHECKPOINT), num_threads=options.threads)
    cost = calibrate(runner, max_running=64, max_step_tokens=512, budget_s=4.0, clock=clock)
    line = ", ".join(f"{q}: {ms:.2f}" for q, ms in zip(cost.knots, cost.knot_ms, strict=True))
    print(
        f"ms a forward by tokens: {line}; a segment {cost.segment_ms:.3f}, 1,000 cached {cost.cached_ms:.3f}"
    )
    settings = (*FIXED, None)
    for workload, asked in workloads(TextCodec.load(str(CHECKPOINT))).items():
        measure(runner, 8, asked[:4], 4, cost, clock)  # warm-up
        for concurrency in options.concurrency:
            some = asked[: 26 if concurrency == 1 else NUM_PROMPTS]
            turns = [
                [measure(runner, setting, some, concurrency, cost, clock) for setting in settings]
                for _ in range(options.turns)
            ]
            for setting, found in zip(settings, zip(*turns, strict=True), strict=True):
                yield {
                    "workload": workload,
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
    for row in rows(options, clock):
        found.append(row)
        name, rate = f"block {row['block']}", row["tokens_per_s"]
        where = f"{row['workload']:<9} {row['concurrency']:>4}"
        print(f"{where}  {name:<15} {rate:>8} {row['tokens_per_forward']:>6}", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
