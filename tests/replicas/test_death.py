"""An engine that dies ends every request once, and is known to be dead; what nobody waits for may fail."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest

from policies.cost import ReplicaCosts, StepCost
from policies.modes import DecodePlan, Mode
from policies.policy import Trial
from policies.replica_load import Freshness, ObservedLoad, ReplicaLoad
from replicas.config import EngineConfig
from replicas.engine.batch import RunnerLost, ScheduledBatch, SegmentOutput
from replicas.engine.engine import Engine
from replicas.engine.forwards import MAX_FAILED
from replicas.engine_thread import WEDGED_S
from replicas.errors import ErrorCode, TriadError
from replicas.messages import (
    Accepted,
    DecodingOptions,
    Delta,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    Rejected,
    SamplingParams,
)
from replicas.preparation import Prepared
from replicas.service import ReplicaService
from replicas.timeline import Timeline
from tests.replicas.channel import channel_of
from tests.replicas.codec import byte_codec
from tests.replicas.engine.scripted import ScriptedRunner

CODEC = byte_codec()
T = TypeVar("T")
AR = DecodingOptions(Mode.AR)
DIFFUSION = DecodingOptions(Mode.DIFFUSION, 8)
OUT_OF_MEMORY = MemoryError("no memory")
ILLEGAL_ACCESS = RuntimeError("CUDA error: an illegal memory access was encountered")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class StepwiseRunner(ScriptedRunner):
    """Each forward waits for a permit, and fails once there is an error. begun: released by each."""

    def __init__(self) -> None:
        super().__init__(num_pages=400)
        self._permits = threading.Semaphore(0)
        self.error: Exception | None = None
        self.num_asked = 0
        self.begun = threading.Semaphore(0)

    def allow(self, num_forwards: int = 10_000) -> None:
        self._permits.release(num_forwards)

    async def begins(self, num_forwards: int = 1) -> None:
        """Waits until so many more have begun."""
        for _ in range(num_forwards):
            assert await asyncio.to_thread(self.begun.acquire, timeout=20)

    def run(self, batch: ScheduledBatch) -> list[SegmentOutput]:
        self.begun.release()
        assert self._permits.acquire(timeout=30)
        self.num_asked += 1
        if self.error is not None:
            raise self.error
        return super().run(batch)


@asynccontextmanager
async def serving(runner: ScriptedRunner, **options) -> AsyncIterator[ReplicaService]:
    service = ReplicaService(Engine(runner), CODEC, "replica", **options)
    service.start()
    try:
        yield service
    finally:
        await service.stop()


def request(name: str, decoding: DecodingOptions = AR, num_choices: int = 1, **fields) -> GenerateRequest:
    sampling = SamplingParams(**{"max_tokens": 60, "ignore_eos": True} | fields)
    return GenerateRequest(name, "c", (f"text {name}",), sampling, decoding, None, num_choices)


async def read_all(stream: AsyncIterator[tuple[Event, ...]]) -> list[Event]:
    """What comes on a channel until it ends."""
    return [event async for events in stream for event in events]


async def ends(stream: AsyncIterator[tuple[Event, ...]], names: set[str]) -> dict[str, Finished | Failed]:
    """Reads a channel until each of these requests has ended."""
    seen: dict[str, Finished | Failed] = {}
    while set(seen) < names:
        for event in await asyncio.wait_for(anext(stream), 20):
            if not isinstance(event, Delta):
                assert event.request_id not in seen
                seen[event.request_id] = event
    return seen


async def sent(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Starts a call and lets it run up to where it waits for the engine's thread."""
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # a shielded call begins a turn later
    return task


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, ILLEGAL_ACCESS, RunnerLost("gone")])
async def test_a_runner_that_fails_for_good_is_known_to_be_lost(error: Exception) -> None:
    """Else it would be the emptiest replica, and every request would go there to fail."""
    runner, timelines = StepwiseRunner(), []
    async with serving(runner, on_timeline=timelines.append) as service:
        stream = channel_of(service, "c")
        await anext(stream)
        runner.allow(5)
        assert isinstance(await service.submit(request("a")), Accepted)
        await runner.begins(6)
        runner.error = error
        runner.allow()
        events = await asyncio.wait_for(read_all(stream), 20)
        (end,) = [event for event in events if not isinstance(event, Delta)]
        assert isinstance(end, Failed)
        assert end.code is ErrorCode.INTERNAL
        assert runner.num_asked <= 5 + 2 * MAX_FAILED
        with pytest.raises(RuntimeError, match="died"):
            service.check()
        answer = await service.submit(request("b"))
        assert isinstance(answer, Rejected)
        assert answer.code is ErrorCode.UNAVAILABLE
        # A router that opens its channel anew never gets the first item, and so never places here again.
        assert await read_all(channel_of(service, "c2")) == []
        await service.stop()
        assert [timeline.error for timeline in timelines] == [ErrorCode.INTERNAL]


