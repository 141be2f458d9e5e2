"""`python -m policies.control.replay`: what another policy would have decided where this one did.

A recorded decision is a plan and the load it was made from. A replay gives the same loads, in order of
time and replica by replica, to any policy, whose state carries on as it would have. The loads stay as
recorded: only the simulator can say how the other plan would have changed them.

    python -m policies.control.replay export --redis-url redis://127.0.0.1:6379/0 --app triad > log.jsonl
    curl -s http://127.0.0.1:8000/v1/triad/state > state.json
    python -m policies.control.replay export --state state.json > log.jsonl
    python -m policies.control.replay decisions.jsonl --policy threshold --params '{"band": 0.5}'
"""

import argparse
import asyncio
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from policies.control.codec import DECISIONS, MalformedEntry
from policies.control.plan import DecisionRecord
from policies.control.store import LoadStore, StoreUnavailable
from policies.modes import DecodePlan
from policies.policy import Policy, Snapshot
from policies.registry import PolicyError, create_policy, policy_names

PROG = "python -m policies.control.replay"


class ReplayError(ValueError):
    """Raised for a log that can't be read; the message says where and why."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """One recorded decision and the other policy's on the same load."""

    record: DecisionRecord
    decode: DecodePlan
    """The other policy's plan."""
    reason: str
    """The other policy's reason."""

    @property
    def differs(self) -> bool:
        return self.decode != self.record.plan.decode


@dataclass(frozen=True, slots=True)
class Summary:
    """The counts of a replay."""

    num_decisions: int
    num_replicas: int
    num_different: int
    num_shifts_then: int
    """Changes of the recorded plan from one record of a replica to its next."""
    num_shifts_now: int
    """Changes of the other policy's plan, counted alike."""
    pairs: Mapping[tuple[str, str], int]
    """The number of times of each (recorded plan, other plan) that differ, most frequent first."""


def replay(records: Iterable[DecisionRecord], policy: Policy[Any]) -> list[Replayed]:
    """Replays records, in order of time, by another policy.

    The policy starts each replica from the plan that it ran before its first record. From then on the plan
    in force is the policy's own last one; its clock is the records'.
    """
    states: dict[str, Any] = {}
    plans: dict[str, DecodePlan | None] = {}
    replayed = []
    for record in sorted(records, key=lambda record: record.at_s):
        load, replica_id = record.load, record.load.replica_id
        if replica_id not in states:
            plans[replica_id] = load.decode
            states[replica_id] = policy.resume(load.decode, load.decode_held_s, record.at_s)
        snapshot = Snapshot(load, plans[replica_id])
        decision, states[replica_id] = policy.decide(snapshot, states[replica_id], record.at_s)
        plans[replica_id] = decision.decode
        replayed.append(Replayed(record, decision.decode, decision.reason))
    return replayed


def summarise(replayed: Sequence[Replayed]) -> Summary:
    pairs = Counter(
        (describe(item.record.plan.decode), describe(item.decode)) for item in replayed if item.differs
    )
    return Summary(
        num_decisions=len(replayed),
        num_replicas=len({item.record.load.replica_id for item in replayed}),
        num_different=sum(item.differs for item in replayed),
        num_shifts_then=_num_shifts(
            (item.record.load.replica_id, item.record.plan.decode) for item in replayed
        ),
        num_shifts_now=_num_shifts((item.record.load.replica_id, item.decode) for item in replayed),
        pairs=dict(pairs.most_common()),
    )


def _num_shifts(plans: Iterable[tuple[str, DecodePlan]]) -> int:
    before: dict[str, DecodePlan] = {}
    num = 0
    for replica_id, plan in plans:
        num += before.get(replica_id, plan) != plan
        before[replica_id] = plan
    return num


def describe(plan: DecodePlan) -> str:
    """Returns a plan's short name, still unambiguous: `ar`, `self_speculation/16`, `diffusion/32@0.9`,
    `diffusion/32@f0.1` by its factor, `diffusion/32@r0.02` by its risk."""
    if plan.block_length == 1:
        return plan.mode.value
    bound = ""
    if plan.mode.value == "diffusion":
        bounds = (("", plan.threshold), ("f", plan.factor), ("r", plan.risk))
        bound = "".join(f"@{kind}{value:g}" for kind, value in bounds if value is not None)
    return f"{plan.mode.value}/{plan.block_length}{bound}"


def read_log(lines: Iterable[str], name: str) -> list[DecisionRecord]:
    """Reads a log, one decision a line as `export` writes it; skips blank lines. Raises ReplayError."""
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(DECISIONS.decode(line))
        except MalformedEntry as error:
            raise ReplayError(
                f"{name}, line {number}: not a decision as this module's export writes it "
                f"({str(error).splitlines()[0]})"
            ) from error
    return records


