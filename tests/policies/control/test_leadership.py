"""Controllers in processes of their own, killed and paused."""

import contextlib
import signal
from itertools import pairwise

import pytest

from policies.modes import Mode
from tests.policies.control.processes import start_module
from tests.policies.helpers import a_load, eventually


@pytest.fixture
def start(server, app):
    with contextlib.ExitStack() as processes:
        yield lambda name: processes.enter_context(start_module("controller_process", server.url, app, name))


@pytest.fixture
def leader(store):
    """Waits until somebody leads, other than the one named; returns its short name."""

    async def lead(other_than=None, timeout_s=2.0):
        def name_in(view):
            return (view.leader or "").partition("-")[0]

        view = await eventually(
            store.read_view, lambda view: name_in(view) not in ("", other_than), timeout_s
        )
        return name_in(view)

    return lead


async def shift(store, num_in_flight, mode):
    """Publish a load, again and again as a replica does, until the plan is as it should be."""
    load = a_load(num_in_flight)
    return await eventually(
        lambda: store.publish_and_read(load), lambda seen: seen is not None and seen.plan.decode.mode is mode
    )


async def test_a_killed_leader_is_replaced_within_2_s_and_nothing_shifts(store, start, leader):
    first, _ = start("a"), start("b")
    assert await leader() == "a"
    before = await shift(store, 20, Mode.AR)
    first.kill()
    assert await leader(other_than="a", timeout_s=2.0) == "b"
    # Time for the successor to do wrong: it has confirmed the plan, and changed nothing in it.
    await store.publish_and_read(a_load(20))
    seen = await eventually(
        lambda: store.publish_and_read(a_load(20)), lambda seen: seen is not None and seen.age_s < 0.2
    )
    assert seen.plan == before.plan


async def test_a_paused_leader_never_writes_over_its_successor(store, start, leader):
    processes = {name: start(name) for name in ("a", "b")}
    paused = await leader()
    await shift(store, 1, Mode.DIFFUSION)
    await shift(store, 20, Mode.AR)

    processes[paused].send_signal(signal.SIGSTOP)
    successor = await leader(other_than=paused)
    await shift(store, 1, Mode.DIFFUSION)
    processes[paused].send_signal(signal.SIGCONT)
    for num_in_flight, mode in [(20, Mode.AR), (1, Mode.DIFFUSION)] * 4:
        await shift(store, num_in_flight, mode)

    log = list(reversed(await store.recent_decisions()))
    leaders = [record.leader.partition("-")[0] for record in log]
    assert leaders == sorted(leaders, key=[paused, successor].index)
    assert set(leaders) == {paused, successor}
    versions = [record.plan.version for record in log if record.changed]
    assert all(later == earlier + 1 for earlier, later in pairwise(versions))