class BrokenRunner(ScriptedRunner):
    """Gives fewer outputs than segments, which is a bug that the engine can't go on from."""

    def run(self, batch: ScheduledBatch) -> list[SegmentOutput]:
        super().run(batch)
        return []


async def test_the_load_of_a_dead_engine_grows_old() -> None:
    clock = Clock()
    async with serving(BrokenRunner(), clock=clock) as service:
        stream = channel_of(service, "c")
        await anext(stream)
        await service.submit(request("a"))
        await asyncio.wait_for(read_all(stream), 20)
        for later_s, freshness in ((0.5, Freshness.FRESH), (1.0, Freshness.STALE), (4.0, Freshness.LOST)):
            clock.now_s += later_s
            load = service.snapshot()
            assert ObservedLoad(load, load.silent_s).freshness is freshness


async def test_a_forward_that_hangs_is_told_of_by_load_and_check_alike() -> None:
    clock = Clock()
    runner = StepwiseRunner()
    async with serving(runner, clock=clock) as service:
        stream = channel_of(service, "c")
        await anext(stream)
        await service.submit(request("a"))
        await runner.begins()
        clock.now_s += WEDGED_S
        assert service.snapshot().silent_s == WEDGED_S
        service.check()
        clock.now_s += 1.0
        assert service.snapshot().silent_s == WEDGED_S + 1.0
        with pytest.raises(RuntimeError, match="a forward has been running"):
            service.check()
        runner.allow()
        await ends(stream, {"a"})
        service.check()


async def test_a_channel_that_closes_while_a_request_is_made_ready_leaves_no_orphan() -> None:
    """As while its schema is compiled or its prompt tokenised."""
    runner = StepwiseRunner()
    runner.allow()
    async with serving(runner) as service:
        stream = channel_of(service, "c")
        await anext(stream)
        asked = request("a")
        await stream.aclose()
        with pytest.raises(TriadError, match="has closed") as caught:
            await service._thread.call(
                lambda: service._requests.submit(asked, Prepared([[5, 6]], [None], [None]))
            )
        assert caught.value.code is ErrorCode.UNAVAILABLE
        assert (await settled(service)).num_in_flight == 0
        assert runner.num_asked == 0


async def settled(service: ReplicaService) -> ReplicaLoad:
    await service.state()
    await service.state()
    return service.snapshot()


async def test_every_token_is_counted_once_by_mode_whatever_became_of_its_request() -> None:
    runner = StepwiseRunner()
    totals = [Counter[Mode]()]

    async def total() -> Counter[Mode]:
        totals.append(Counter((await settled(service)).tokens_total_by_mode))
        assert not totals[-2] - totals[-1]
        return totals[-1]

    async with serving(runner) as service:
        stream = channel_of(service, "c")
        await anext(stream)
        await service.submit(request("ar"))
        calls = [await sent(service.submit(request("diffusion", DIFFUSION)))]
        runner.allow(12)
        await runner.begins(13)
        calls.append(await sent(service.submit(request("late"))))
        cancel = await sent(service.cancel(("ar", "diffusion", "late")))
        runner.allow()
        await asyncio.gather(cancel, *calls)
        made = Counter[Mode]()
        for name, end in (await ends(stream, {"ar", "diffusion", "late"})).items():
            assert isinstance(end, Failed)
            assert end.code is ErrorCode.CANCELLED
            if name == "late":
                assert (end.report, end.num_completion_tokens) == (None, 0)
                continue
            assert end.report is not None
            assert set(end.report.tokens_by_mode) == {Mode(name)}
            assert sum(end.report.tokens_by_mode.values()) == end.num_completion_tokens > 1
            made += Counter(end.report.tokens_by_mode)
        assert await total() == made
        await service.submit(request("well", DIFFUSION))
        end = (await ends(stream, {"well"}))["well"]
        assert isinstance(end, Finished)
        made += Counter(end.report.tokens_by_mode)
        assert await total() == made


