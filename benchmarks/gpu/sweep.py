"""Milliseconds a forward by concurrency and query tokens, and what the engine adds to a round."""

import statistics
import time
from collections.abc import Iterator

import torch

from benchmarks.gpu.model import Forward, Work, segments
from benchmarks.gpu.timing import Clock, Timing
from policies.modes import Mode
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.cuda.graphs import GraphRecorder
from replicas.model.cuda.runner import CudaRunner

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64, 128)
QUERIES = (1, 4, 8, 16, 32, 64)
"""Rows of a sequence: of a forward of self-speculation up to twice the block."""


def forward_rows(
    runner: CudaRunner, work: Work, clock: Clock, reserve_s: float
) -> Iterator[dict[str, object]]:
    """Rows like those of the public sweep: draft and verify of one block; AR has queries 1 and no draft.

    Stops when fewer than reserve_s seconds of the budget are left. Both ends of the range come first.
    """
    concurrencies = [c for c in CONCURRENCIES if c <= work.max_concurrency]
    for concurrency in sorted(concurrencies, key=lambda c: (c not in (1, 64), c)):
        for queries in (q for q in QUERIES if q <= work.max_queries):
            if clock.left_s < reserve_s:
                return
            verify = time_forward(runner, work, clock, concurrency, queries, draft=False)
            draft = None
            if queries > 1:
                draft = time_forward(runner, work, clock, concurrency, queries, draft=True)
            yield {
                "model": work.name,
                "block": queries,
                "concurrency": concurrency,
                "query_tokens": queries * concurrency,
                "mean_history": work.num_cached,
                "draft_ms": None if draft is None else round(draft.ms, 4),
                "verify_ms": round(verify.ms, 4),
                "std_ms": round(verify.std_ms, 4),
            }


def time_forward(
    runner: CudaRunner, work: Work, clock: Clock, concurrency: int, queries: int, *, draft: bool
) -> Timing:
    """The time of the forward and the choice of its tokens, by replays of their CUDA graph."""
    run = Forward(runner, segments(work, concurrency, queries, draft=draft))
    replay = run if runner.device.type != "cuda" else GraphRecorder(runner.device).capture(run)
    timing = clock.time(replay, for_s=0.2, cold=False)
    if runner.device.type == "cuda":
        del replay
        torch.cuda.empty_cache()
    return timing


def overhead_row(
    runner: CudaRunner, work: Work, clock: Clock, mode: Mode, concurrency: int
) -> dict[str, object]:
    """Compares a round, a forward, through the whole engine with the replays of such a forward alone.

    The prompts have num_cached tokens, so rounds run on about as many as the forwards they are compared to.
    With random weights a draft is hardly ever accepted; what counts here are a round's rows, on average.
    """
    engine = Engine(
        runner,
        EngineConfig(
            max_running=concurrency, max_waiting=concurrency, max_step_tokens=max(4096, 64 * concurrency)
        ),
    )
    block = work.max_queries // 2
    options = DecodingOptions(mode, None if mode is Mode.AR else block)
    most = 4 * work.max_queries  # so that no block is cut short by the end within the rounds measured
    for number in range(concurrency):
        tokens = [7 + (number * 31 + index) % 89 for index in range(work.num_cached)]
        engine.submit(str(number), tokens, SamplingParams(max_tokens=most, ignore_eos=True), options)
    while engine.scheduler.waiting or any(sequence.is_prefilling for sequence in engine.scheduler.running):
        engine.step()
    for _ in range(min(4, work.num_rounds)):  # graphs are captured
        engine.step()
    counters = engine.scheduler.counters
    began_ahead = counters.num_ahead
    sequences = tuple(engine.scheduler.running)
    began_rows = sum(sequence.num_rows for sequence in sequences)
    rounds: list[float] = []
    while len(engine.scheduler.running) == concurrency and len(rounds) < work.num_rounds:
        began_s = time.perf_counter()
        engine.step()  # waits for its own forward, and for none begun behind it
        rounds.append((time.perf_counter() - began_s) * 1e3)
    num_rows = sum(sequence.num_rows for sequence in sequences) - began_rows
    queries = max(1, round(num_rows / (len(rounds) * concurrency)))
    forwards_ms = time_forward(runner, work, clock, concurrency, queries, draft=False).ms
    round_ms = statistics.median(rounds)
    return {
        "model": work.name,
        "mode": mode.value,
        "block": 1 if mode is Mode.AR else block,
        "concurrency": concurrency,
        "queries": queries,
        "round_ms": round(round_ms, 3),
        "forwards_ms": round(forwards_ms, 3),
        "overhead_ms": round(round_ms - forwards_ms, 3),
        "num_rounds": len(rounds),
        "steps_begun_ahead": counters.num_ahead - began_ahead,
    }
