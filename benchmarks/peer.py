"""The whole stack against vLLM's CPU build: `python -m benchmarks.peer --checkpoint DIR --vllm PATH`.

Both serve the same checkpoint in bfloat16 over HTTP; 64 output tokens, streamed, ignoring the end of
text. They take turns at each concurrency, the other one idle and vLLM stopped meanwhile; the median
turn counts. Also by process what CPU time Triad takes while it is measured.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.load import Level, level
from benchmarks.processes import ServerProcess, Triad, vllm

LEVELS = (1, 4, 16, 32, 64)
MODEL = "peer"


def run_level(port: int, concurrency: int, requests_each: int) -> Level:
    return asyncio.run(level(port, MODEL, concurrency, requests_each=requests_each))


def shares(before: Counter[str], after: Counter[str], taken_s: float) -> dict[str, float]:
    """Each process's share of the machine's CPU time; what took under 0.1 % is left out."""
    whole_s = taken_s * (os.cpu_count() or 1)
    spent = {name: (after[name] - before[name]) / whole_s for name in after}
    return {name: round(share, 4) for name, share in sorted(spent.items()) if share > 0.001}


def rows(
    ours: ServerProcess, peer: ServerProcess | None, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    for concurrency in options.concurrency:
        each = max(options.requests, 4 // concurrency)
        turns: dict[str, list[Level]] = {"triad": [], "vllm": []}
        cpu: dict[str, float] = {}
        for _ in range(options.turns):
            before, client = ours.cpu_s(), sum(os.times()[:2])
            found = run_level(ours.port, concurrency, each)
            taken_s = found.num_requests * 64 / found.tokens_per_s
            cpu = shares(before, ours.cpu_s(), taken_s)
            cpu["client"] = round((sum(os.times()[:2]) - client) / taken_s / (os.cpu_count() or 1), 4)
            turns["triad"].append(found)
            if peer is not None:
                peer.signal(signal.SIGCONT)
                turns["vllm"].append(run_level(peer.port, concurrency, each))
                peer.signal(signal.SIGSTOP)
        row: dict[str, Any] = {"concurrency": concurrency, "cpu_shares": cpu}
        for name, levels in turns.items():
            if levels:
                middle = statistics.median_low(item.tokens_per_s for item in levels)
                row[name] = asdict(next(item for item in levels if item.tokens_per_s == middle))
                row[name]["turns"] = [item.tokens_per_s for item in levels]
        if peer is not None:
            row["ratio"] = round(row["triad"]["tokens_per_s"] / row["vllm"]["tokens_per_s"], 2)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a folder of a Llama-family checkpoint")
    parser.add_argument("--vllm", help="the vllm executable; without it Triad alone is measured")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2, help="of each client, one after the other")
    parser.add_argument("--concurrency", type=int, nargs="+", default=list(LEVELS))
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--triad", nargs="*", default=[], help="further key=value of its configuration")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    given = ("dtype=bfloat16", f"served_model_name={MODEL}", "policy=ar", *options.triad)
    # As by Ctrl-C, so that the servers are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    results = []
    with ExitStack() as stack:
        peer = None
        if options.vllm:
            peer = stack.enter_context(vllm(options.vllm, options.checkpoint, options.port + 1, MODEL))
            peer.wait_until_ready()
            run_level(peer.port, 4, 1)
            peer.signal(signal.SIGSTOP)
        ours = stack.enter_context(Triad(f"model={options.checkpoint}", *given, port=options.port))
        run_level(ours.port, 4, 1)
        for row in rows(ours, peer, options):
            results.append(row)
            print(json.dumps(row), flush=True)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
