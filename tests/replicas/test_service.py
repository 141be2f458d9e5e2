"""The service around a scripted model: every accepted request ends once, whatever happens."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from policies.cost import ReplicaCosts, StepCost
from policies.modes import DecodePlan, Mode
from policies.replica_load import ReplicaLoad
from replicas.config import EngineConfig
from replicas.engine.batch import ScheduledBatch
from replicas.engine.engine import Engine
from replicas.errors import ErrorCode
from replicas.messages import (
    Accepted,
    DecodingOptions,
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    Rejected,
    SamplingParams,
)
from replicas.service import ReplicaService
from tests.replicas.channel import channel_of
from tests.replicas.codec import byte_codec
from tests.replicas.engine.scripted import EOS, ScriptedRunner, naive_ar

CODEC = byte_codec()
T = TypeVar("T")


class GatedRunner(ScriptedRunner):
    """Each forward waits for a permit; a command sent before the permit comes in between two forwards."""

    def __init__(self) -> None:
        super().__init__()
        self._permits = threading.Semaphore(0)

    def allow(self, num_forwards: int = 1000) -> None:
        self._permits.release(num_forwards)

    def run(self, batch: ScheduledBatch):
        assert self._permits.acquire(timeout=30)
        return super().run(batch)


@asynccontextmanager
async def serving(runner: ScriptedRunner | None = None, **limits: int) -> AsyncIterator[ReplicaService]:
    service = ReplicaService(Engine(runner or ScriptedRunner(), EngineConfig(**limits)), CODEC, "replica")
    service.start()
    try:
        yield service
    finally:
        await service.stop()


def request(name: str, text: str = "hello", channel: str = "c", **fields) -> GenerateRequest:
    decoding = fields.pop("decoding", DecodingOptions())
    timeout_s = fields.pop("timeout_s", None)
    num_choices = fields.pop("num_choices", 1)
    sampling = SamplingParams(**{"max_tokens": 30, "ignore_eos": True} | fields)
    return GenerateRequest(name, channel, (text,), sampling, decoding, timeout_s, num_choices)


async def collect(stream: AsyncIterator[tuple[Event, ...]], names: set[str]) -> dict[str, list[Event]]:
    """Reads a channel until each of these requests has ended."""
    seen: dict[str, list[Event]] = {name: [] for name in names}
    open_names = set(names)
    while open_names:
        for event in await asyncio.wait_for(anext(stream), 20):
            seen[event.request_id].append(event)
            if not isinstance(event, Delta):
                open_names.remove(event.request_id)
    return seen


async def opened(service: ReplicaService, channel: str = "c") -> AsyncIterator[tuple[Event, ...]]:
    stream = channel_of(service, channel)
    assert await anext(stream) == ()
    return stream


async def settled(service: ReplicaService) -> ReplicaLoad:
    """The load once the engine has done what was asked of it so far."""
    await service.state()
    await service.state()
    return service.snapshot()


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


async def test_a_crowd_on_one_channel_gets_each_its_own_text() -> None:
    async with serving() as service:
        stream = await opened(service)
        modes = [
            DecodingOptions(Mode.AR),
            DecodingOptions(Mode.SELF_SPECULATION),
            DecodingOptions(lossless=True),
        ]
        names = {f"r{k}" for k in range(12)}
        for k in range(12):
            answer = await service.submit(request(f"r{k}", f"text {k}", decoding=modes[k % 3]))
            assert answer == Accepted(f"r{k}", len(CODEC.encode(f"text {k}")))
        seen = await collect(stream, names)
        for k in range(12):
            tokens = naive_ar(CODEC.encode(f"text {k}"), 30, ignore_eos=True)
            plain = CODEC.stream()
            assert text_of(seen[f"r{k}"]) == plain.push(tuple(tokens)) + plain.finish()
            *_, end, last = seen[f"r{k}"]
            assert isinstance(last, Finished)
            assert (end.reason, last.num_completion_tokens) == (FinishReason.LENGTH, 30)
            assert sum(e.num_tokens for e in seen[f"r{k}"] if isinstance(e, Delta)) <= 30
        assert (await settled(service)).num_in_flight == 0


async def test_a_stop_string_ends_the_sequence_and_frees_its_pages() -> None:
    async with serving() as service:
        stream = await opened(service)
        tokens = naive_ar(CODEC.encode("hello"), 30, ignore_eos=True)
        whole = CODEC.stream().push(tuple(tokens))
        stop = whole[6:9]
        await service.submit(request("r", max_tokens=80, stop=(stop,)))
        seen = (await collect(stream, {"r"}))["r"]
        assert text_of(seen) == whole[: whole.find(stop)]
        assert seen[-2].reason is FinishReason.STOP
        assert (await settled(service)).pages_used == 0


async def sent(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Starts a call and lets it run up to where it waits for the engine's thread."""
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0)
    return task


