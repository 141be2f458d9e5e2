"""`python -m loadtest.compare URL_A URL_B`: two OpenAI-compatible servers side by side, turn about.

Both get the same requests at the same levels, one after the other, and the next turn begins with the other,
so that a machine which drifts drifts for both. Servers that share a machine are never loaded at once.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from loadtest.client import KEY_VARIABLE, Client, Target
from loadtest.metrics import Summary
from loadtest.records import Record, write_records
from loadtest.report import Row, rows_of, text_table
from loadtest.run import Load, Outcome, levels, progress_to, run, served_model, user_levels
from loadtest.workloads import WORKLOADS, find_workload

FIGURES: tuple[tuple[str, Callable[[Summary], float | None], float], ...] = (
    ("tok/s", lambda s: s.tokens_per_s, 1.0),
    ("req/s", lambda s: s.requests_per_s, 1.0),
    ("TTFT p50 ms", lambda s: s.ttft.p(50), 1000.0),
    ("TTFT p95 ms", lambda s: s.ttft.p(95), 1000.0),
    ("TPOT p50 ms", lambda s: s.tpot.p(50), 1000.0),
    ("chunk gap p95 ms", lambda s: s.inter_chunk.p(95), 1000.0),
    ("E2E p50 ms", lambda s: s.e2e.p(50), 1000.0),
    ("E2E p95 ms", lambda s: s.e2e.p(95), 1000.0),
)


def table(rows: Sequence[Row], names: tuple[str, str]) -> list[list[str]]:
    """A line a level and figure: A, B and A / B. For rates above 1 is better for A, for times below."""
    found: list[list[str]] = []
    by_stage: dict[str, dict[str, Summary]] = {}
    for row in rows:
        by_stage.setdefault(row.stage, {})[row.setting] = row.summary
    for stage, summaries in by_stage.items():
        a, b = (summaries[name] for name in names)
        for title, value, scale in FIGURES:
            left, right = value(a), value(b)
            ratio = f"{left / right:.2f}" if left is not None and right else "-"
            cells = ["-" if v is None else f"{v * scale:.4g}" for v in (left, right)]
            found.append([stage, title, *cells, ratio])
        found.append([stage, "errors", str(sum(a.errors.values())), str(sum(b.errors.values())), ""])
    return found


async def compare(
    client: Client, a: Target, b: Target, loads: Sequence[Load], workload_name: str, turns: int
) -> list[Record]:
    """The records of all turns together; A begins the first, B the second."""
    workload = find_workload(workload_name)
    outcome = Outcome()
    for turn in range(turns):
        pair = (a, b) if turn % 2 == 0 else (b, a)
        its = [replace(load, stage=replace(load.stage, turn=turn), seed=load.seed + turn) for load in loads]
        done = await run(client, [(load, pair) for load in its], workload, on_line=progress_to())
        outcome.records += done.records
    return outcome.records


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m loadtest.compare", description=__doc__)
    p.add_argument("url_a")
    p.add_argument("url_b")
    p.add_argument("--name-a", default="A")
    p.add_argument("--name-b", default="B")
    p.add_argument("--model-a", help="default: the first that A lists")
    p.add_argument("--model-b")
    for side in ("a", "b"):
        variable = f"{KEY_VARIABLE}_{side.upper()}"
        key = os.environ.get(variable)
        p.add_argument(f"--api-key-{side}", default=key, help=f"default: the environment's {variable}")
    p.add_argument("--extra-a", type=json.loads, default={}, help="JSON: more fields of each body to A")
    p.add_argument("--extra-b", type=json.loads, default={})
    p.add_argument("--workload", default="long_answer", help=f"{', '.join(WORKLOADS)}, tasks:<family>")
    p.add_argument("--users", type=int, nargs="*", default=[1, 4, 16], help="closed loop")
    p.add_argument("--rates", type=float, nargs="*", default=[], help="open loop, requests/s")
    p.add_argument("--seconds", type=float, default=8.0, help="of each level, server and turn")
    p.add_argument("--turns", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="folder for records.jsonl and comparison.md")
    return p


async def _main(o: argparse.Namespace) -> int:
    loads = [*levels(o.rates, o.seconds, 1.0, o.seed), *user_levels(o.users, o.seconds, o.seed)]
    async with Client() as client:
        targets = []
        for name, url, model, extra, key in (
            (o.name_a, o.url_a, o.model_a, o.extra_a, o.api_key_a),
            (o.name_b, o.url_b, o.model_b, o.extra_b, o.api_key_b),
        ):
            url = url.rstrip("/").removesuffix("/v1")
            targets.append(Target(name, url, model or await served_model(client, url, key), extra, key))
        records = await compare(client, targets[0], targets[1], loads, o.workload, o.turns)
    names = (o.name_a, o.name_b)
    head = ["load", "figure", *names, f"{o.name_a} / {o.name_b}"]
    body = table(rows_of(records, find_workload(o.workload).slos), names)
    print(text_table(head, body))
    if o.out is not None:
        o.out.mkdir(parents=True, exist_ok=True)
        write_records(records, o.out / "records.jsonl")
        lines = [head, ["---"] * len(head), *body]
        (o.out / "comparison.md").write_text("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    o = parser().parse_args(arguments)
    try:
        find_workload(o.workload)
        if o.name_a == o.name_b:
            raise ValueError("--name-a and --name-b must differ")
        if o.turns < 1 or not (o.users or o.rates):
            raise ValueError("give at least one turn, and --users or --rates")
        return asyncio.run(_main(o))
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
