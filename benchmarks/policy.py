"""Policies against fixed modes: `python -m benchmarks.policy --part levels|ramp|square`.

A real server with the embedded checkpoint on one replica, and clients in a closed loop with held-out
prompts, on the same machine. Fixed modes are requests that pin their mode; `cost_model` and `threshold` are
servers of that policy. Within a part the contenders take turns, a window each, and that several times over.
`--where replica` leaves HTTP and Serve out: the replica is in this process. `--workload mixed` has every
second prompt one that the model has not learned to answer, so that its drafts seldom survive.

    levels   tokens/s and TPOT at steady concurrency
    ramp     1 -> 32 -> 1 clients, in steps, all contenders over the same minutes
    square   1 and 32 clients in turn

`--part report` writes the table and the plots from the raw rows (JSONL) of all parts run so far.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.load import PROMPTS as QUESTIONS
from benchmarks.load import Answered, LoadError, complete
from benchmarks.modes import held_out_prompts
from benchmarks.processes import Triad
from benchmarks.replica_alone import ReplicaAlone, replica_alone
from policies.modes import Mode
from replicas.messages import DecodingOptions

RESULTS = Path(__file__).parent / "results"
RAW = RESULTS / "policy-cpu.jsonl"
AUTO = ("cost_model", "threshold")
FIXED: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    **{
        f"self_speculation {block}": {"mode": "self_speculation", "block_length": block}
        for block in (8, 16, 32)
    },
    **{f"diffusion {block}": {"mode": "diffusion", "block_length": block} for block in (8, 16, 32)},
}
MODEL = "triad-5m"
TIMEOUT_S = 120.0
MAX_TOKENS = 200
LEVELS = (1, 2, 4, 8, 16, 32)
RAMP = (1, 2, 4, 8, 16, 32, 16, 8, 4, 2, 1)
SQUARE = (1, 32) * 3


@dataclass(frozen=True, slots=True)
class Row:
    """One contender's window; tpot is a token after the first, over the requests that ended in it."""

    where: str
    workload: str
    part: str
    contender: str
    concurrency: int
    turn: int
    began_s: float
    seconds: float
    tokens: float
    tokens_per_s: float
    tpot_p50_ms: float | None
    tpot_p95_ms: float | None
    num_requests: int
    num_errors: int


class Target(Protocol):
    async def complete(self, prompt: str, decoding: Mapping[str, Any]) -> Answered:
        """Answers one prompt. Raises LoadError or OSError."""
        ...

    async def prepare(self, contender: str) -> None:
        """Called before a window of this contender."""
        ...


class OverHttp:
    def __init__(self, port: int):
        self._port = port

    async def complete(self, prompt: str, decoding: Mapping[str, Any]) -> Answered:
        extra = {"ignore_eos": False, "decoding": decoding}
        return await complete(self._port, MODEL, prompt, MAX_TOKENS, extra)

    async def prepare(self, contender: str) -> None:
        pass


class InProcess:
    def __init__(self, replica: ReplicaAlone):
        self._replica = replica

    async def complete(self, prompt: str, decoding: Mapping[str, Any]) -> Answered:
        options = dict(decoding)
        mode = Mode(options.pop("mode")) if "mode" in options else None
        return await self._replica.complete(prompt, MAX_TOKENS, DecodingOptions(mode, **options))

    async def prepare(self, contender: str) -> None:
        if contender not in FIXED:
            self._replica.set_policy(contender)
        else:
            self._replica.set_policy("ar")


def texts() -> dict[str, list[str]]:
    """The prompts by workload.

    held-out: held-out ones of the embedded model's task families, which alternate
    mixed: the same with every second one a question that the model has not learned to answer, so that its
    drafts survive less often
    """
    known = held_out_prompts()
    foreign = [
        f"{opening}{question}"
        for opening in ("", "Please: ", "Tell me. ", "I ask you: ", "Now, ")
        for question in QUESTIONS
    ]
    mixed = [prompt for pair in zip(known, foreign, strict=False) for prompt in pair]
    return {"held-out": known, "mixed": mixed}


