"""What a forward costs here, and what the engine makes of it: `python -m benchmarks.step_cost --json PATH`.

Two measurements in turns, in one run, so that one can be held against the other, and of each the fastest
turn: what the machine does undisturbed. Forwards of so many sequences, each with so many query tokens
and so many cached ones, straight through the runner; and the engine answering the held-out prompts of
benchmarks.modes at each concurrency. The second gives tokens a second, what the engine spends outside
the forwards, and of every request the tokens and forwards it took. With one thread `--clock cpu` leaves
out what other processes took. `python -m loadtest.simulate validate` predicts the rates from the rest.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks.modes import CHECKPOINT, PLANS, prompts
from policies.modes import DecodePlan, Mode
from replicas.engine.engine import Engine
from replicas.engine.plan import ModelSpec, Segment, SegmentOutput, StepPlan
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec

CONCURRENCIES = (1, 2, 4, 8, 16)
QUERIES = (1, 8, 16, 32)
CACHED = (32, 160)
PREFILLS = (64, 192)
GREEDY = SamplingParams()
Clock = Callable[[], float]
"""Seconds."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A forward of num_sequences segments alike: num_query tokens each, after num_cached cached ones."""

    num_sequences: int
    num_query: int
    num_cached: int

    def plans(self, spec: ModelSpec) -> list[StepPlan]:
        """A causal step where a sequence has one token, else a draft and a verify."""
        if self.num_query == 1:
            return [self._plan(spec, True, (0,))]
        if self.num_cached == 0:
            return [self._plan(spec, True, (self.num_query - 1,))]
        every = tuple(range(self.num_query))
        return [self._plan(spec, False, every[1:]), self._plan(spec, True, every)]

    def _plan(self, spec: ModelSpec, causal: bool, wanted: tuple[int, ...]) -> StepPlan:
        num_pages = -(-(self.num_cached + self.num_query) // spec.page_size)
        token_ids = tuple(7 + index % 500 for index in range(self.num_query))
        return StepPlan(
            tuple(
                Segment(
                    seq_id=number,
                    start=self.num_cached,
                    token_ids=token_ids,
                    pages=tuple(range(number * num_pages, (number + 1) * num_pages)),
                    causal=causal,
                    adapter=not causal,
                    wanted=wanted,
                    sampling=GREEDY,
                )
                for number in range(self.num_sequences)
            )
        )


SHAPES = (
    *(Shape(count, query, cached) for count in CONCURRENCIES for query in QUERIES for cached in CACHED),
    *(Shape(1, query, 0) for query in PREFILLS),
)


@dataclass(slots=True)
class Watched:
    """A runner that knows how long its forwards took."""

    inner: TorchRunner
    clock: Clock
    forwards_s: float = 0.0
    num_steps: int = 0
    num_segments: int = 0

    @property
    def spec(self) -> ModelSpec:
        return self.inner.spec

    def run(self, plan: StepPlan) -> Sequence[SegmentOutput]:
        began_s = self.clock()
        outputs = self.inner.run(plan)
        self.forwards_s += self.clock() - began_s
        self.num_steps += 1
        self.num_segments += len(plan.segments)
        return outputs


@dataclass(slots=True)
class Cell:
    """One plan at one concurrency, over all turns."""

    plan: DecodePlan
    concurrency: int
    rates: list[float] = field(default_factory=list)
    outside: list[tuple[float, float]] = field(default_factory=list)
    """Each turn's segments a step, and ms a step outside the forward."""
    requests: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Each request's prompt tokens, those of them not found cached, completion tokens, and forwards."""

    def measure(self, runner: TorchRunner, asked: Sequence[list[int]], clock: Clock) -> None:
        watched = Watched(runner, clock)
        engine = Engine(watched, max_running=self.concurrency, max_waiting=len(asked))
        options = DecodingOptions(
            self.plan.mode, None if self.plan.mode is Mode.AR else self.plan.block_length
        )
        sequences = [
            engine.submit(str(number), prompt, SamplingParams(max_tokens=200), options)
            for number, prompt in enumerate(asked)
        ]
        began_s = clock()
        while engine.has_work:
            engine.step()
        took_s = clock() - began_s
        self.rates.append(engine.scheduler.num_tokens / took_s)
        ms = 1000.0 * (took_s - watched.forwards_s) / watched.num_steps
        self.outside.append((watched.num_segments / watched.num_steps, ms))
        self.requests = [
            (
                sequence.num_prompt_tokens,
                sequence.num_prompt_tokens - sequence.num_reused,
                sequence.num_completion_tokens,
                sequence.num_forwards,
            )
            for sequence in sequences
        ]


def measure(num_turns: int, num_threads: int, clock: Clock) -> Iterator[dict[str, Any]]:
    """What is found so far, after each turn."""
    runner = TorchRunner.load(str(CHECKPOINT), num_threads=num_threads)
    asked = prompts(TextCodec.load(str(CHECKPOINT)))
    cells = [Cell(plan, concurrency) for concurrency in CONCURRENCIES for plan in PLANS]
    forwards_ms: dict[Shape, list[float]] = {shape: [] for shape in SHAPES}
    Cell(PLANS[0], 4).measure(runner, asked[:4], clock)  # warm-up
    for _ in range(num_turns):
        for concurrency in CONCURRENCIES:
            for shape in SHAPES:
                if shape.num_sequences == concurrency:
                    forwards_ms[shape].append(_time(runner, shape, clock))
            for cell in cells:
                if cell.concurrency == concurrency:
                    cell.measure(runner, asked[: 13 if concurrency <= 2 else 26], clock)
        yield _found(cells, forwards_ms, num_threads, clock)


def _found(
    cells: Sequence[Cell], forwards_ms: dict[Shape, list[float]], num_threads: int, clock: Clock
) -> dict[str, Any]:
    step_ms, segment_ms = _line([point for cell in cells for point in cell.outside])
    return {
        "what": "latency of a forward by sequences, query tokens and cached tokens, and the engine's rates",
        "model": "triad-5m, float32",
        "machine": f"CPU, {num_threads} threads",
        "clock": "CPU time" if clock is time.process_time else "wall",
        "overhead_ms": {"step": round(step_ms, 4), "sequence": round(segment_ms, 4)},
        "rows": list(_rows(forwards_ms)),
        "measured": [
            {
                "concurrency": cell.concurrency,
                "mode": cell.plan.mode.value,
                "block_length": cell.plan.block_length,
                "tokens_per_s": round(max(cell.rates), 1),
                "turns": [round(rate, 1) for rate in cell.rates],
                "requests": cell.requests,
            }
            for cell in cells
        ],
    }


def _time(runner: TorchRunner, shape: Shape, clock: Clock, num_calls: int = 3) -> float:
    """Median ms of a forward of this shape; a draft and its verify counted half each."""
    plans = shape.plans(runner.spec)
    taken = []
    for _ in range(num_calls):
        began_s = clock()
        for plan in plans:
            runner.run(plan)
        taken.append(1000.0 * (clock() - began_s) / len(plans))
    return statistics.median(taken)


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares a + b x, neither below 0."""
    x, y = numpy.array(points).T
    slope = max(0.0, float(numpy.polyfit(x, y, 1)[0]))
    return max(0.0, float(y.mean() - slope * x.mean())), slope


def _rows(forwards_ms: dict[Shape, list[float]]) -> Iterator[dict[str, Any]]:
    for shape, turns in forwards_ms.items():
        yield {
            "sequences": shape.num_sequences,
            "query_tokens": shape.num_sequences * shape.num_query,
            "cached_tokens": shape.num_sequences * shape.num_cached,
            "ms": round(min(turns), 4),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu adds all threads up; it wants --threads 1")
    began_s = time.perf_counter()
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for found in measure(options.turns, options.threads, clock):
        options.json.write_text(json.dumps(found) + "\n")
        print(f"a turn done, {time.perf_counter() - began_s:.0f} s", flush=True)
    for cell in found["measured"]:
        print(
            f"{cell['concurrency']:>4} {cell['mode']:<17} {cell['block_length']:>2} {cell['tokens_per_s']:>8}"
        )
    print(f"took {time.perf_counter() - began_s:.0f} s")


if __name__ == "__main__":
    main()
