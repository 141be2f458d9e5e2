"""The cost of a forward here, and the engine's rates with it: `python -m benchmarks.step_cost --json PATH`.

Two measurements in turns, in one run, so that one can be held against the other, and of each the median turn.
Forwards of so many sequences, each with so many query tokens and so many cached ones, straight through the
runner; and the engine answering the held-out prompts of benchmarks.modes at each concurrency. The second
gives tokens a second, what the engine spends outside the forwards, and of every request the tokens, forwards
and rows it took. With one thread `--clock cpu` leaves out what other processes took.
`python -m loadtest.simulator validate` predicts the rates from the rest.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks.modes import CHECKPOINT, PLANS, prompts
from policies.modes import DecodePlan, Mode
from replicas.config import EngineConfig
from replicas.engine.batch import ModelSpec, ScheduledBatch, Segment, SegmentOutput
from replicas.engine.engine import Engine
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec

CONCURRENCIES = (1, 2, 4, 8, 16)
QUERIES = (1, 8, 16, 32)
CACHED = (32, 160)
PREFILLS = (64, 192)
VISITS = 3
"""The number of times a turn that a shape is timed, and the engine where it takes a second, at moments spread
over the turn: the machine's pace wanders within seconds."""
MIN_CALLS = 3
TIMED_S = 0.04
"""The least time of a visit: one forward of a millisecond says little."""
GREEDY = SamplingParams()
Clock = Callable[[], float]
"""A source of seconds."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A forward of num_sequences segments alike: num_query tokens each, after num_cached cached ones."""

    num_sequences: int
    num_query: int
    num_cached: int

    def plans(self, spec: ModelSpec, num_wanted: int = 1) -> list[ScheduledBatch]:
        """A causal step where a sequence has one token or nothing cached, else one as of a draft and one as
        of a verify.

        num_wanted: positions of each sequence, its last, whose logits are wanted
        """
        wanted = tuple(range(self.num_query))[-num_wanted:]
        if self.num_query == 1 or self.num_cached == 0:
            return [self._plan(spec, True, wanted)]
        return [self._plan(spec, False, wanted), self._plan(spec, True, wanted)]

    def _plan(self, spec: ModelSpec, causal: bool, wanted: tuple[int, ...]) -> ScheduledBatch:
        num_pages = -(-(self.num_cached + self.num_query) // spec.page_size)
        token_ids = tuple(7 + index % 500 for index in range(self.num_query))
        return ScheduledBatch(
            tuple(
                Segment(
                    seq_id=number,
                    start=self.num_cached,
                    token_ids=token_ids,
                    pages=tuple(range(number * num_pages, (number + 1) * num_pages)),
                    num_causal=self.num_query if causal else 0,
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
HEADS = tuple(Shape(count, query, CACHED[0]) for count in CONCURRENCIES for query in (8, 32))
"""Shapes timed also with all logits wanted."""


@dataclass(slots=True)
class Watched:
    """A runner that times its forwards."""

    inner: TorchRunner
    clock: Clock
    forwards_s: float = 0.0
    num_steps: int = 0
    num_segments: int = 0
    num_tokens: int = 0

    @property
    def spec(self) -> ModelSpec:
        return self.inner.spec

    def run(self, batch: ScheduledBatch) -> Sequence[SegmentOutput]:
        began_s = self.clock()
        outputs = self.inner.run(batch)
        self.forwards_s += self.clock() - began_s
        self.num_steps += 1
        self.num_segments += len(batch.segments)
        self.num_tokens += sum(len(segment.token_ids) for segment in batch.segments)
        return outputs


@dataclass(slots=True)
class Cell:
    """One plan at one concurrency, over all turns."""

    plan: DecodePlan
    concurrency: int
    rates: list[float] = field(default_factory=list)
    outside: list[tuple[float, float, float]] = field(default_factory=list)
    """For each turn: segments and query tokens a step, and ms a step outside the forward."""
    forwards_ms: list[float] = field(default_factory=list)
    """For each turn: ms a step in the forward."""
    requests: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    """For each request: prompt tokens, those of them not found cached, completion tokens, forwards, and the
    query tokens of these."""

    def measure(self, runner: TorchRunner, asked: Sequence[list[int]], clock: Clock) -> None:
        watched = Watched(runner, clock)
        engine = Engine(watched, EngineConfig(max_running=self.concurrency, max_waiting=len(asked)))
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
        self.rates.append(engine.scheduler.counters.num_tokens / took_s)
        ms = 1000.0 * (took_s - watched.forwards_s) / watched.num_steps
        steps = watched.num_steps
        self.forwards_ms.append(1000.0 * watched.forwards_s / steps)
        self.outside.append((watched.num_segments / steps, watched.num_tokens / steps, ms))
        self.requests = [
            (
                sequence.num_prompt_tokens,
                sequence.num_prompt_tokens - sequence.num_reused,
                sequence.num_completion_tokens,
                sequence.num_forwards,
                sequence.num_rows,
            )
            for sequence in sequences
        ]


def measure(num_turns: int, num_threads: int, clock: Clock) -> Iterator[dict[str, Any]]:
    """Yields, after each turn, all that is found so far."""
    runner = TorchRunner.load(str(CHECKPOINT), num_threads=num_threads)
    asked = prompts(TextCodec.load(str(CHECKPOINT)))
    cells = [Cell(plan, concurrency) for concurrency in CONCURRENCIES for plan in PLANS]
    forwards_ms: dict[Shape, list[float]] = {shape: [] for shape in SHAPES}
    with_logits_ms: dict[Shape, list[float]] = {shape: [] for shape in HEADS}
    Cell(PLANS[0], 4).measure(runner, asked[:4], clock)  # warm-up
    order = random.Random(0)
    for _ in range(num_turns):
        for concurrency in CONCURRENCIES:
            work: list[Callable[[], None]] = []
            for shape in SHAPES:
                if shape.num_sequences == concurrency:
                    plans = shape.plans(runner.spec)
                    work += [partial(_time, runner, plans, clock, forwards_ms[shape])] * VISITS
            for shape in HEADS:
                if shape.num_sequences == concurrency:
                    plans = shape.plans(runner.spec, shape.num_query)
                    work += [partial(_time, runner, plans, clock, with_logits_ms[shape])] * VISITS
            for cell in cells:
                if cell.concurrency == concurrency:
                    is_short = concurrency <= 2
                    once = partial(cell.measure, runner, asked[: 13 if is_short else 26], clock)
                    work += [once] * (VISITS if is_short else 1)
            order.shuffle(work)  # so that a slow moment of the machine falls on either measurement
            for measure_one in work:
                measure_one()
        yield _found(cells, forwards_ms, with_logits_ms, num_threads, clock)


def _found(
    cells: Sequence[Cell],
    forwards_ms: dict[Shape, list[float]],
    with_logits_ms: dict[Shape, list[float]],
    num_threads: int,
    clock: Clock,
) -> dict[str, Any]:
    outside = [tuple(map(statistics.median, zip(*cell.outside, strict=True))) for cell in cells]
    step_ms, segment_ms, token_ms = _plane(outside)
    return {
        "what": "latency of a forward by sequences, query tokens and cached tokens, and the engine's rates",
        "model": "triad-5m, float32",
        "machine": f"CPU, {num_threads} threads",
        "clock": "CPU time" if clock is time.process_time else "wall",
        "overhead_ms": {
            "step": round(step_ms, 4),
            "sequence": round(segment_ms, 4),
            "query_token": round(token_ms, 5),
        },
        "logits_ms": round(_logits_ms(forwards_ms, with_logits_ms), 5),
        "rows": list(_rows(forwards_ms)),
        "measured": [
            {
                "concurrency": cell.concurrency,
                "mode": cell.plan.mode.value,
                "block_length": cell.plan.block_length,
                "tokens_per_s": round(statistics.median(cell.rates), 1),
                "forward_ms": round(statistics.median(cell.forwards_ms), 4),
                "outside_ms": round(statistics.median(point[-1] for point in cell.outside), 4),
                "turns": [round(rate, 1) for rate in cell.rates],
                "requests": cell.requests,
            }
            for cell in cells
        ],
    }


def _time(runner: TorchRunner, plans: Sequence[ScheduledBatch], clock: Clock, visits: list[float]) -> None:
    """Adds to visits the median ms of a forward of these plans, which count alike."""
    taken: list[float] = []
    while len(taken) < MIN_CALLS or sum(taken) * len(plans) < 1000.0 * TIMED_S:
        began_s = clock()
        for plan in plans:
            runner.run(plan)
        taken.append(1000.0 * (clock() - began_s) / len(plans))
    visits.append(statistics.median(taken))


def _logits_ms(forwards_ms: dict[Shape, list[float]], with_logits_ms: dict[Shape, list[float]]) -> float:
    """The cost of one more position whose logits are wanted, by least relative squares over the shapes."""
    shares = []
    for shape, turns in with_logits_ms.items():
        base_ms = statistics.median(forwards_ms[shape])
        num_more = shape.num_sequences * (shape.num_query - 1)
        shares.append((num_more / base_ms, statistics.median(turns) / base_ms - 1.0))
    return max(0.0, sum(x * y for x, y in shares) / sum(x * x for x, _ in shares))


def _plane(points: Sequence[tuple[float, ...]]) -> tuple[float, float, float]:
    """The plane a + b x + c y of least relative squares, none of a, b and c below 0."""
    x, y, ms = numpy.array(points).T
    terms = numpy.stack([1.0 / ms, x / ms, y / ms], axis=1)
    kept = [0, 1, 2]
    while True:
        found = numpy.zeros(3)
        found[kept] = numpy.linalg.lstsq(terms[:, kept], numpy.ones(len(ms)), rcond=None)[0]
        if found.min() >= 0:
            return float(found[0]), float(found[1]), float(found[2])
        kept.remove(int(found.argmin()))


def _rows(forwards_ms: dict[Shape, list[float]]) -> Iterator[dict[str, Any]]:
    for shape, turns in forwards_ms.items():
        yield {
            "sequences": shape.num_sequences,
            "query_tokens": shape.num_sequences * shape.num_query,
            "cached_tokens": shape.num_sequences * shape.num_cached,
            "ms": round(statistics.median(turns), 4),
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
