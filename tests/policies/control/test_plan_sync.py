import asyncio
import os
import signal

import pytest
import redis.asyncio

from policies.control.controller import Controller
from policies.control.plan import ReplicaPlan
from policies.control.plan_sync import MAX_FAILED_STEPS, PlanFollower
from policies.control.policy_setting import PolicyChoice, PolicyWatch, read_setting, write_setting
from policies.control.store import LoadStore, PlanWrite
from policies.modes import DecodePlan, Mode
from policies.policy import Trial
from policies.registry import create_policy
from tests.policies.helpers import FakeClock, a_load, eventually
from tests.redis_commands import commands_while
from tests.stores import patient_store

DIFFUSION = DecodePlan(Mode.DIFFUSION, 16)
AR = DecodePlan(Mode.AR)


class Replica:
    """A replica reduced to its load."""

    def __init__(self, store, clock=None, **options):
        self.num_in_flight = 0
        self.plans = []
        if clock is not None:
            options |= {"clock": clock, "sleep": clock.sleep}
        policy = create_policy("threshold")
        self.follower = PlanFollower(
            store, policy, lambda: a_load(self.num_in_flight), self.plans.append, **options
        )


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def replica(store, clock):
    return Replica(store, clock)


@pytest.fixture
def write(store):
    """Writes the replica's plan as a leader would."""

    async def write_plan(version, decode):
        lease = await store.acquire_lease("leader")
        assert await store.commit(lease, {"r1": PlanWrite(ReplicaPlan(version, decode, "threshold", "test"))})
        await store.release_lease(lease)

    return write_plan


async def age_plan(raw, app, seconds):
    await raw.hincrby(f"triad:{{{app}}}:plan:r1", "at", -seconds * 1_000_000)


async def test_it_has_a_plan_before_it_has_a_store(replica):
    plan = replica.follower.plan
    assert (plan.version, plan.decode, plan.rule) == (0, DIFFUSION, "threshold (local: starting)")


async def test_it_publishes_what_it_runs_and_follows_what_it_reads(replica, store, write, clock):
    await write(3, AR)
    assert (await replica.follower.step()).decode == AR
    clock.now_s += 2.0
    plan = await replica.follower.step()
    assert (plan.version, plan.rule) == (3, "threshold")
    (seen,) = (await store.read_loads()).replicas
    assert (seen.load.plan_version, seen.load.decode, seen.load.decode_held_s) == (3, AR, 2.0)


async def test_on_plan_hears_of_changes_only(replica, write):
    await write(1, AR)
    for _ in range(3):
        await replica.follower.step()
    await write(2, AR)
    await replica.follower.step()
    assert [plan.version for plan in replica.plans] == [1]
    assert replica.follower.plan.version == 2


async def test_a_new_policy_ends_what_the_one_before_tried(store, clock):
    class Trying(type(create_policy("threshold"))):
        def trial(self, load, running):
            return Trial(DIFFUSION, 0.1, 0.02)

    threshold = create_policy("threshold")
    trying = Trying(threshold._inner, threshold.parameters)
    plans, trials = [], []
    follower = PlanFollower(
        store, trying, lambda: a_load(1), plans.append, trials.append, clock=clock, sleep=clock.sleep
    )
    plan = await follower.step()
    assert trials == [Trial(DIFFUSION, 0.1, 0.02)]
    plans.clear()
    follower.set_policy(create_policy("threshold"))
    assert trials[1:] == [None]
    assert plans == [plan]


async def test_without_a_plan_it_decides_alone(replica, clock):
    clock.now_s += 5.0
    replica.num_in_flight = 20
    plan = await replica.follower.step()
    assert (plan.decode, plan.rule) == (AR, "threshold (local: no plan)")


async def test_a_stale_plan_is_gone_on_from_with_its_hysteresis_and_dwell(replica, write, raw, app, clock):
    await write(1, AR)
    replica.num_in_flight = 7
    await replica.follower.step()
    await age_plan(raw, app, 10)
    clock.now_s += 0.5
    plan = await replica.follower.step()
    assert (plan.version, plan.decode, plan.rule) == (1, AR, "threshold (local: plan stale)")
    replica.num_in_flight = 1
    assert (await replica.follower.step()).decode == AR
    clock.now_s += 1.0
    assert (await replica.follower.step()).decode == DIFFUSION


