"""Loads a server and writes a report (docs/loadtest.md). Exits 1 if a gate breaks, 2 if it could not run."""

import argparse
import asyncio
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from loadtest.arrivals import read_trace
from loadtest.client import KEY_VARIABLE, Client, Stage, Target
from loadtest.gates import parse_gates
from loadtest.records import write_records
from loadtest.report import RunInfo, write_report
from loadtest.run import (
    LOSSLESS,
    Load,
    decoding_settings,
    levels,
    progress_to,
    run,
    served_model,
    shaped,
    user_levels,
)
from loadtest.server import own_server
from loadtest.shapes import parse_shape
from loadtest.slo import parse_slos
from loadtest.workloads import WORKLOADS, Workload, find_workload, pool, verified

PROG = "python -m loadtest"
DEFAULT_TIMELINE = "spike:low=4,high=32,duration_s=36"


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog=prog, description=__doc__)
    p.add_argument("--url", help="an OpenAI-compatible server; without it a Triad of its own is started")
    p.add_argument("--model", help="default: the first the server lists")
    p.add_argument(
        "--api-key",
        default=os.environ.get(KEY_VARIABLE),
        help=f"default: the environment's {KEY_VARIABLE}; of --url's server, an own one wants none",
    )
    p.add_argument("--out", type=Path, default=Path(".run/loadtest"), help="folder of the report")
    p.add_argument(
        "--workload",
        help=f"{', '.join(WORKLOADS)}, tasks:<family> (default tasks, of a trace `trace`)",
    )
    p.add_argument(
        "--slo",
        nargs="+",
        default=[],
        help="targets in seconds in place of the workload's: ttft=0.5,tpot=0.05 or class:e2e=20",
    )
    p.add_argument(
        "--settings",
        nargs="+",
        default=["auto", "ar", "self_speculation", "diffusion"],
        help="compared under the same arrivals: auto, lossless, a mode, or JSON of the decoding field",
    )
    p.add_argument(
        "--policies",
        nargs="+",
        default=["cost_model", "threshold"],
        help="of the own server, one after another; `auto` is measured under each",
    )
    p.add_argument("--replicas", type=int, default=1, help="of the own server")
    p.add_argument("--rates", type=float, nargs="*", default=[2, 8, 16, 32], help="open loop: requests/s")
    p.add_argument("--users", type=int, nargs="*", default=[], help="closed loop: users")
    p.add_argument("--seconds", type=float, default=10.0, help="of each level")
    p.add_argument("--pause", type=float, default=1.0, help="seconds of silence between levels")
    p.add_argument("--burstiness", type=float, default=1.0, help="1: Poisson; below: bursts")
    p.add_argument(
        "--timeline",
        default=DEFAULT_TIMELINE,
        help=f"a shape under which `auto` is watched (default {DEFAULT_TIMELINE}; 'none' for none)",
    )
    p.add_argument("--trace", type=Path, help="replay this JSONL trace instead of --rates")
    p.add_argument("--trace-unit", type=float, default=1.0, help="seconds in a unit of its timestamps")
    p.add_argument("--trace-speed", type=float, default=1.0)
    p.add_argument("--timeout", type=float, default=120.0, help="seconds of a request")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--verify",
        type=int,
        default=0,
        help="ask only so many prompts, whose texts must be those of ar alone",
    )
    p.add_argument("--gate", default="errors<=0.01", help="e.g. ttft_p95<=0.5,attained>=0.95,correct>=0.9")
    p.add_argument("--gate-up-to", type=float, help="gates hold at levels up to this (default: all)")
    return p


def loads_of(o: argparse.Namespace) -> list[Load]:
    if o.trace is not None:
        arrivals = read_trace(o.trace, unit_s=o.trace_unit, speed=o.trace_speed)
        return [Load(Stage("trace"), arrivals, duration_s=arrivals[-1].at_s, seed=o.seed)]
    return [
        *levels(o.rates, o.seconds, o.burstiness, o.seed),
        *user_levels(o.users, o.seconds, o.seed + 1000),
    ]


def workload_of(o: argparse.Namespace) -> Workload:
    """The workload that was asked for, with its SLOs. Raises ValueError and OSError."""
    found = find_workload(o.workload)
    classes = dict.fromkeys(found.slos)
    if o.trace is not None:
        arrivals = read_trace(o.trace)
        found.check_trace(arrivals)
        classes |= dict.fromkeys(a.class_name for a in arrivals if a.class_name)
    return replace(found, slos=found.slos | parse_slos(o.slo, classes or (found.name,)))