def from_state(text: str) -> list[DecisionRecord]:
    """Returns the decisions in an answer of GET /v1/triad/state, oldest first. Raises ReplayError."""
    try:
        decisions = json.loads(text)["decisions"]
    except (ValueError, KeyError, TypeError) as error:
        raise ReplayError(f"not an answer of /v1/triad/state ({error!r})") from error
    if decisions is None:
        raise ReplayError("the state has no decisions: the server had lost its store")
    lines = [json.dumps({"v": 1, "body": decision}) for decision in decisions]
    return read_log(reversed(lines), "the state")


async def from_redis(url: str, app: str) -> list[DecisionRecord]:
    """Reads all decisions in an app's stream, oldest first. Raises StoreUnavailable, ValueError."""
    store = LoadStore(url, app)
    try:
        return list(reversed(await store.recent_decisions()))
    finally:
        await store.close()


def table(replayed: Sequence[Replayed], num_rows: int) -> Iterator[str]:
    """Yields the lines of a report: the counts, then the first `num_rows` decisions that differ."""
    summary = summarise(replayed)
    yield (
        f"{summary.num_decisions} decisions of {summary.num_replicas} replicas; "
        f"{summary.num_different} differ; shifts: {summary.num_shifts_then} recorded, "
        f"{summary.num_shifts_now} replayed"
    )
    if not summary.num_different:
        return
    yield ""
    yield f"{'recorded':<24} {'replayed':<24} {'times':>6}"
    for (then, now), count in summary.pairs.items():
        yield f"{then:<24} {now:<24} {count:>6}"
    yield ""
    yield f"{'at s':>14} {'replica':<12} {'in flight':>9} {'recorded':<22} {'replayed':<22} why"
    different = [item for item in replayed if item.differs]
    for item in different[:num_rows]:
        record = item.record
        yield (
            f"{record.at_s:>14.2f} {record.load.replica_id:<12} {record.load.num_in_flight:>9} "
            f"{describe(record.plan.decode):<22} {describe(item.decode):<22} {item.reason}"
        )
    if len(different) > num_rows:
        yield f"... and {len(different) - num_rows} more (--rows)"


def main(arguments: Sequence[str] | None = None, prog: str = PROG, out: TextIO | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    out = out or sys.stdout
    try:
        return _export(prog, given[1:], out) if given[:1] == ["export"] else _replay(prog, given, out)
    except (ReplayError, PolicyError, StoreUnavailable, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The arguments of a replay; those of `export` are its own."""
    found = argparse.ArgumentParser(
        prog,
        description="What another policy would have decided where this one did.",
        epilog=f"The log is made by `{prog} export`.",
    )
    found.add_argument("log", metavar="LOG", help="JSON lines, as `export` writes them; - is standard input")
    found.add_argument("--policy", required=True, help=f"{', '.join(policy_names())}, or a dotted class name")
    found.add_argument("--params", default="{}", help="the policy's parameters, a JSON object")
    found.add_argument("--rows", type=int, default=20, help="decisions to show of those that differ")
    return found


def _replay(prog: str, arguments: Sequence[str], out: TextIO) -> int:
    options = parser(prog).parse_args(arguments)
    policy = create_policy(options.policy, _parameters(options.params))
    if options.log == "-":
        records = read_log(sys.stdin, "standard input")
    else:
        records = read_log(Path(options.log).read_text().splitlines(), options.log)
    for line in table(replay(records, policy), options.rows):
        print(line, file=out)
    return 0


def _parameters(text: str) -> Mapping[str, Any]:
    try:
        parameters = json.loads(text)
    except ValueError as error:
        raise ReplayError(f'--params must be a JSON object, such as {{"band": 0.5}} ({error})') from error
    if not isinstance(parameters, dict):
        raise ReplayError(f'--params must be a JSON object, such as {{"band": 0.5}}, got {text}')
    return parameters


def _export(prog: str, arguments: Sequence[str], out: TextIO) -> int:
    parser = argparse.ArgumentParser(
        f"{prog} export",
        description="Writes the recorded decisions as JSON lines, oldest first.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--redis-url", metavar="URL", help="the app's Redis; all its stream holds")
    source.add_argument(
        "--state", metavar="FILE", help="an answer of GET /v1/triad/state; - is standard input"
    )
    parser.add_argument("--app", default="triad", help="the app's name in Redis")
    options = parser.parse_args(arguments)
    if options.redis_url is not None:
        records = asyncio.run(from_redis(options.redis_url, options.app))
    else:
        text = sys.stdin.read() if options.state == "-" else Path(options.state).read_text()
        records = from_state(text)
    for record in records:
        print(DECISIONS.encode(record), file=out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
