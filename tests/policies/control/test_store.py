import asyncio
import socket
import time

import pytest

from policies.control.plan import DecisionRecord, ReplicaPlan
from policies.control.store import (
    LEARNED_EXPIRY_S,
    MAX_DECISIONS,
    Lease,
    LoadStore,
    PlanWrite,
    StoreUnavailable,
)
from policies.modes import DecodePlan, Mode
from policies.replica_load import Freshness
from tests.policies.helpers import a_load, eventually
from tests.stores import patient_store

AR = DecodePlan(Mode.AR)
FULL_LOAD = a_load(
    3,
    waiting_prompt_tokens=17,
    running_by_mode={Mode.AR: 1, Mode.DIFFUSION: 2},
    tokens_per_forward={Mode.DIFFUSION: 2.5},
    tokens_per_s=123.5,
    plan_version=4,
    decode=DecodePlan(Mode.DIFFUSION, 16, 0.8),
    decode_held_s=1.5,
    modes=(Mode.AR, Mode.DIFFUSION),
)


def a_plan(version=1, decode=AR, **changes):
    return ReplicaPlan(version, decode, "threshold", "because", **changes)


def a_write(version=1, held_s=0.0):
    return PlanWrite(a_plan(version), held_s)


async def held_lease(store, owner="a"):
    lease = await store.acquire_lease(owner)
    assert lease is not None
    return lease


async def test_a_load_comes_back_as_published(store):
    assert await store.publish_and_read(FULL_LOAD) is None
    (seen,) = (await store.read_loads()).replicas
    assert seen.load == FULL_LOAD
    assert seen.freshness is Freshness.FRESH


async def test_loads_are_ordered_by_id_and_the_last_one_counts(store):
    for replica_id, num in (("b", 1), ("a", 2), ("b", 3)):
        await store.publish_and_read(a_load(num, replica_id))
    loads = (await store.read_loads()).replicas
    assert [(seen.load.replica_id, seen.load.num_in_flight) for seen in loads] == [("a", 2), ("b", 3)]


async def test_what_one_kind_of_replica_learned_is_kept_apart_from_anothers(store, raw):
    assert await store.read_learned("a") is None
    await store.write_learned("a", "first")
    await store.write_learned("a", "then")
    await store.write_learned("b", "other")
    assert (await store.read_learned("a"), await store.read_learned("b")) == ("then", "other")
    keys = [key async for key in raw.scan_iter("*learned*")]
    assert len(keys) == 2
    assert all([0 < await raw.ttl(key) <= LEARNED_EXPIRY_S for key in keys])


async def test_publishing_is_one_command(store, raw):
    """One round trip a period, whatever happens inside the server."""
    await store.publish_and_read(a_load())
    before = (await raw.info("commandstats"))["cmdstat_eval"]["calls"]
    await store.publish_and_read(a_load())
    assert (await raw.info("commandstats"))["cmdstat_eval"]["calls"] == before + 1


async def test_ages_are_by_the_servers_clock(store, raw, app, monkeypatch):
    """A reader whose own clock is an hour off sees the same age."""
    await store.publish_and_read(a_load())
    seconds, micros = await raw.time()
    await raw.hset(f"triad:{{{app}}}:load:r1", "at", (seconds - 3) * 1_000_000 + micros)
    monkeypatch.setattr(time, "time", lambda: 3600.0)
    (seen,) = (await store.read_loads()).replicas
    assert 3.0 <= seen.age_s < 4.0
    assert seen.freshness is Freshness.STALE


async def test_a_load_is_as_old_as_the_forward_it_was_measured_before(store):
    """However lately a replica whose engine hangs has said it."""
    await store.publish_and_read(a_load(1, "hung", silent_s=3.0))
    await store.publish_and_read(a_load(1, "well", silent_s=0.01))
    hung, well = (await store.read_loads()).replicas
    assert (hung.freshness, well.freshness) == (Freshness.STALE, Freshness.FRESH)
    await store.publish_and_read(a_load(1, "hung", silent_s=5.5))
    assert (await store.read_loads()).by_id()["hung"].freshness is Freshness.LOST


async def test_what_was_written_before_the_clock_was_set_back_does_not_look_fresh(store, raw, app):
    """As what a replica has left that died just then: it is as old as its stamp is ahead."""
    await store.publish_and_read(a_load(1, "dead"))
    await store.publish_and_read(a_load(1, "alive"))
    await raw.hincrby(f"triad:{{{app}}}:load:dead", "at", 3600 * 1_000_000)
    await raw.zincrby(f"triad:{{{app}}}:replicas", 3600 * 1_000_000, "dead")
    alive, dead = (await store.read_loads()).replicas
    assert (alive.freshness, dead.freshness) == (Freshness.FRESH, Freshness.LOST)


