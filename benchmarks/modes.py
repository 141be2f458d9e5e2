"""Tokens a second of each mode by concurrency: `python -m benchmarks.modes [--json PATH]`.

The engine alone, in this process: no HTTP, no Ray. Every mode answers the same held-out prompts of
the embedded checkpoint's task families; at concurrency C, C requests are kept running. Modes take
turns within each concurrency, for several turns, and the median counts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from policies.modes import DecodePlan, Mode
from replicas.engine.engine import Engine
from replicas.engine.plan import Runner
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec
from replicas.training.tasks.registry import FAMILIES, held_out_tasks

CHECKPOINT = Path(__file__).parent.parent / "replicas" / "checkpoints" / "triad-5m"
PLANS = (
    DecodePlan(Mode.AR),
    DecodePlan(Mode.SELF_SPECULATION, 8),
    DecodePlan(Mode.SELF_SPECULATION, 16),
    DecodePlan(Mode.DIFFUSION, 16),
    DecodePlan(Mode.DIFFUSION, 32),
)


def prompts(codec: TextCodec) -> list[list[int]]:
    """The same for every mode and turn; families alternate."""
    tasks = zip(*(held_out_tasks(family, 8) for family in FAMILIES), strict=True)
    return [codec.encode(({"role": "user", "content": task.prompt},)) for turn in tasks for task in turn]


def measure(runner: Runner, plan: DecodePlan, asked: list[list[int]], concurrency: int) -> float:
    """Tokens a second over all the prompts, with so many requests running."""
    engine = Engine(runner, max_running=concurrency, max_waiting=len(asked))
    options = DecodingOptions(plan.mode, None if plan.mode is Mode.AR else plan.block_length)
    for number, prompt in enumerate(asked):
        engine.submit(str(number), prompt, SamplingParams(max_tokens=200), options)
    began_s = time.perf_counter()
    while engine.has_work:
        engine.step()
    return engine.scheduler.num_tokens / (time.perf_counter() - began_s)


def load_runner(device: str, num_threads: int) -> Runner:
    if device == "cpu":
        return TorchRunner.load(str(CHECKPOINT), num_threads=num_threads)
    from replicas.model.cuda.runner import CudaRunner

    return CudaRunner.load(str(CHECKPOINT), device=device, kv_budget_bytes=512 << 20)


def rows(
    device: str, num_turns: int, concurrencies: tuple[int, ...], num_threads: int
) -> Iterator[dict[str, object]]:
    runner = load_runner(device, num_threads)
    asked = prompts(TextCodec.load(str(CHECKPOINT)))
    measure(runner, PLANS[0], asked[:4], 4)  # warm-up
    for concurrency in concurrencies:
        some = asked[: 13 if concurrency == 1 else 52]
        turns = [[measure(runner, plan, some, concurrency) for plan in PLANS] for _ in range(num_turns)]
        for plan, rates in zip(PLANS, zip(*turns, strict=True), strict=True):
            yield {
                "concurrency": concurrency,
                "mode": plan.mode.value,
                "block_length": plan.block_length,
                "tokens_per_s": round(statistics.median(rates), 1),
                "turns": [round(rate, 1) for rate in rates],
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    found = []
    where = f"CPU, {options.threads} threads, float32" if options.device == "cpu" else "GPU, bfloat16"
    print(f"{where}; tokens/s, median of {options.turns} turns")
    for row in rows(options.device, options.turns, tuple(options.concurrency), options.threads):
        found.append(row)
        name = f"{row['mode']}" + (f" {row['block_length']}" if row["mode"] != "ar" else "")
        print(f"{row['concurrency']:>4}  {name:<20} {row['tokens_per_s']:>8}", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