async def test_a_fresh_plan_takes_over_again(replica, write, raw, app):
    await write(1, AR)
    await age_plan(raw, app, 10)
    assert (await replica.follower.step()).rule == "threshold (local: plan stale)"
    await write(2, AR)
    plan = await replica.follower.step()
    assert (plan.version, plan.rule) == (2, "threshold")


async def test_versions_never_go_back(replica, write):
    await write(5, AR)
    await replica.follower.step()
    await write(4, DIFFUSION)
    plan = await replica.follower.step()
    assert (plan.version, plan.rule) == (5, "threshold (local: plan outdated)")


async def test_the_loop_keeps_its_period_and_withdraws_at_the_end(replica, store, clock):
    stop = asyncio.Event()
    times = []

    async def sleep(seconds):
        times.append(clock.now_s)
        clock.now_s += seconds
        if len(times) == 5:
            assert len((await store.read_loads()).replicas) == 1
            stop.set()

    follower = PlanFollower(store, create_policy("ar"), lambda: a_load(), clock=clock, sleep=sleep)
    await follower.run(stop)
    assert times == pytest.approx([1000.0 + 0.2 * index for index in range(5)])
    assert (await store.read_loads()).replicas == ()


async def test_a_publisher_whose_every_step_fails_is_known_to_be_broken(store, clock):
    """Its loop goes on for ever, so that the loop's life alone would say nothing."""
    stop = asyncio.Event()
    fails = [True] * MAX_FAILED_STEPS
    steps = [False, *fails[1:], False, *fails, True, False]
    left = iter([False, *steps])  # the first one at the beginning
    broken = []

    def read_load():
        if next(left):
            raise ValueError("no load")
        return a_load()

    async def sleep(seconds):
        clock.now_s += seconds
        try:
            follower.check()
        except RuntimeError as error:
            broken.append((len(times), str(error)))
        times.append(clock.now_s)
        if len(times) == len(steps):
            stop.set()

    times = []
    follower = PlanFollower(store, create_policy("ar"), read_load, clock=clock, sleep=sleep)
    await follower.run(stop)
    assert [step for step, _ in broken] == [len(steps) - 3, len(steps) - 2]
    assert f"failed {MAX_FAILED_STEPS} times in a row" in broken[0][1]


async def test_a_publisher_without_its_store_is_not_broken(clock):
    stop = asyncio.Event()
    lost = LoadStore("redis://127.0.0.1:1/0")
    num_steps = 0

    async def sleep(seconds):
        nonlocal num_steps
        clock.now_s += seconds
        follower.check()
        num_steps += 1
        if num_steps == 2 * MAX_FAILED_STEPS:
            stop.set()

    follower = PlanFollower(lost, create_policy("ar"), a_load, clock=clock, sleep=sleep)
    await follower.run(stop)
    assert follower.plan.rule.endswith("store unavailable)")
    await lost.close()


async def test_a_plan_left_for_a_decision_of_its_own_is_not_gone_back_to(replica, write, raw, app, clock):
    """The store was away for a moment: its plan looks fresh again, but is from before the shift."""
    await write(1, DIFFUSION)
    await replica.follower.step()
    await age_plan(raw, app, 10)
    clock.now_s += 2.0
    replica.num_in_flight = 20
    assert (await replica.follower.step()).decode == AR
    await age_plan(raw, app, -10)
    plan = await replica.follower.step()
    assert (plan.decode, plan.rule) == (AR, "threshold (local: plan outdated)")
    await write(2, DIFFUSION)
    plan = await replica.follower.step()
    assert (plan.version, plan.decode, plan.rule) == (2, DIFFUSION, "threshold")


class Cluster:
    """A follower and a controller with their loops running, each with its own store client."""

    def __init__(self, url, app):
        self.stores = [LoadStore(url, app) for _ in range(2)]
        self.replica = Replica(self.stores[0])
        self.controller = Controller(self.stores[1], create_policy("threshold"))
        self._stop = asyncio.Event()

    async def __aenter__(self):
        loops = (self.replica.follower.run(self._stop), self.controller.run(self._stop))
        self._tasks = [asyncio.create_task(loop) for loop in loops]
        return self

    async def __aexit__(self, *_):
        self._stop.set()
        await asyncio.gather(*self._tasks)
        for store in self.stores:
            await store.close()

    async def plan(self):
        return self.replica.follower.plan

    async def until(self, is_it, timeout_s=5.0):
        return await eventually(self.plan, is_it, timeout_s)


