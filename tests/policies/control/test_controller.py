import pytest

from policies.control.controller import HEARTBEAT_S, Controller
from policies.control.plan import ReplicaPlan
from policies.control.store import LoadStore, PlanWrite
from policies.modes import DecodePlan, Mode
from policies.registry import create_policy
from tests.policies.helpers import FakeClock, a_load

DIFFUSION = DecodePlan(Mode.DIFFUSION, 16)
SPECULATION = DecodePlan(Mode.SELF_SPECULATION, 8)
AR = DecodePlan(Mode.AR)


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def new_controller(store, clock):
    def create(**options):
        return Controller(options.pop("store", store), create_policy("threshold"), clock=clock, **options)

    return create


@pytest.fixture
def controller(new_controller):
    return new_controller(name="first")


@pytest.fixture
def load_key(app):
    return f"triad:{{{app}}}:load:r1"


async def plan_of(store, replica_id="r1"):
    return (await store.read_view()).plans[replica_id]


async def make_older(raw, key, seconds, field="at"):
    """As if it had been written that much earlier."""
    await raw.hincrby(key, field, -seconds * 1_000_000)


async def test_every_replica_gets_a_plan_for_its_own_load(store, controller):
    for replica_id, num in (("idle", 0), ("middling", 5), ("busy", 20)):
        await store.publish_and_read(a_load(num, replica_id))
    await controller.step()
    plans = (await store.read_view()).plans
    assert {key: seen.plan.decode for key, seen in plans.items()} == {
        "idle": DIFFUSION,
        "middling": SPECULATION,
        "busy": AR,
    }
    assert plans["busy"].plan.version == 1
    assert plans["busy"].plan.rule == "threshold"
    assert plans["busy"].plan.reason == "20 in flight; on the level above 8"


async def test_an_unchanged_plan_is_confirmed_and_not_rewritten(store, controller, raw, app):
    await store.publish_and_read(a_load(1))
    await controller.step()
    await make_older(raw, f"triad:{{{app}}}:plan:r1", 10)
    await make_older(raw, f"triad:{{{app}}}:plan:r1", 10, "since")
    await controller.step()
    seen = await plan_of(store)
    assert seen.plan.version == 1
    assert not seen.is_stale
    assert seen.held_s >= 10.0


async def test_a_shift_grows_the_version_and_is_logged_with_its_inputs(store, controller, clock):
    await store.publish_and_read(a_load(1))
    await controller.step()
    clock.now_s += 2.0
    await store.publish_and_read(a_load(20))
    await controller.step()
    seen = await plan_of(store)
    assert (seen.plan.version, seen.plan.decode) == (2, AR)
    assert seen.held_s < 1.0
    newest = (await store.recent_decisions())[0]
    assert newest.plan == seen.plan
    assert newest.load == a_load(20)
    assert newest.changed
    assert newest.leader == controller.name
    assert 0.0 <= newest.plan.input_age_s < 1.0


async def test_the_dwell_holds_between_rounds(store, controller, clock):
    await store.publish_and_read(a_load(1))
    await controller.step()
    for elapsed_s, expected in ((0.2, DIFFUSION), (0.9, AR)):
        clock.now_s += elapsed_s
        await store.publish_and_read(a_load(20))
        await controller.step()
        assert (await plan_of(store)).plan.decode == expected


async def test_a_stale_load_keeps_its_plan(store, controller, raw, load_key, clock):
    await store.publish_and_read(a_load(1))
    await controller.step()
    clock.now_s += 2.0
    await store.publish_and_read(a_load(20))
    await make_older(raw, load_key, 3)
    await controller.step()
    seen = await plan_of(store)
    assert (seen.plan.version, seen.plan.decode) == (1, DIFFUSION)
    assert not seen.is_stale


async def test_a_lost_replicas_plan_is_left_to_expire(store, controller, raw, load_key, app):
    await store.publish_and_read(a_load(1))
    await controller.step()
    await make_older(raw, load_key, 5)
    await make_older(raw, f"triad:{{{app}}}:plan:r1", 4)
    await controller.step()
    assert (await plan_of(store)).is_stale


async def test_one_leads_and_the_other_waits(store, new_controller):
    first, second = new_controller(name="first"), new_controller(name="second")
    await store.publish_and_read(a_load(1))
    await first.step()
    await second.step()
    assert (first.is_leader, second.is_leader) == (True, False)
    assert (await store.read_view()).leader == first.name
    assert len(await store.recent_decisions()) == 1


async def take_over(store, raw, app, successor):
    await raw.delete(f"triad:{{{app}}}:leader")
    await successor.step()
    assert successor.is_leader