class Clients:
    """A closed loop of as many clients as are asked for."""

    def __init__(self, target: Target, prompts: list[str]):
        self._target = target
        self._prompts = itertools.cycle(prompts)

    async def run(
        self, decoding: Mapping[str, Any], concurrency: int, seconds: float
    ) -> tuple[list[Answered], int]:
        """Runs one window; returns the answers begun in it, waited for past its end, and how many failed."""
        answers: list[Answered] = []
        num_errors = 0
        ends_s = time.monotonic() + seconds

        async def client() -> None:
            nonlocal num_errors
            while time.monotonic() < ends_s:
                try:
                    async with asyncio.timeout(TIMEOUT_S):
                        answers.append(await self._target.complete(next(self._prompts), decoding))
                except (LoadError, OSError):
                    num_errors += 1

        await asyncio.gather(*(client() for _ in range(concurrency)))
        return answers, num_errors


async def window(
    clients: Clients, options: argparse.Namespace, contender: str, concurrency: int, turn: int
) -> Row:
    began_s = time.monotonic()
    answers, num_errors = await clients.run(FIXED.get(contender, {}), concurrency, options.seconds)
    elapsed_s = time.monotonic() - began_s
    tpots = sorted(1000.0 * (a.total_s - a.ttft_s) / (a.num_tokens - 1) for a in answers if a.num_tokens > 1)
    tokens = sum(a.num_tokens for a in answers)
    return Row(
        options.where,
        options.workload,
        options.part,
        contender,
        concurrency,
        turn,
        round(began_s, 3),
        round(elapsed_s, 3),
        tokens,
        round(tokens / elapsed_s, 1),
        round(statistics.median(tpots), 2) if tpots else None,
        round(tpots[int(0.95 * (len(tpots) - 1))], 2) if tpots else None,
        len(answers),
        num_errors,
    )


async def measure(target: Target, contenders: tuple[str, ...], options: argparse.Namespace) -> None:
    """Measures the contenders in turns.

    levels: contenders alternate at each concurrency, and each comes first in its turn. ramp, square: each
    runs its schedule whole.
    """
    clients = Clients(target, texts()[options.workload])
    await clients.run({}, 4, options.warmup)
    schedule = {"levels": options.levels, "ramp": RAMP, "square": SQUARE}[options.part]
    for turn in range(options.turns):
        order = [(name, c) for name in _rotated(contenders, turn) for c in schedule]
        if options.part == "levels":
            order = [
                (name, c) for step, c in enumerate(schedule) for name in _rotated(contenders, turn + step)
            ]
        for contender, concurrency in order:
            await target.prepare(contender)
            row = await window(clients, options, contender, concurrency, turn)
            print(f"{row.contender:<20} {concurrency:>3} {row.tokens_per_s:>8} tokens/s", flush=True)
            with options.raw.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")


def _rotated(contenders: tuple[str, ...], by: int) -> tuple[str, ...]:
    by %= len(contenders)
    return contenders[by:] + contenders[:by]


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        yield json.loads(line)


