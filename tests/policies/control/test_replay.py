import io
import json
import threading

import pytest

from policies.control.codec import DECISIONS
from policies.control.plan import DecisionRecord, ReplicaPlan
from policies.control.replay import ReplayError, describe, from_state, main, read_log, replay, summarise
from policies.control.store import PlanWrite
from policies.modes import DecodePlan, Mode
from policies.registry import create_policy
from router.state import plain
from tests.policies.helpers import a_load, drive

AR, DIFFUSION = DecodePlan(Mode.AR), DecodePlan(Mode.DIFFUSION, 16)
EIGHT = {"levels": [{"max_in_flight": 8, "mode": "diffusion", "block_length": 16}]}
STILL = {"dwell_s": 0.0}


def a_record(at_s, num_in_flight, plan=AR, replica_id="r1", **changes):
    load = a_load(num_in_flight, replica_id, **changes)
    return DecisionRecord(ReplicaPlan(1, plan, "ar", "fixed to ar"), load, True, "c", at_s)


def recorded(policy, loads, replica_id="r1"):
    """What a controller with this policy would have logged, one decision a second."""
    ticks = [(float(index), a_load(num, replica_id)) for index, num in enumerate(loads)]
    return [
        DecisionRecord(ReplicaPlan(1, decision.decode, policy.name, decision.reason), load, True, "c", now_s)
        for (now_s, decision), (_, load) in zip(drive(policy, ticks), ticks, strict=True)
    ]


def test_the_policy_that_decided_decides_the_same_again():
    loads = [1, 3, 9, 20, 20, 6, 6, 5, 1, 0, 9]
    log = [
        *recorded(create_policy("threshold"), loads),
        *recorded(create_policy("threshold"), loads[::-1], "r2"),
    ]
    replayed = replay(reversed(log), create_policy("threshold"))
    assert summarise(replayed).num_different == 0
    assert summarise(replayed).num_shifts_then == summarise(replayed).num_shifts_now > 0


def test_another_policy_differs_where_it_differs():
    log = [a_record(0.0, 1), a_record(1.0, 20), a_record(2.0, 1), a_record(0.5, 1, replica_id="r2")]
    summary = summarise(replay(log, create_policy("threshold", {**EIGHT, "stabilise": STILL})))
    assert (summary.num_decisions, summary.num_replicas, summary.num_different) == (4, 2, 3)
    assert (summary.num_shifts_then, summary.num_shifts_now) == (0, 2)
    assert summary.pairs == {("ar", "diffusion/16@f0.1"): 3}


def test_plans_have_short_names():
    plans = [
        AR,
        DecodePlan(Mode.SELF_SPECULATION, 8),
        *(DecodePlan(Mode.DIFFUSION, 16, **bound) for bound in ({"threshold": 0.9}, {}, {"risk": 0.02})),
    ]
    assert [*map(describe, plans)] == [
        "ar",
        "self_speculation/8",
        "diffusion/16@0.9",
        "diffusion/16@f0.1",
        "diffusion/16@r0.02",
    ]


def test_state_carries_on_from_record_to_record():
    """The dwell counts from the plan the replica had held, and then from the policy's own shifts."""
    params = {**EIGHT, "stabilise": {"dwell_s": 2.0}}
    log = [
        a_record(at_s, num, DIFFUSION, **running)
        for at_s, num, running in (
            (10.0, 20, {"decode": DIFFUSION, "decode_held_s": 1.5}),
            (11.0, 20, {}),
            (12.0, 1, {}),
            (13.5, 1, {}),
        )
    ]
    plans = [item.decode for item in replay(log, create_policy("threshold", params))]
    assert plans == [DIFFUSION, AR, AR, DIFFUSION]


def run(*arguments):
    out = io.StringIO()
    status = main(arguments, out=out)
    return status, out.getvalue()


def test_the_table_counts_and_shows(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(DECISIONS.encode(a_record(float(at_s), 1)) for at_s in range(5)) + "\n\n")
    status, text = run(str(log), "--policy", "threshold", "--params", json.dumps(EIGHT), "--rows", "2")
    assert status == 0
    assert text.startswith("5 decisions of 1 replicas; 5 differ; shifts: 0 recorded, 0 replayed\n")
    assert text.count("on the level up to 8") == 2
    assert "and 3 more" in text
    assert run(str(log), "--policy", "ar")[1] == (
        "5 decisions of 1 replicas; 0 differ; shifts: 0 recorded, 0 replayed\n"
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("LOG", "--policy", "nope"), "unknown policy 'nope'"),
        (("LOG", "--policy", "threshold", "--params", "[1]"), "must be a JSON object"),
        (("LOG", "--policy", "threshold", "--params", '{"bond": 1}'), "bond"),
        (("BAD", "--policy", "ar"), "line 2: not a decision"),
        (("MISSING", "--policy", "ar"), "No such file"),
        (("export", "--redis-url", "http://x"), "start it with one of redis://"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, capsys, arguments, complaint):
    good = DECISIONS.encode(a_record(0.0, 1))
    files = {"LOG": good, "BAD": f"{good}\n{{}}\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    paths = [str(tmp_path / name) if name in (*files, "MISSING") else name for name in arguments]
    assert run(*paths)[0] == 2
    assert complaint in capsys.readouterr().err


def test_decisions_of_the_state_page_replay():
    record = a_record(12.25, 3, running_by_mode={Mode.AR: 3}, decode=DIFFUSION)
    state = json.dumps({"decisions": plain([record])})
    assert from_state(state) == [record]
    with pytest.raises(ReplayError, match="lost its store"):
        from_state('{"decisions": null}')
    with pytest.raises(ReplayError, match="not an answer"):
        from_state("[]")


async def test_export_reads_the_stream(store, server, app):
    lease = await store.acquire_lease("c")
    records = [a_record(0.0, num) for num in (1, 2, 3)]
    assert await store.commit(lease, {"r1": PlanWrite(records[0].plan)}, (), records)
    outcome = []
    export = ("export", "--redis-url", server.url, "--app", app)
    thread = threading.Thread(target=lambda: outcome.append(run(*export)))  # it has a loop of its own
    thread.start()
    thread.join()
    ((status, text),) = outcome
    read = read_log(text.splitlines(), "log")
    assert status == 0
    assert [record.load for record in read] == [record.load for record in records]
    assert all(record.at_s > 0 for record in read)