async def test_cancel_ends_with_one_event() -> None:
    runner = GatedRunner()
    async with serving(runner) as service:
        stream = await opened(service)
        await service.submit(request("r", max_tokens=80))
        cancel = await sent(service.cancel(("r", "r", "unknown")))
        runner.allow()
        await cancel
        seen = (await collect(stream, {"r"}))["r"]
        assert isinstance(seen[-1], Failed)
        assert seen[-1].code is ErrorCode.CANCELLED
        assert (await settled(service)).pages_used == 0


async def test_a_caller_that_goes_while_it_waits_leaves_the_engine_alive() -> None:
    runner = GatedRunner()
    async with serving(runner) as service:
        stream = await opened(service)
        await service.submit(request("r", max_tokens=80))
        submit = await sent(service.submit(request("never")))
        cancel = await sent(service.cancel(("r",)))
        for call in (submit, cancel):
            call.cancel()
        await asyncio.gather(submit, cancel, return_exceptions=True)
        runner.allow()
        seen = (await collect(stream, {"r"}))["r"]
        assert seen[-1].code is ErrorCode.CANCELLED
        assert (await settled(service)).num_in_flight == 0
        await service.submit(request("after"))
        assert isinstance((await collect(stream, {"after"}))["after"][-1], Finished)


async def test_a_closed_channel_cancels_its_requests_only() -> None:
    runner = GatedRunner()
    async with serving(runner) as service:
        gone, stays = await opened(service, "gone"), await opened(service, "stays")
        await service.submit(request("r1", channel="gone", max_tokens=80))
        submit = await sent(service.submit(request("r2", channel="stays")))
        runner.allow(1)
        await submit
        await gone.aclose()
        runner.allow()
        seen = await collect(stays, {"r2"})
        assert isinstance(seen["r2"][-1], Finished)
        assert runner.num_forwards <= 31
        assert (await settled(service)).num_in_flight == 0
        answer = await service.submit(request("r3", channel="gone"))
        assert isinstance(answer, Rejected)
        assert answer.code is ErrorCode.UNAVAILABLE


async def test_refusals_name_the_field() -> None:
    async with serving() as service:
        stream = await opened(service)
        answer = await service.submit(request("r", "x" * 96, max_tokens=30))
        await stream.aclose()
        assert isinstance(answer, Rejected)
        assert (answer.code, answer.param) == (ErrorCode.CONTEXT_LENGTH_EXCEEDED, "prompt")
        assert "96" in answer.message


async def test_a_failing_forward_is_an_error_and_the_service_lives() -> None:
    runner = ScriptedRunner()
    async with serving(runner) as service:
        stream = await opened(service)
        runner.fail_next = RuntimeError("no memory")
        await service.submit(request("r1"))
        seen = await collect(stream, {"r1"})
        assert seen["r1"][-1].code is ErrorCode.INTERNAL
        service.check()
        await service.submit(request("r2"))
        assert isinstance((await collect(stream, {"r2"}))["r2"][-1], Finished)


class BrokenRunner(ScriptedRunner):
    """Gives fewer outputs than segments, which is a bug that the engine can't go on from."""

    def run(self, batch: ScheduledBatch):
        super().run(batch)
        return []


async def test_a_dead_engine_ends_everything_and_fails_the_health_check() -> None:
    async with serving(BrokenRunner()) as service:
        stream = await opened(service)
        await service.submit(request("r1"))
        seen = await collect(stream, {"r1"})
        assert seen["r1"][-1].code is ErrorCode.INTERNAL
        with pytest.raises(RuntimeError, match="died"):
            service.check()
        answer = await service.submit(request("r2"))
        assert isinstance(answer, Rejected)
        assert answer.code is ErrorCode.UNAVAILABLE


async def test_stopping_ends_what_runs() -> None:
    runner = GatedRunner()
    service = ReplicaService(Engine(runner), CODEC, "replica")
    service.start()
    stream = await opened(service)
    await service.submit(request("r0", max_tokens=80))
    submit = await sent(service.submit(request("r1", max_tokens=80)))
    stop = await sent(service.stop())
    runner.allow()
    await submit
    seen = await collect(stream, {"r0", "r1"})
    await stop
    for events in seen.values():
        assert [event.code for event in events if isinstance(event, Failed)] == [ErrorCode.UNAVAILABLE]
    assert [item async for item in stream if item] == []
    assert isinstance(await service.submit(request("late")), Rejected)


async def test_a_plan_reaches_running_requests_and_the_report() -> None:
    runner = GatedRunner()
    async with serving(runner) as service:
        stream = await opened(service)
        service.set_plan(DecodePlan(Mode.DIFFUSION, 8), "first")
        await service.submit(request("r", max_tokens=80))
        runner.allow(4)
        while not await asyncio.wait_for(anext(stream), 20):
            pass
        service.set_plan(DecodePlan(Mode.AR), "second")
        runner.allow()
        last = (await collect(stream, {"r"}))["r"][-1]
        assert set(last.report.tokens_by_mode) == {Mode.DIFFUSION, Mode.AR}
        assert (last.report.rule, last.report.num_switches) == ("second", 1)
        assert (await settled(service)).tokens_per_forward[Mode.AR] == 1.0