async def measure(o: argparse.Namespace, url: str, policy: str | None, info: RunInfo) -> None:
    """Loads the server and fills in info.

    policy: of the own server; in the settings' names `auto` becomes `auto (policy)`
    """
    workload = workload_of(o)
    async with Client(timeout_s=o.timeout) as client:
        model = o.model or await served_model(client, url, o.api_key)
        targets = [
            Target(f"auto ({policy})" if name == "auto" and policy else name, url, model, extra, o.api_key)
            for name, extra in decoding_settings(o.settings).items()
        ]
        if policy is not None and policy != o.policies[0]:
            targets = [target for target in targets if not target.extra]  # the others know no policy
        if o.verify:
            workload = await with_known_texts(client, targets[0], workload, o.verify, o.seed)
        loads = [(load, targets) for load in loads_of(o)]
        if o.timeline != "none":
            timeline = shaped("timeline", parse_shape(o.timeline), o.burstiness, o.seed + 2000)
            loads.append((timeline, targets[:1]))
        outcome = await run(client, loads, workload, on_line=progress_to(), pause_s=o.pause)
        info.model = model
        info.slos = workload.slos
        info.records += outcome.records
        info.observations.shifts += outcome.observations.shifts
        info.observations.running += outcome.observations.running


async def with_known_texts(
    client: Client, target: Target, workload: Workload, count: int, seed: int
) -> Workload:
    """Asks each of `count` prompts alone, one after another. Raises RuntimeError if one fails even so."""
    asks, texts = pool(workload, count, seed), []
    for ask in asks:
        record, text = await client.send(target, Stage("alone"), ask, client.now_s())
        if record.error is not None:
            raise RuntimeError(f"a request failed even alone: {record.error}: {record.message}")
        texts.append(text)
    return verified(workload, asks, texts)


def check_options(o: argparse.Namespace) -> None:
    """Checks the options before anything is started. Raises ValueError."""
    decoding_settings(o.settings)
    workload_of(o)
    if o.timeline != "none":
        parse_shape(o.timeline)
    if o.verify and not set(o.settings) <= set(LOSSLESS):
        raise ValueError(f"--verify needs settings whose text is fixed: {', '.join(LOSSLESS)}")
    if not 0 <= o.pause < math.inf:
        raise ValueError(f"--pause must be 0 or more seconds, not {o.pause:g}")
    if not loads_of(o):
        raise ValueError("there is no load: give --rates, --users or --trace")


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    o = parser(prog).parse_args(given)
    o.workload = o.workload or ("tasks" if o.trace is None else "trace")
    try:
        gates = parse_gates(o.gate)
        check_options(o)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    o.out.mkdir(parents=True, exist_ok=True)
    whose = "client and server" if o.url is None else "client"
    title, where = f"Load test: {o.workload}", f"{whose} on {machine()}"
    info = RunInfo(title=title, command=command_line(prog, given, o.api_key), machine=where)
    began = time.monotonic()
    try:
        if o.url is not None:
            asyncio.run(measure(o, o.url.rstrip("/"), None, info))
        else:
            for policy in o.policies:
                with ExitStack() as stack:
                    print(f"== starting Triad with policy {policy} ==", file=sys.stderr)
                    url = stack.enter_context(own_server(policy, o.out / f"server-{policy}.log", o.replicas))
                    asyncio.run(measure(o, url, policy, info))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    info.duration_s = time.monotonic() - began
    write_records(info.records, o.out / "records.jsonl")
    (o.out / "observations.json").write_text(json.dumps(info.observations.to_json()) + "\n")
    broken = write_report(info, o.out, gates, o.gate_up_to)
    print((o.out / "summary.txt").read_text())
    print((o.out / "overview.md").read_text())
    print(f"{o.out / 'report.html'} has the report")
    for line in broken:
        print(f"GATE BROKEN: {line}", file=sys.stderr)
    return 1 if broken else 0


def command_line(prog: str, arguments: Sequence[str], api_key: str | None) -> str:
    """The command line as typed, without the key, however that was given."""
    return " ".join(word.replace(api_key, "...") if api_key else word for word in (prog, *arguments))


def machine() -> str:
    """The machine this runs on; an own server runs there too."""
    name = platform.processor() or platform.machine()
    with Path("/proc/cpuinfo").open() as lines:
        name = next(
            (line.partition(": ")[2].strip() for line in lines if line.startswith("model name")), name
        )
    return f"{os.cpu_count()} cores, {name}, {platform.system()}"


if __name__ == "__main__":
    sys.exit(main())