async def test_a_load_expires_after_it_was_lost_for_a_while(store, raw, app):
    await store.publish_and_read(a_load())
    assert 5000 < await raw.pttl(f"triad:{{{app}}}:load:r1") <= 6000


async def test_the_index_of_replicas_forgets_those_that_stopped(store, raw, app):
    index = f"triad:{{{app}}}:replicas"
    await store.publish_and_read(a_load(replica_id="gone"))
    await raw.zadd(index, {"gone": 1})
    await store.publish_and_read(a_load(replica_id="here"))
    assert await raw.zrange(index, 0, -1) == ["here"]


async def test_a_withdrawn_replica_is_gone_at_once(store, raw, app):
    lease = await held_lease(store)
    await store.publish_and_read(a_load())
    await store.commit(lease, {"r1": a_write()})
    await store.withdraw("r1")
    assert (await store.read_loads()).replicas == ()
    assert await raw.keys(f"triad:{{{app}}}:*") == [f"triad:{{{app}}}:leader"]


async def test_a_plan_reaches_its_replica(store):
    lease = await held_lease(store)
    plan = a_plan(version=3, decode=DecodePlan(Mode.DIFFUSION, 32, 0.7), input_age_s=0.25)
    assert await store.commit(lease, {"r1": PlanWrite(plan, held_s=4.0)})
    seen = await store.publish_and_read(a_load())
    assert seen.plan == plan
    assert seen.age_s < 1.0
    assert 4.0 <= seen.held_s < 5.0
    view = await store.read_view()
    assert view.plans["r1"].plan == plan
    assert view.leader == "a"


async def test_confirming_makes_a_plan_young_again_but_not_newly_held(store, raw, app):
    key = f"triad:{{{app}}}:plan:r1"
    lease = await held_lease(store)
    await store.commit(lease, {"r1": a_write()})
    await raw.hset(key, mapping={"at": 1, "since": 1})
    await raw.pexpire(key, 1000)
    assert (await store.publish_and_read(a_load())).is_stale
    await store.commit(lease, {}, confirmed=["r1", "unknown"])
    seen = await store.publish_and_read(a_load())
    assert not seen.is_stale
    assert seen.held_s > 1e6
    assert await raw.pttl(key) > 50_000
    assert not await raw.exists(f"triad:{{{app}}}:plan:unknown")


async def test_only_one_has_the_lease(store):
    lease = await held_lease(store, "a")
    assert await store.acquire_lease("b") is None
    assert await store.commit(lease, {})
    await store.release_lease(lease)
    assert not await store.commit(lease, {})
    successor = await held_lease(store, "b")
    assert successor.fencing > lease.fencing
    await store.release_lease(lease)
    assert (await store.read_view()).leader == "b"


async def test_who_commits_keeps_the_lease(store, raw, app):
    lease = await held_lease(store, "a")
    key = f"triad:{{{app}}}:leader"
    await raw.pexpire(key, 400)
    assert await store.commit(lease, {})
    assert await raw.pttl(key) > 400


async def test_a_dead_leaders_lease_is_free_within_2_s(store):
    await held_lease(store, "dead")
    started_s = time.monotonic()
    await eventually(lambda: store.acquire_lease("b"), lambda lease: lease is not None, timeout_s=2.0)
    assert time.monotonic() - started_s > 1.0


async def test_what_an_older_lease_writes_is_refused_whole(store):
    old = await held_lease(store, "a")
    await store.release_lease(old)
    new = await held_lease(store, "b")
    assert await store.commit(new, {"r1": a_write(version=1)})
    record = DecisionRecord(a_plan(9), a_load(), True, "a")
    assert not await store.commit(old, {"r1": a_write(version=9)}, ["r1"], [record])
    assert (await store.publish_and_read(a_load())).plan.version == 1
    assert await store.recent_decisions() == ()


async def test_the_same_owner_with_an_older_lease_is_refused_too(store):
    old = await held_lease(store, "a")
    await store.release_lease(old)
    await held_lease(store, "a")
    assert not await store.commit(old, {"r1": a_write()})


async def test_decisions_are_logged_newest_first_with_the_servers_time(store, raw):
    lease = await held_lease(store)
    records = [DecisionRecord(a_plan(version), FULL_LOAD, True, "a") for version in (1, 2, 3)]
    await store.commit(lease, {}, decisions=records)
    newest, second = await store.recent_decisions(2)
    assert (newest.plan.version, second.plan.version) == (3, 2)
    assert newest.load == FULL_LOAD
    assert abs(newest.at_s - (await raw.time())[0]) < 2


async def test_the_log_is_capped(store, raw, app):
    lease = await held_lease(store)
    records = [DecisionRecord(a_plan(version), a_load(), True, "a") for version in range(MAX_DECISIONS + 50)]
    await store.commit(lease, {}, decisions=records)
    assert await raw.xlen(f"triad:{{{app}}}:decisions") == MAX_DECISIONS
    assert (await store.recent_decisions())[-1].plan.version == 50


