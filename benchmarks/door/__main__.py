"""What the door costs: `python -m benchmarks.door`, the engine alone and the whole stack in turn.

The engine alone is a replica in this process (engine, text, one channel); the whole stack is a server as
`make serve` starts it, with light clients in this process. Both take the same prompts and 64 tokens a
request, with as many threads.
The table has tokens/s of the one over the other, CPU time outside the forward by kind of process, the first
token on an idle server against a forward, and the memory of the idle stack. Raw rows go to a JSONL file;
`--report` makes the table of it again.
"""

import argparse
import asyncio
import json
import signal
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.door.accounting import pss_by_kind
from benchmarks.door.report import report
from benchmarks.door.windows import MAX_TOKENS, MODEL, MODES, Alone, Stack, window
from benchmarks.first_token import forward_ms, prompts
from benchmarks.machine import Provenance
from benchmarks.modes import CHECKPOINT
from benchmarks.processes import Triad
from benchmarks.replica_alone import replica_alone
from benchmarks.stream_client import Tally, over_http
from replicas.machine import default_num_threads
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec

RAW = Path(__file__).parent.parent / "results" / "door.jsonl"
LEVELS = (1, 4, 16, 64)
WARM_UP_S = 2.0


def main() -> None:
    options = parse()
    if options.report:
        print(report([json.loads(line) for line in options.raw.read_text().splitlines()]))
        return
    # As by Ctrl-C, so that the server is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    num_threads = options.threads or default_num_threads(1)
    run: dict[str, Any] = asdict(Provenance.now()) | {"threads": num_threads, "triad": options.triad}
    given = ("num_replicas=1", "policy=ar", f"num_threads={num_threads}", *options.triad)
    found: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        options.raw.parent.mkdir(parents=True, exist_ok=True)
        with options.raw.open("a") as file:
            file.write(json.dumps(row | {"run": run}) + "\n")
        found.append(row | {"run": run})

    with Triad(*given, drains=True) as server:
        asyncio.run(measure(server, num_threads, options, note))
    print(report(found))


async def measure(server: Triad, num_threads: int, options: argparse.Namespace, note: Any) -> None:
    root = server.process.pid
    note({"what": "first token"} | await first_token(server.port, num_threads))
    note({"what": "memory", "pss": pss_by_kind(root)})
    stack = Stack(server.port, root)
    await stack.find_forward_threads()
    async with replica_alone(num_threads) as replica:
        alone = Alone(replica)
        for mode in options.modes:
            for target in (alone, stack):
                await window(target, mode, 4, 0, 0.0, WARM_UP_S)
        for turn in range(options.turns):
            for step, level in enumerate(options.levels):
                for number, mode in enumerate(options.modes):
                    pair = (alone, stack) if (turn + step + number) % 2 else (stack, alone)
                    for target in pair:
                        row = await window(target, mode, level, turn, options.settle, options.seconds)
                        note({"what": "window"} | asdict(replace(row, run={})))
                        rate = row.tokens / row.seconds
                        print(f"{row.where:<13} {mode:<20} {level:>3} {rate:>9,.1f} tokens/s", flush=True)


async def first_token(port: int, num_threads: int) -> dict[str, float]:
    """Medians of prompts of which each is asked once, on an idle server, and of their forwards here."""
    codec = TextCodec.load(str(CHECKPOINT))
    runner = TorchRunner.load(str(CHECKPOINT), num_pages=512, num_threads=num_threads)
    tally, forwards_ms = Tally(), []
    async with over_http(port, MODEL, 2, True, {"mode": "ar"})() as ask:
        for prompt in prompts(0):
            await ask(prompt, Tally())
        for prompt in prompts(1):
            await ask(prompt, tally)
            token_ids = codec.encode(({"role": "user", "content": prompt},))
            forwards_ms.append(min(forward_ms(runner, token_ids) for _ in range(2)))
    return {
        "ttft_ms": round(1e3 * statistics.median(tally.ttfts_s), 2),
        "forward_ms": round(statistics.median(forwards_ms), 2),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="benchmarks.door"
    )
    parser.add_argument("--levels", type=int, nargs="+", default=list(LEVELS), help="numbers of clients")
    parser.add_argument("--modes", choices=list(MODES), nargs="+", default=list(MODES))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=5.0, help=f"of a window, {MAX_TOKENS} tokens a request"
    )
    parser.add_argument("--settle", type=float, default=1.5, help="seconds before each window")
    parser.add_argument("--threads", type=int, help="of a forward, in both; default: the cores")
    parser.add_argument("--triad", nargs="*", default=[], help="further key=value of its configuration")
    parser.add_argument("--raw", type=Path, default=RAW, help="rows are appended to this file")
    parser.add_argument("--report", action="store_true", help="measure nothing, tabulate the raw rows")
    options = parser.parse_args()
    if min(*options.levels, options.turns, options.seconds) <= 0:
        parser.error("--levels, --turns and --seconds must be positive")
    return options


if __name__ == "__main__":
    main()
