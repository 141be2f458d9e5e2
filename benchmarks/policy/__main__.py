"""`auto` against the fixed settings over HTTP: `python -m benchmarks.policy --part levels ...`.

A real server with the embedded checkpoint on one replica, and a closed loop of light clients on the same
machine, whose own share of the cores is given. Fixed settings pin their mode in the request, so all
contenders take turns on one server; what the policy foretells for each of them is read from its state.

    levels      at each number of clients every contender in turn, the order rotated; forecasts against what
                was made
    steady      `auto` at each level, held for a minute: shifts, and tokens made by trials
    ramp        1 to 64 to 1 clients over 3 minutes, each contender
    square      1 and 64 clients in turn, each contender
    neighbour   the levels beside a process that keeps a core busy for 5 s in every 15
    start       `auto` second by second from a server's readiness on, a server a level and turn

`--part report` writes tables, plots and what of the aims is met from the raw rows (JSONL) so far.
"""

import argparse
import asyncio
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import Provenance
from benchmarks.policy import parts
from benchmarks.policy.contenders import AUTO, FIXED, QUICK, WORKLOADS, is_lossless
from benchmarks.policy.report import write_report
from benchmarks.policy.windows import Bench
from benchmarks.processes import Triad
from policies.cost_model import CostModelPolicy
from policies.slo import SloPolicy

RESULTS = Path(__file__).parent.parent / "results"
RAW = RESULTS / "policy-http.jsonl"
PARTS = ("levels", "steady", "ramp", "square", "neighbour", "start")
FULL = parts.Lengths((1, 2, 4, 8, 16, 32, 64), 3, 5.0, 2.0, 14.0, 60.0, 15)
BRIEF = parts.Lengths((1, 8, 64), 1, 5.0, 2.0, 3.0, 20.0, 15)
WARM_UP_S = 10.0
MAX_TOKENS = {"fixed-length": 96, "held-out": 200, "mixed": 200}


def main() -> None:
    options = parse()
    if options.part == ["report"]:
        print(write_report(options.raw))
        return
    # As by Ctrl-C, so that the server is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    usual = BRIEF if options.quick else FULL
    lengths = parts.Lengths(
        tuple(options.levels or usual.levels),
        options.turns or usual.turns,
        options.seconds or usual.seconds,
        usual.settle_s,
        options.step or usual.step_s,
        usual.steady_s,
        usual.start_s,
    )
    usual_fixed = QUICK if options.quick else tuple(FIXED)
    allowed = [name for name in usual_fixed if options.quality == "any" or is_lossless(name)]
    contenders = (AUTO, *(options.fixed or allowed))
    in_one_server = [part for part in options.part if part in PARTS and part != "start"]
    if in_one_server:
        with server(options) as triad:
            asyncio.run(measure(bench_of(options, triad.port), in_one_server, contenders, lengths))
    if "start" in options.part:
        for turn in range(lengths.turns):
            for level in lengths.levels:
                with server(options) as triad:
                    ready_s = time.monotonic()
                    bench = bench_of(options, triad.port)
                    asyncio.run(parts.start(bench, contenders, lengths, turn, level, ready_s))
    if "report" in options.part:
        print(write_report(options.raw))


async def measure(
    bench: Bench, chosen: list[str], contenders: tuple[str, ...], lengths: parts.Lengths
) -> None:
    """Runs the parts on one server, turn by turn."""
    await parts.warm_up(bench, WARM_UP_S)
    for turn in range(lengths.turns):
        for part in chosen:
            match part:
                case "levels":
                    await parts.levels(bench, contenders, lengths, turn)
                case "steady":
                    await parts.steady(bench, lengths, turn)
                case "neighbour":
                    await parts.neighboured(bench, contenders, lengths, turn)
                case "ramp":
                    await parts.wave(bench, contenders, lengths, turn, "ramp", parts.RAMP)
                case "square":
                    await parts.wave(bench, contenders, lengths, turn, "square", parts.SQUARE)


def server(options: argparse.Namespace) -> Triad:
    given = [f"policy={options.policy}", *options.triad]
    if options.policy in (CostModelPolicy.name, SloPolicy.name):
        given.append(f'policy_params={{"quality": "{options.quality}"}}')
    return Triad("num_replicas=1", *given)


def bench_of(options: argparse.Namespace, port: int) -> Bench:
    max_tokens = options.max_tokens or MAX_TOKENS[options.workload]
    run: dict[str, Any] = asdict(Provenance.now())
    run |= {"policy": options.policy, "quality": options.quality, "triad": options.triad}
    run |= {"workload": options.workload, "max_tokens": max_tokens}
    return Bench(port, options.workload, max_tokens, options.raw, run)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="benchmarks.policy"
    )
    parser.add_argument("--part", choices=(*PARTS, "report"), nargs="+", default=["levels", "report"])
    parser.add_argument("--quick", action="store_true", help="few levels, settings and turns: 3 minutes")
    parser.add_argument("--workload", choices=WORKLOADS, default=WORKLOADS[0])
    parser.add_argument("--max-tokens", type=int, help=f"of an answer; by workload {MAX_TOKENS}")
    parser.add_argument("--quality", choices=("any", "lossless"), default="any", help="of cost_model or slo")
    parser.add_argument("--policy", default="cost_model", help="which policy `auto` follows")
    parser.add_argument(
        "--fixed", choices=list(FIXED), nargs="*", help="the settings; default all that the quality allows"
    )
    parser.add_argument("--levels", type=int, nargs="+", help="numbers of clients")
    parser.add_argument("--turns", type=int)
    parser.add_argument("--seconds", type=float, help="of one window; default 5")
    parser.add_argument("--step", type=float, help="seconds of a step of ramp and square; default 14")
    parser.add_argument("--triad", nargs="*", default=[], help="further key=value of its configuration")
    parser.add_argument("--raw", type=Path, default=RAW, help="rows are appended to this file")
    options = parser.parse_args()
    for name in ("max_tokens", "turns", "seconds", "step"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    if any(level < 1 for level in options.levels or ()):
        parser.error("--levels are numbers of clients, from 1 up")
    return options


if __name__ == "__main__":
    main()
