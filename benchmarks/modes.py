"""Tokens a second, TTFT and TPOT of each mode by concurrency: `python -m benchmarks.modes [--json PATH]`.

Before them the table of what a forward costs here, as a replica measures it at its start. The engine alone,
in this process: no HTTP, no Ray. Every mode answers the same held-out prompts of the embedded checkpoint's
task families; at concurrency C, C requests are kept running. Modes take turns within each concurrency, for
several turns, and the median counts.
"""

import argparse
import json
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from policies.modes import DecodePlan, Mode
from replicas.calibration import calibrate
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.checkpoint import DTYPES
from replicas.model.runner import FORWARDS, TorchRunner
from replicas.text import TextCodec
from training.tasks.registry import FAMILIES, held_out_tasks

CHECKPOINT = Path(__file__).parent.parent / "replicas" / "checkpoints" / "triad-5m"
Clock = Callable[[], float]
"""A source of seconds."""
PLANS = (
    DecodePlan(Mode.AR),
    DecodePlan(Mode.SELF_SPECULATION, 8),
    DecodePlan(Mode.SELF_SPECULATION, 16),
    DecodePlan(Mode.DIFFUSION, 16),
    DecodePlan(Mode.DIFFUSION, 32),
)


def held_out_prompts() -> list[str]:
    """Held-out prompts of the embedded model's task families, which alternate."""
    turns = zip(*(held_out_tasks(family, 8) for family in FAMILIES), strict=True)
    return [task.prompt for turn in turns for task in turn]


def prompts(codec: TextCodec) -> list[list[int]]:
    """The prompts' token ids, the same for every mode and turn."""
    return [codec.encode(({"role": "user", "content": prompt},)) for prompt in held_out_prompts()]


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures of one mode at one concurrency; times are medians over requests."""

    tokens_per_s: float
    """Tokens a second of all requests together."""
    ttft_ms: float
    """The time to a request's first token from its submission, which is made when there is room for it."""
    tpot_ms: float
    """The time from a request's first token to its last, by token."""


@dataclass(slots=True)
class _Timed:
    submitted_s: float
    first_s: float = 0.0
    num_tokens: int = 0
    last_s: float = 0.0


def measure(
    runner: TorchRunner, plan: DecodePlan, asked: list[list[int]], concurrency: int, clock: Clock
) -> Measured:
    """Measures all the prompts, with so many requests running at a time."""
    engine = Engine(runner, EngineConfig(max_running=concurrency, max_waiting=0))
    options = DecodingOptions(plan.mode, None if plan.mode is Mode.AR else plan.block_length)
    waiting = deque(enumerate(asked))
    times: dict[str, _Timed] = {}
    num_running = 0
    began_s = clock()
    while waiting or engine.has_work:
        while waiting and num_running < concurrency:
            number, prompt = waiting.popleft()
            times[str(number)] = _Timed(clock())
            engine.submit(str(number), prompt, SamplingParams(max_tokens=200), options)
            num_running += 1
        progress = engine.step()
        now_s = clock()
        for made in progress:
            timed = times[made.sequence.request_id]
            if made.token_ids and not timed.num_tokens:
                timed.first_s = now_s
            timed.num_tokens += len(made.token_ids)
            timed.last_s = now_s
            num_running -= made.ended
    taken_s = clock() - began_s
    gaps = [(t.last_s - t.first_s) / (t.num_tokens - 1) for t in times.values() if t.num_tokens > 1]
    return Measured(
        sum(timed.num_tokens for timed in times.values()) / taken_s,
        statistics.median(timed.first_s - timed.submitted_s for timed in times.values()) * 1e3,
        statistics.median(gaps) * 1e3,
    )


def step_cost_table(runner: TorchRunner, clock: Clock) -> str:
    """A Markdown table: ms a forward by query tokens, of one sequence and of several that share them."""
    cost = calibrate(runner, max_running=64, max_step_tokens=512, budget_s=4.0, clock=clock)
    columns = ((1, 0), (1, 1024), (16, 16 * 256))
    lines = [
        "| query tokens | 1 sequence | 1, 1,024 tokens cached | 16, 256 cached each |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for num_tokens in cost.knots:
        cells = [
            f"{cost.ms(num_tokens, num_sequences, num_cached):.2f}" if num_tokens >= num_sequences else ""
            for num_sequences, num_cached in columns
        ]
        lines.append(f"| {num_tokens} | {' | '.join(cells)} |")
    more = f"a sequence more {cost.segment_ms:.3f} ms, 1,000 cached tokens {cost.cached_ms:.3f} ms"
    return "\n".join(("ms a forward:", *lines, more))


def rows(runner: TorchRunner, options: argparse.Namespace, clock: Clock) -> Iterator[dict[str, object]]:
    asked = prompts(TextCodec.load(str(CHECKPOINT)))
    measure(runner, PLANS[0], asked[:4], 4, clock)  # warm-up
    for concurrency in options.concurrency:
        some = asked[: 13 if concurrency == 1 else 52 if concurrency < 32 else 104]
        turns = [
            [measure(runner, plan, some, concurrency, clock) for plan in PLANS] for _ in range(options.turns)
        ]
        ar_rate = 0.0
        for plan, found in zip(PLANS, zip(*turns, strict=True), strict=True):
            rate = statistics.median(one.tokens_per_s for one in found)
            ar_rate = rate if plan.mode is Mode.AR else ar_rate
            yield {
                "concurrency": concurrency,
                "mode": plan.mode.value,
                "block_length": plan.block_length,
                "tokens_per_s": round(rate, 1),
                "times_ar": round(rate / ar_rate, 2),
                "ttft_ms": round(statistics.median(one.ttft_ms for one in found), 2),
                "tpot_ms": round(statistics.median(one.tpot_ms for one in found), 3),
                "turns": [round(one.tokens_per_s, 1) for one in found],
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--forward", choices=FORWARDS, default="auto")
    parser.add_argument("--cpu-time", action="store_true", help="by the CPU time of one thread")
    options = parser.parse_args()
    found = []
    clock = time.process_time if options.cpu_time else time.perf_counter
    num_threads = 1 if options.cpu_time else options.threads
    runner = TorchRunner.load(
        str(CHECKPOINT), dtype=options.dtype, num_threads=num_threads, forward=options.forward
    )
    by = "1 thread, by its CPU time" if options.cpu_time else f"{options.threads} threads"
    print(f"CPU, {by}, {options.dtype}")
    print(step_cost_table(runner, clock), flush=True)
    print(f"medians of {options.turns} turns:")
    print(f"{'':>4}  {'':<20} {'tokens/s':>9} {'x ar':>6} {'TTFT ms':>8} {'TPOT ms':>8}")
    for row in rows(runner, options, clock):
        found.append(row)
        name = f"{row['mode']}" + (f" {row['block_length']}" if row["mode"] != "ar" else "")
        print(
            f"{row['concurrency']:>4}  {name:<20} {row['tokens_per_s']:>9} {row['times_ar']:>6} "
            f"{row['ttft_ms']:>8} {row['tpot_ms']:>8}",
            flush=True,
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