def report(raw: Path, folder: Path) -> str:
    """Returns the Markdown tables; the plots go into the folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_part: defaultdict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows_of(raw):
        by_part[row["where"], row["workload"], row["part"]].append(row)
    tables = []
    for (where, workload, part), rows in by_part.items():
        contenders = list(dict.fromkeys(row["contender"] for row in rows))
        figure, axes = pyplot.subplots(figsize=(8, 4.5))
        if part == "levels":
            levels = sorted({row["concurrency"] for row in rows})
            lines = [
                f"| tokens/s at concurrency | {' | '.join(map(str, levels))} |",
                "|---" * (len(levels) + 1) + "|",
            ]
            paces = [lines[0].replace("tokens/s", "TPOT p50 / p95, ms,"), lines[1]]
            for name in contenders:
                means = [_median(rows, name, level, "tokens_per_s") for level in levels]
                lines.append(f"| {name} | {' | '.join(f'{mean:,.0f}' for mean in means)} |")
                axes.plot(levels, means, marker="o", label=name, linewidth=3 if name in AUTO else 1)
                tpots = [
                    " / ".join(f"{_median(rows, name, c, f'tpot_{p}_ms'):.1f}" for p in ("p50", "p95"))
                    for c in levels
                ]
                paces.append(f"| {name} | {' | '.join(tpots)} |")
            lines += ["", *paces]
            axes.set_xscale("log", base=2)
            axes.set_xticks(levels, map(str, levels))
            axes.set_xlabel("clients, each with one request at a time")
        else:
            lines = [f"| {part} | tokens in the same time |", "|---|---|"]
            for name in contenders:
                own = [row for row in rows if row["contender"] == name]
                lines.append(f"| {name} | {sum(row['tokens'] for row in own):,.0f} |")
                axes.plot([row["tokens_per_s"] for row in own], marker="o", label=name)
            first = [row["concurrency"] for row in rows if row["contender"] == contenders[0]]
            axes.set_xticks(range(len(first)), map(str, first))
            axes.set_xlabel(f"clients, in windows of {rows[0]['seconds']:.0f} s, one after the other")
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"tokens/s ({where}, {workload} prompts)")
        axes.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(folder / f"policy-{where}-{workload}-{part}.png", dpi=120)
        pyplot.close(figure)
        tables.append("\n".join([f"{where}, {workload} prompts", "", *lines]))
    return "\n\n".join(tables)


def _median(rows: list[dict[str, Any]], contender: str, concurrency: int, what: str) -> float:
    found = [
        row[what]
        for row in rows
        if (row["contender"], row["concurrency"]) == (contender, concurrency) and row[what] is not None
    ]
    return statistics.median(found) if found else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=("levels", "ramp", "square", "report"), required=True)
    parser.add_argument("--where", choices=("http", "replica"), default="http")
    parser.add_argument("--workload", choices=("held-out", "mixed"), default="held-out")
    parser.add_argument("--policy", choices=AUTO, nargs="+", default=None)
    parser.add_argument("--fixed", choices=list(FIXED), nargs="*", default=list(FIXED))
    parser.add_argument("--levels", type=int, nargs="+", default=list(LEVELS))
    parser.add_argument("--seconds", type=float, default=6.0, help="of one window")
    parser.add_argument("--warmup", type=float, default=10.0, help="seconds at first, not counted")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--threads", type=int, help="of a replica in this process; default 1")
    parser.add_argument("--triad", nargs="*", default=[], help="further key=value of its configuration")
    parser.add_argument("--raw", type=Path, default=RAW, help="rows are appended to this file")
    options = parser.parse_args()
    if options.where == "replica" and options.triad:
        parser.error("--triad is for a server; a replica in this process takes --threads")
    if options.where == "http" and options.threads is not None:
        parser.error("--threads is for --where replica; for a server say --triad num_threads=N")
    if options.part == "report":
        print(report(options.raw, options.raw.parent))
    elif options.where == "replica":
        asyncio.run(measure_in_process((*(options.policy or AUTO), *options.fixed), options))
    else:
        for number, policy in enumerate(options.policy or AUTO):
            with Triad("num_replicas=1", f"policy={policy}", *options.triad) as server:
                contenders = (policy, *(options.fixed if number == 0 else ()))
                asyncio.run(measure(OverHttp(server.port), contenders, options))


async def measure_in_process(contenders: tuple[str, ...], options: argparse.Namespace) -> None:
    async with replica_alone(options.threads or 1) as replica:
        await measure(InProcess(replica), contenders, options)


if __name__ == "__main__":
    main()