async def test_a_take_over_shifts_nothing_inside_the_band(store, controller, new_controller, raw, app, clock):
    """7 in flight is self_speculation for a fresh start, but AR for a replica that comes from above."""
    await store.publish_and_read(a_load(20))
    await controller.step()
    clock.now_s += 60.0
    await store.publish_and_read(a_load(7))
    await take_over(store, raw, app, new_controller())
    seen = await plan_of(store)
    assert (seen.plan.version, seen.plan.decode) == (1, AR)


async def test_a_take_over_inherits_the_dwell(store, controller, new_controller, raw, app):
    await store.publish_and_read(a_load(20))
    await controller.step()
    await store.publish_and_read(a_load(1))
    successor = new_controller()
    await take_over(store, raw, app, successor)
    assert (await plan_of(store)).plan.decode == AR
    await make_older(raw, f"triad:{{{app}}}:plan:r1", 1, "since")
    await take_over(store, raw, app, new_controller())
    assert (await plan_of(store)).plan.decode == DIFFUSION


async def test_what_a_replica_decided_alone_is_gone_on_from(store, controller, clock):
    """It saw version 1, was cut off, and shifted by itself; in the band, so AR stays."""
    await store.publish_and_read(a_load(1))
    await controller.step()
    clock.now_s += 60.0
    await store.publish_and_read(a_load(7, plan_version=1, decode=AR, decode_held_s=30.0))
    await controller.step()
    seen = await plan_of(store)
    assert (seen.plan.version, seen.plan.decode) == (2, AR)
    assert seen.held_s >= 30.0


async def test_a_replica_called_back_to_its_plan_gets_a_newer_one(store, controller, clock):
    await store.publish_and_read(a_load(1))
    await controller.step()
    clock.now_s += 60.0
    await store.publish_and_read(a_load(1, plan_version=1, decode=AR, decode_held_s=30.0))
    await controller.step()
    seen = await plan_of(store)
    assert (seen.plan.version, seen.plan.decode) == (2, DIFFUSION)
    assert seen.held_s < 1.0


async def test_a_replica_that_has_not_read_its_plan_yet_is_not_taken_for_a_dissenter(
    store, controller, clock
):
    await store.publish_and_read(a_load(20))
    await controller.step()
    clock.now_s += 60.0
    await store.publish_and_read(a_load(7, plan_version=0, decode=DIFFUSION, decode_held_s=30.0))
    await controller.step()
    seen = await plan_of(store)
    assert (seen.plan.version, seen.plan.decode) == (1, AR)


@pytest.mark.parametrize("is_same_leader", [True, False])
async def test_versions_go_on_over_a_store_that_lost_everything(
    store, controller, new_controller, raw, app, is_same_leader
):
    await store.publish_and_read(a_load(20))
    await controller.step()
    await raw.delete(*await raw.keys(f"triad:{{{app}}}:*"))
    await store.publish_and_read(a_load(20, plan_version=41, decode=AR, decode_held_s=9.0))
    await (controller if is_same_leader else new_controller()).step()
    seen = await plan_of(store)
    assert (seen.plan.version, seen.plan.decode) == (42, AR)
    assert seen.held_s >= 9.0


async def test_a_plan_older_than_its_replica_knows_is_passed(store, controller, new_controller):
    """As after a fail-over to a Redis that was behind."""
    await store.publish_and_read(a_load(20))
    await controller.step()
    await store.publish_and_read(a_load(20, plan_version=5, decode=AR))
    await controller.step()
    assert (await plan_of(store)).plan.version == 6


class OvertakenStore(LoadStore):
    """Another controller takes the lease and writes while this one decides."""

    async def read_view(self):
        view = await super().read_view()
        await self._redis.delete(self._key("leader"))
        usurper = await self.acquire_lease("usurper")
        await self.commit(usurper, {"r1": PlanWrite(ReplicaPlan(7, SPECULATION, "threshold", "mine"))})
        return view


async def test_a_leader_overtaken_while_it_decided_writes_nothing(server, app, store, new_controller):
    overtaken = OvertakenStore(server.url, app)
    controller = new_controller(store=overtaken)
    await store.publish_and_read(a_load(20))
    await controller.step()
    assert not controller.is_leader
    seen = await plan_of(store)
    assert (seen.plan.version, seen.plan.reason) == (7, "mine")
    assert await store.recent_decisions() == ()
    await overtaken.close()


async def test_decisions_to_leave_things_are_logged_now_and_then_in_turn(store, controller, clock):
    for replica_id in ("a", "b", "c"):
        await store.publish_and_read(a_load(1, replica_id))
    await controller.step()
    for _ in range(4 * round(HEARTBEAT_S / 0.5)):
        clock.now_s += 0.5
        await controller.step()
    records = [record for record in await store.recent_decisions() if not record.changed]
    assert [record.load.replica_id for record in reversed(records)] == ["a", "b", "c", "a"]
