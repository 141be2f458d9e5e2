"""A policy set at run time: followed by all, kept over a leader's death and a store's."""

import asyncio
import os
import signal
from typing import Any

import pytest

from policies.control.controller import Controller
from policies.control.plan_sync import PlanFollower
from policies.control.policy_setting import PolicyChoice, PolicyWatch, read_setting, write_setting
from policies.control.store import LoadStore, StoreUnavailable
from policies.modes import Mode
from policies.policy import Policy
from policies.registry import PolicyError, create_policy
from tests.eventually import eventually
from tests.policies.helpers import a_load
from tests.stores import patient_store

AR = PolicyChoice("ar")
SPECULATE = PolicyChoice("fixed", {"mode": "self_speculation", "block_length": 8})


def watch_of(store: LoadStore) -> tuple[PolicyWatch, list[Policy[Any]]]:
    changes: list[Policy[Any]] = []
    return PolicyWatch(store, PolicyChoice("threshold"), changes.append), changes


async def test_what_one_sets_all_follow(store):
    (one, ones), (other, others) = watch_of(store), watch_of(store)
    await one.step()
    assert one.in_force == PolicyChoice("threshold")
    setting = await one.set(AR)
    await other.step()
    assert [policy.name for policy in (*ones, *others)] == ["fixed", "fixed"]
    assert other.setting == setting
    again = await other.set(None)
    await one.step()
    assert again.version > setting.version
    assert one.in_force == one.configured
    assert [policy.name for policy in ones] == ["fixed", "threshold"]


async def test_setting_the_same_again_changes_nothing(store):
    watch, changes = watch_of(store)
    await watch.set(AR)
    await watch.set(AR)
    await watch.step()
    assert len(changes) == 1


async def test_a_wrong_policy_is_refused_and_not_stored(store):
    watch, changes = watch_of(store)
    with pytest.raises(PolicyError):
        await watch.set(PolicyChoice("threshold", {"levles": []}))
    assert await read_setting(store) is None
    assert changes == []


async def test_a_setting_that_can_not_be_used_here_is_passed_over(store):
    """What is decided by is told, and another setting of the same kind is tried again."""
    watch, changes = watch_of(store)
    await write_setting(store, PolicyChoice("a.newer.Policy"))
    await watch.step()
    assert changes == []
    assert watch.in_force == watch.configured
    await watch.set(AR)
    await write_setting(store, PolicyChoice("a.newer.Policy"))
    await watch.step()
    assert watch.in_force == AR
    await watch.set(None)
    assert watch.in_force == watch.configured
    assert [policy.name for policy in changes] == ["fixed", "threshold"]


async def test_garbage_in_the_store_is_no_setting(store, raw, app):
    watch, changes = watch_of(store)
    for entry in ({"body": "{", "version": "5"}, {"body": '{"policy": "ar"}', "version": "x"}):
        await raw.hset(f"triad:{{{app}}}:policy", mapping=entry)
        await watch.step()
    await raw.delete(f"triad:{{{app}}}:policy")
    await raw.set(f"triad:{{{app}}}:policy", "text")
    await watch.step()
    assert changes == []
    await watch.set(AR)
    assert (await read_setting(store)).choice == AR


async def test_a_store_that_lost_its_data_is_given_the_setting_back(own_server):
    store = patient_store(own_server.url)
    watch, changes = watch_of(store)
    setting = await watch.set(AR)
    before = own_server.pid
    os.kill(before, signal.SIGKILL)
    with pytest.raises(StoreUnavailable):
        await read_setting(store)
    await watch.step()  # without a store: what is set stays
    assert watch.in_force == AR

    async def restored() -> bool:
        await watch.step()
        try:
            return await read_setting(store) == setting
        except StoreUnavailable:
            return False

    await eventually(restored, within_s=10.0, every_s=0.05)
    assert len(changes) == 1
    await store.close()


async def test_the_controller_and_the_replica_decide_by_it_and_a_new_leader_too(store):
    def controller() -> tuple[Controller, PolicyWatch]:
        made = Controller(store, create_policy("diffusion"))
        return made, PolicyWatch(store, PolicyChoice("diffusion"), made.set_policy)

    leader, watch = controller()
    follower = PlanFollower(store, create_policy("diffusion"), lambda: a_load(1))
    await follower.step()
    await leader.step()
    assert (await follower.step()).decode.mode is Mode.DIFFUSION
    await watch.set(SPECULATE)
    await leader.step()
    plan = await follower.step()
    assert (plan.decode.mode, plan.decode.block_length) == (Mode.SELF_SPECULATION, 8)

    stop = asyncio.Event()
    stop.set()
    await leader.run(stop)  # hands its lease over
    successor, its_watch = controller()
    await its_watch.step()
    await successor.step()
    assert successor.is_leader
    assert (await follower.step()).decode.mode is Mode.SELF_SPECULATION


async def test_a_replica_alone_decides_by_the_new_policy():
    lost = LoadStore("redis://127.0.0.1:1/0")
    follower = PlanFollower(lost, create_policy("diffusion"), lambda: a_load(1))
    assert (await follower.step()).decode.mode is Mode.DIFFUSION
    follower.set_policy(create_policy("ar"))
    assert (await follower.step()).decode.mode is Mode.AR
    await lost.close()