async def test_the_mode_follows_the_load_within_2_s_and_back(server, app):
    async with Cluster(server.url, app) as cluster:
        cluster.replica.num_in_flight = 1
        await cluster.until(lambda plan: plan.rule == "threshold" and plan.decode == DIFFUSION)
        cluster.replica.num_in_flight = 16
        await cluster.until(lambda plan: plan.decode == AR, timeout_s=2.0)
        cluster.replica.num_in_flight = 1
        await cluster.until(lambda plan: plan.decode == DIFFUSION, timeout_s=2.0)
        assert [plan.decode for plan in cluster.replica.plans if plan.rule == "threshold"] == [
            DIFFUSION,
            AR,
            DIFFUSION,
        ]


async def test_a_killed_server_is_survived_and_found_again(own_server, app):
    async with Cluster(own_server.url, app) as cluster:
        cluster.replica.num_in_flight = 20
        before = await cluster.until(lambda plan: plan.rule == "threshold" and plan.decode == AR)
        num_plans = len(cluster.replica.plans)
        os.kill(own_server.pid, signal.SIGKILL)
        after = await cluster.until(lambda plan: plan.version > before.version)
        assert (after.rule, after.decode) == ("threshold", AR)
        assert {plan.decode for plan in cluster.replica.plans[num_plans:]} == {AR}


async def test_with_a_hung_server_the_replica_still_follows_its_load(own_server, app):
    async with Cluster(own_server.url, app) as cluster:
        cluster.replica.num_in_flight = 1
        await cluster.until(lambda plan: plan.rule == "threshold")
        os.kill(own_server.pid, signal.SIGSTOP)
        cluster.replica.num_in_flight = 20
        plan = await cluster.until(lambda plan: plan.decode == AR, timeout_s=3.0)
        assert plan.rule == "threshold (local: store unavailable)"
        os.kill(own_server.pid, signal.SIGCONT)
        num_plans = len(cluster.replica.plans)
        back = await cluster.until(lambda plan: plan.rule == "threshold")
        assert back.version > plan.version
        assert {plan.decode for plan in cluster.replica.plans[num_plans:]} == {AR}


@pytest.mark.parametrize("num_periods", [1, 25])
async def test_a_replica_sends_exactly_one_command_a_period(own_server, app, num_periods):
    """Its load, its plan and the policy set at run time in one; and one to withdraw."""
    store = patient_store(own_server.url, app)
    await write_setting(store, PolicyChoice("ar"))
    await store.close()
    store, stop, policies = patient_store(own_server.url, app), asyncio.Event(), []
    left = iter(range(num_periods - 1, -1, -1))

    async def sleep(_):
        if next(left) == 0:
            stop.set()

    watch = PolicyWatch(store, PolicyChoice("threshold"), policies.append)
    follower = PlanFollower(
        store, create_policy("threshold"), lambda: a_load(1), on_policy_entry=watch.apply, sleep=sleep
    )
    commands, _ = await commands_while(own_server.url, follower.run(stop))
    assert len(commands) == num_periods + 1
    assert {command.split(maxsplit=1)[0] for command in commands} == {"EVAL"}
    assert [policy.name for policy in policies] == ["fixed"]
    await store.close()


async def test_a_store_that_lost_its_data_is_given_the_policy_back(own_server, app):
    store = patient_store(own_server.url, app)
    watch = PolicyWatch(store, PolicyChoice("threshold"), lambda policy: None)
    follower = PlanFollower(store, create_policy("threshold"), lambda: a_load(1), on_policy_entry=watch.apply)
    setting = await write_setting(store, PolicyChoice("ar"))
    await follower.step()
    assert watch.setting == setting
    raw = redis.asyncio.Redis.from_url(own_server.url)
    await raw.flushall()
    await follower.step()
    assert await read_setting(store) == setting
    await raw.aclose()
    await store.close()