@pytest.mark.parametrize(
    "fields",
    [
        {"body": "no json", "at": "1"},
        {"body": '{"v":2,"body":{}}', "at": "1"},
        {"body": '{"v":1,"body":{"replica_id":"bad"}}', "at": "1"},
        {"body": b"\xff\xfe", "at": "1"},
        {"body": '{"v":1,"body":{"replica_id":"bad"', "at": "x"},
    ],
    ids=["text", "another version", "fields missing", "not utf-8", "cut off"],
)
async def test_a_malformed_load_is_skipped_and_counted(store, raw, app, fields):
    for replica_id in ("bad", "good"):
        await store.publish_and_read(a_load(1, replica_id))
    await raw.hset(f"triad:{{{app}}}:load:bad", mapping=fields)
    (seen,) = (await store.read_loads()).replicas
    assert seen.load.replica_id == "good"
    assert store.num_malformed == 1
    await store.publish_and_read(a_load(1, "bad"))
    assert len((await store.read_loads()).replicas) == 2


async def test_entries_of_the_wrong_type_or_place_are_malformed_too(store, raw, app):
    prefix = f"triad:{{{app}}}:"
    for replica_id in ("moved", "typed", "good"):
        await store.publish_and_read(a_load(1, replica_id))
    await raw.hset(f"{prefix}load:moved", "body", await raw.hget(f"{prefix}load:good", "body"))
    await raw.set(f"{prefix}load:typed", "a string")
    await raw.set(f"{prefix}plan:good", "a string")
    view = await store.read_view()
    assert [seen.load.replica_id for seen in view.loads.replicas] == ["good"]
    assert view.plans == {}
    assert store.num_malformed == 3


async def test_unknown_keys_are_ignored_and_missing_ones_take_their_defaults(store, raw, app):
    await store.publish_and_read(a_load(2))
    body = (
        '{"v":1,"body":{"replica_id":"r1","num_running":2,"num_waiting":0,"num_auto":2,"max_running":8,'
        '"pages_used":2,"num_pages":100,"from_a_later_version":[1,2]}}'
    )
    await raw.hset(f"triad:{{{app}}}:load:r1", "body", body)
    (seen,) = (await store.read_loads()).replicas
    assert seen.load == a_load(2)


async def test_a_malformed_plan_is_no_plan_and_is_written_over(store, raw, app):
    lease = await held_lease(store)
    await raw.set(f"triad:{{{app}}}:plan:r1", "a string")
    assert await store.publish_and_read(a_load()) is None
    assert await store.commit(lease, {"r1": a_write()}, confirmed=["r1"])
    assert (await store.publish_and_read(a_load())).plan == a_plan()


async def test_apps_do_not_see_each_other(store, server, app):
    other = patient_store(server.url, f"{app}-other")
    await store.publish_and_read(a_load())
    assert (await other.read_loads()).replicas == ()
    assert await other.acquire_lease("b") is not None
    assert await store.acquire_lease("a") is not None
    await other.close()


async def test_every_method_says_the_store_is_unavailable():
    with socket.socket() as unbound:
        unbound.bind(("127.0.0.1", 0))
        store = LoadStore(f"redis://127.0.0.1:{unbound.getsockname()[1]}/0")
        lease = Lease("a", 1)
        for call in (
            store.publish_and_read(a_load()),
            store.withdraw("r1"),
            store.read_loads(),
            store.read_view(),
            store.acquire_lease("a"),
            store.release_lease(lease),
            store.commit(lease, {}),
            store.recent_decisions(),
        ):
            with pytest.raises(StoreUnavailable):
                await call
        await store.close()


async def test_a_server_that_does_not_answer_is_unavailable_within_a_second():
    async def say_nothing(reader, writer):
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    store = LoadStore(f"redis://127.0.0.1:{port}/0")
    started_s = time.monotonic()
    with pytest.raises(StoreUnavailable):
        await store.read_loads()
    assert time.monotonic() - started_s < 1.5
    await store.close()
    silent.close()


async def test_a_wrong_password_is_unavailable(server):
    store = LoadStore(f"redis://:wrong@127.0.0.1:{server.port}/0")
    with pytest.raises(StoreUnavailable, match=r"WRONGPASS|invalid"):
        await store.read_loads()
    await store.close()


def test_a_url_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="redis://"):
        LoadStore("http://127.0.0.1")


async def test_a_call_cancelled_at_any_moment_ends_cancelled(store):
    """Also as the client has just written, where asyncio.wait_for loses it up to Python 3.11."""
    for num_ticks in range(60):
        call = asyncio.create_task(store.read_loads())
        for _ in range(num_ticks):
            await asyncio.sleep(0)
        if call.cancel():
            with pytest.raises(asyncio.CancelledError):
                await call
    assert (await store.read_loads()).replicas == ()