async def test_eos_ends_a_text_and_is_not_in_it() -> None:
    async with serving() as service:
        stream = await opened(service)
        texts = [f"prompt {k}" for k in range(60)]
        short = next(t for t in texts if naive_ar(CODEC.encode(t), 30)[-1] == EOS)
        await service.submit(request("r", short, ignore_eos=False))
        seen = (await collect(stream, {"r"}))["r"]
        assert "<eos>" not in text_of(seen)
        assert seen[-2].reason is FinishReason.STOP
        assert seen[-1].num_completion_tokens == len(naive_ar(CODEC.encode(short), 30))


async def test_choices_have_seeds_indices_and_one_end() -> None:
    async with serving() as service:
        stream = await opened(service)
        texts = ("first prompt", "other prompt")
        sampling = SamplingParams(max_tokens=20, ignore_eos=True)
        asked = GenerateRequest("r", "c", texts, sampling, num_choices=3)
        answer = await service.submit(asked)
        num_prompt_tokens = sum(len(CODEC.encode(text)) for text in texts)
        assert answer == Accepted("r", num_prompt_tokens)
        events = (await collect(stream, {"r"}))["r"]
        last = events[-1]
        assert isinstance(last, Finished)
        assert (last.num_prompt_tokens, last.num_completion_tokens) == (num_prompt_tokens, 120)
        assert (last.report.num_choices, sum(last.report.tokens_by_mode.values())) == (6, 120)
        assert last.report.tokens_per_forward == 1.0
        for index in range(6):
            mine = [event for event in events[:-1] if event.index == index]
            tokens = naive_ar(CODEC.encode(texts[index // 3]), 20, ignore_eos=True)
            plain = CODEC.stream()
            assert text_of(mine) == plain.push(tuple(tokens)) + plain.finish()
            assert [event.reason for event in mine if event.reason] == [FinishReason.LENGTH]
        assert (await settled(service)).pages_used == 0


async def test_a_choice_that_fails_fails_them_all_once() -> None:
    runner = ScriptedRunner()
    async with serving(runner, max_running=2) as service:
        stream = await opened(service)
        runner.fail_next = RuntimeError("no memory")
        await service.submit(request("r", num_choices=5))
        (last,) = (await collect(stream, {"r"}))["r"]
        assert isinstance(last, Failed)
        assert (await settled(service)).num_in_flight == 0


async def test_more_choices_than_there_can_be_are_refused_whole() -> None:
    runner = GatedRunner()
    async with serving(runner, max_running=2, max_waiting=3) as service:
        stream = await opened(service)
        answer = await service.submit(request("r", num_choices=6))
        assert isinstance(answer, Rejected)
        assert (answer.code, answer.param) == (ErrorCode.INVALID_REQUEST, "n")
        first = await sent(service.submit(request("r1", num_choices=3)))
        second = await sent(service.submit(request("r2", num_choices=3)))
        runner.allow()
        assert isinstance(await first, Accepted)
        answer = await second
        assert isinstance(answer, Rejected)
        assert answer.code is ErrorCode.QUEUE_FULL
        assert isinstance((await collect(stream, {"r1"}))["r1"][-1], Finished)


async def test_logprobs_belong_to_the_text_they_come_with() -> None:
    """The stop string's tokens and the end of text have none; offsets point into the text."""

    class Sure(ScriptedRunner):
        def run(self, batch: ScheduledBatch):
            outputs = super().run(batch)
            return [replace(output, top=(((5, -0.5),),) * len(output.token_ids)) for output in outputs]

    async with serving(Sure()) as service:
        stream = await opened(service)
        whole = CODEC.stream().push(tuple(naive_ar(CODEC.encode("hello"), 30, ignore_eos=True)))
        for name, stop in (("plain", ()), ("stopped", (whole[6:9],))):
            await service.submit(request(name, logprobs=1, stop=stop))
            events = [event for event in (await collect(stream, {name}))[name] if isinstance(event, Delta)]
            text = text_of(events)
            entries = [entry for event in events for entry in event.logprobs]
            assert b"".join(entry.bytes for entry in entries if entry.bytes != b"<eos>").decode() == text
            assert all(entry.offset < len(text) and len(entry.top) == 1 for entry in entries)
            at = 0
            for event in events:
                at += len(event.text)
                assert all(entry.offset < at for entry in event.logprobs)


async def test_what_forwards_come_to_cost_reaches_the_engine() -> None:
    engine = Engine(ScriptedRunner())
    service = ReplicaService(engine, CODEC, "replica", costs=ReplicaCosts(StepCost((1, 512), (5e3, 9e3))))
    service.start()
    stream = await opened(service)
    assert isinstance(await service.submit(request("a")), Accepted)
    await collect(stream, {"a"})
    learned = service.snapshot().costs
    await service.state()  # the engine's thread has obeyed by then
    assert learned is not None
    assert engine.scheduler.step_cost == learned.step
    assert learned.step.ms(1) < 5e3
    assert service.costs == learned
    await service.stop()