async def test_tokens_are_counted_that_nobody_is_told_of() -> None:
    """Their ingress has gone."""
    runner = StepwiseRunner()
    async with serving(runner) as service:
        stream = channel_of(service, "c")
        await anext(stream)
        await service.submit(request("gone"))
        runner.allow(5)
        await runner.begins(6)
        await stream.aclose()
        runner.allow()
        assert (await settled(service)).tokens_total_by_mode == {Mode.AR: 6}


async def test_a_failed_request_of_many_choices_tells_of_all_it_made() -> None:
    """One that had ended and two that had not; those without a token are not counted among them."""
    runner = StepwiseRunner()
    engine = Engine(runner, EngineConfig(max_running=3))
    service = ReplicaService(engine, CODEC, "replica")
    service.start()
    stream = channel_of(service, "c")
    await anext(stream)
    await service.submit(request("r", num_choices=5, max_tokens=4))
    runner.allow(3)
    await runner.begins(4)
    cancel = await sent(service.cancel(("r",)))
    runner.allow()
    await cancel
    failed = (await ends(stream, {"r"}))["r"]
    assert isinstance(failed, Failed)
    assert failed.report is not None
    assert failed.report.tokens_by_mode == {Mode.AR: 4 + 3 + 3}
    assert (failed.report.num_choices, failed.num_completion_tokens) == (3, 10)
    assert Counter((await settled(service)).tokens_total_by_mode) == Counter(failed.report.tokens_by_mode)
    await service.stop()


async def test_a_tracer_that_raises_ends_nothing_and_is_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def raising(timeline: Timeline) -> None:
        raise RuntimeError("no spans")

    runner = StepwiseRunner()
    runner.allow()
    async with serving(runner, on_timeline=raising) as service:
        stream = channel_of(service, "c")
        await anext(stream)
        for number in range(3):
            await service.submit(request(str(number), max_tokens=3))
            await ends(stream, {str(number)})
        service.check()
    assert [record.name for record in caplog.records] == ["policies.failures"]


class BuggyEngine(Engine):
    """Raises where nobody's tokens depend on it."""

    is_buggy = False

    def set_trial(self, trial: Trial | None) -> None:
        raise KeyError("explored plans")

    def snapshot(self, replica_id: str) -> ReplicaLoad:
        if self.is_buggy:
            raise ZeroDivisionError
        return super().snapshot(replica_id)


async def test_a_bug_in_what_is_measured_or_tried_ends_nothing() -> None:
    runner = StepwiseRunner()
    engine = BuggyEngine(runner)
    service = ReplicaService(engine, CODEC, "replica", costs=ReplicaCosts(StepCost((1, 512), (5.0, 9.0))))
    service.start()
    stream = channel_of(service, "c")
    await anext(stream)
    engine.is_buggy = True
    service.set_trial(None)
    service.set_plan(DecodePlan(Mode.AR), "rule")
    engine.forwards.append("no forward")  # type: ignore[arg-type]
    engine.scheduler.counters.rounds.append("no round")  # type: ignore[arg-type]
    before = service.snapshot()
    runner.allow()
    await service.submit(request("a"))
    await ends(stream, {"a"})
    service.check()
    assert before.costs is not None
    assert before.costs.step.ms(1) == 5.0
    engine.is_buggy = False
    assert (await settled(service)).tokens_total_by_mode == {Mode.AR: 60}
    learned = service.snapshot().costs
    assert learned is not None
    assert learned.step.ms(1) < 5.0  # it goes on learning
    await service.stop()
