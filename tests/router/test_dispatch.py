import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from policies.control.store import ClusterView
from policies.replica_load import ClusterLoad, ObservedLoad
from replicas.errors import ErrorCode, TriadError
from replicas.messages import Delta, GenerateRequest, SamplingParams
from router.dispatch import Dispatcher
from router.errors import Overloaded
from router.generation import Generation
from tests.eventually import eventually
from tests.router.conftest import QUICK, running
from tests.router.fakes import TEXT, WORDS, FakeDirectory, FakeStore, ScriptedReplica, a_load

CLOCK_RESOLUTION_S = 0.001


def a_request(request_id: str = "r", **more) -> GenerateRequest:
    return GenerateRequest(request_id, "", ("Hello",), SamplingParams(), **more)


async def until_submitted(replica: ScriptedReplica, num: int = 1) -> str:
    await eventually(lambda: len(replica.submitted) >= num)
    return replica.submitted[num - 1].request_id


def play(replica: ScriptedReplica, request_id: str, num: int = len(WORDS) + 1) -> None:
    for _ in range(num):
        replica.step(request_id)


async def whole(dispatcher: Dispatcher, request: GenerateRequest) -> str:
    async with Generation(dispatcher, request) as generation:
        return text_of(await generation.whole())


def text_of(deltas: tuple[Delta, ...]) -> str:
    """Of a request with one choice."""
    (delta,) = deltas
    return delta.text


async def test_text_arrives_in_order_and_ends_with_the_report(start):
    replica = ScriptedReplica("a")
    dispatcher = await start(replica)
    async with running(replica.run()), Generation(dispatcher, a_request()) as generation:
        assert "".join([text_of(deltas) async for deltas in generation.deltas()]) == TEXT
        assert generation.finished is not None
        assert generation.finished.report.replica_id == "a"
        assert dispatcher.in_flight() == {"a": 0}
    assert replica.cancelled == []


async def test_text_that_piled_up_comes_as_one(start):
    replica = ScriptedReplica("a")
    dispatcher = await start(replica)
    generation = Generation(dispatcher, a_request())
    entering = asyncio.create_task(generation.__aenter__())
    request_id = await until_submitted(replica)
    play(replica, request_id)
    await entering
    await eventually(lambda: dispatcher.in_flight() == {"a": 0})
    assert [text_of(deltas) async for deltas in generation.deltas()] == [TEXT]


async def begun(dispatcher: Dispatcher, replica: ScriptedReplica) -> tuple[Generation, str]:
    """A generation whose first word has come, and its id at the replica."""
    generation = Generation(dispatcher, a_request())
    entering = asyncio.create_task(generation.__aenter__())
    request_id = await until_submitted(replica)
    replica.step(request_id)
    await entering
    return generation, request_id


async def test_with_an_interval_the_first_piece_and_the_end_do_not_wait(start):
    replica = ScriptedReplica("a")
    dispatcher = await start(replica)
    generation, request_id = await begun(dispatcher, replica)
    news = generation.deltas(lambda: 1000.0)
    assert text_of(await anext(news)) == WORDS[0]
    rest = asyncio.create_task(anext(news))
    play(replica, request_id, len(WORDS))
    assert text_of(await rest) == "".join(WORDS[1:])
    assert [deltas async for deltas in news] == []
    assert generation.finished is not None


async def test_after_its_interval_a_piece_has_what_came_meanwhile(start):
    replica = ScriptedReplica("a")
    dispatcher = await start(replica)
    generation, request_id = await begun(dispatcher, replica)
    news = generation.deltas(lambda: 0.1)
    assert text_of(await anext(news)) == WORDS[0]
    began_s = asyncio.get_running_loop().time()
    piece = asyncio.create_task(anext(news))
    play(replica, request_id, 2)
    assert text_of(await piece) == WORDS[1] + WORDS[2]
    assert asyncio.get_running_loop().time() - began_s >= 0.1 - CLOCK_RESOLUTION_S
    await news.aclose()


async def test_within_an_interval_a_loss_is_told_at_once_after_the_text_before_it(start):
    replica = ScriptedReplica("a")
    dispatcher = await start(replica)
    generation, request_id = await begun(dispatcher, replica)
    news = generation.deltas(lambda: 1000.0)
    await anext(news)
    piece = asyncio.create_task(anext(news))
    replica.step(request_id)
    await eventually(lambda: len(generation._inbox) == 1)
    replica.break_channels()
    assert text_of(await piece) == WORDS[1]
    with pytest.raises(TriadError, match="was lost"):
        await anext(news)


async def test_entering_waits_for_the_first_event(start):
    replica = ScriptedReplica("a")
    dispatcher = await start(replica)
    entering = asyncio.create_task(Generation(dispatcher, a_request()).__aenter__())
    request_id = await until_submitted(replica)
    await eventually(lambda: dispatcher.in_flight() == {"a": 1})
    assert not entering.done()
    replica.step(request_id)
    await entering


async def test_events_may_overtake_the_reply_to_submit(start):
    replica = ScriptedReplica("a")
    dispatcher = await start(replica)
    real = replica.submit

    async def submit(request):
        reply = await real(request)
        play(replica, request.request_id)
        await eventually(lambda: dispatcher.in_flight() == {"a": 0})
        return reply

    replica.submit = submit
    assert await whole(dispatcher, a_request()) == TEXT


async def test_leaving_early_cancels_at_the_replica(start):
    replica = ScriptedReplica("a")
    dispatcher = await start(replica)
    entering = asyncio.create_task(whole(dispatcher, a_request()))
    request_id = await until_submitted(replica)
    replica.step(request_id)
    entering.cancel()
    await eventually(lambda: replica.cancelled == [request_id])
    assert dispatcher.in_flight() == {"a": 0}
    assert replica.live == {}


async def test_leaving_in_mid_submit_cancels_what_the_replica_took_all_the_same(start):
    replica = ScriptedReplica("a")
    dispatcher = await start(replica)
    release = asyncio.Event()
    replica.on_submit = release.wait
    held: list[asyncio.Task] = []
    real = replica.submit

    async def submit(request):
        # Like a call that has left this process: cancelling its caller doesn't stop it.
        held.append(asyncio.create_task(real(request)))
        return await asyncio.shield(held[0])

    replica.submit = submit
    task = asyncio.create_task(whole(dispatcher, a_request()))
    await eventually(lambda: held)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    release.set()
    await held[0]
    (request_id,) = replica.live
    replica.step(request_id)
    await eventually(lambda: replica.cancelled == [request_id])


@pytest.mark.parametrize("is_up", [True, False], ids=["channel broke", "replica gone"])
async def test_lost_before_any_text_goes_to_another_replica_once(start, is_up):
    replicas = [ScriptedReplica("a"), ScriptedReplica("b")]
    dispatcher = await start(*replicas)
    task = asyncio.create_task(whole(dispatcher, a_request()))
    await eventually(lambda: any(r.submitted for r in replicas))
    first, second = sorted(replicas, key=lambda r: len(r.submitted), reverse=True)
    first.is_up = is_up
    first.break_channels()
    request_id = await until_submitted(second)
    assert request_id != first.submitted[0].request_id
    play(second, request_id)
    assert await task == TEXT


async def test_a_second_loss_is_an_error(start):
    replicas = [ScriptedReplica(name) for name in "abc"]
    dispatcher = await start(*replicas)
    task = asyncio.create_task(whole(dispatcher, a_request()))
    lost: set[str] = set()
    for _ in range(2):
        await eventually(lambda: any(r.live for r in replicas))
        (at,) = [r for r in replicas if r.live]
        lost.add(at.info.replica_id)
        at.break_channels()
        await eventually(lambda at=at: not at.live)
    with pytest.raises(TriadError, match="was lost") as caught:
        await task
    assert caught.value.code is ErrorCode.UNAVAILABLE
    assert len(lost) == 2


async def test_lost_after_streamed_text_is_an_error_and_no_retry(start):
    replicas = [ScriptedReplica("a"), ScriptedReplica("b")]
    dispatcher = await start(*replicas)
    generation = Generation(dispatcher, a_request())
    entering = asyncio.create_task(generation.__aenter__())
    await eventually(lambda: any(r.live for r in replicas))
    (at,) = [r for r in replicas if r.live]
    at.step(at.submitted[0].request_id)
    await entering
    news = generation.deltas()
    assert text_of(await anext(news)) == WORDS[0]
    at.break_channels()
    with pytest.raises(TriadError) as caught:
        await anext(news)
    assert caught.value.code is ErrorCode.UNAVAILABLE
    assert sum(len(r.submitted) for r in replicas) == 1


async def test_an_answer_not_streamed_survives_a_loss_after_text(start):
    replicas = [ScriptedReplica("a"), ScriptedReplica("b")]
    dispatcher = await start(*replicas)
    task = asyncio.create_task(whole(dispatcher, a_request()))
    await eventually(lambda: any(r.live for r in replicas))
    (at,) = [r for r in replicas if r.live]
    (other,) = [r for r in replicas if r is not at]
    play(at, at.submitted[0].request_id, 3)
    await eventually(lambda: dispatcher.in_flight()[at.info.replica_id] == 1)
    at.break_channels()
    play(other, await until_submitted(other))
    assert await task == TEXT


async def test_a_broken_channel_opens_again_by_itself(start):
    replica = ScriptedReplica("a")
    dispatcher = await start(replica)
    replica.break_channels()
    await eventually(lambda: replica.num_channels == 0)
    await eventually(lambda: dispatcher.ready)
    async with running(replica.run()):
        assert await whole(dispatcher, a_request()) == TEXT


async def test_a_silent_channel_counts_as_broken(start):
    replica = ScriptedReplica("a")
    dispatcher = await start(replica, times=replace(QUICK, silence_s=0.05))
    task = asyncio.create_task(whole(dispatcher, a_request()))
    await until_submitted(replica)
    with pytest.raises(TriadError) as caught:
        await task
    assert caught.value.code is ErrorCode.UNAVAILABLE


@pytest.mark.parametrize("code", [ErrorCode.QUEUE_FULL, ErrorCode.UNAVAILABLE])
async def test_refused_by_one_replica_another_is_asked(start, code):
    full, free = ScriptedReplica("a"), ScriptedReplica("b")
    full.refusal = (code, "not now")
    loads = ClusterLoad((ObservedLoad(a_load("a"), 0.0), ObservedLoad(a_load("b", num_running=3), 0.0)))
    dispatcher = await start(full, free, store=FakeStore(view=ClusterView(loads)))
    async with running(free.run()):
        assert await whole(dispatcher, a_request()) == TEXT


async def test_refused_by_all_the_last_reason_is_told(start):
    replicas = [ScriptedReplica("a"), ScriptedReplica("b")]
    for replica in replicas:
        replica.refusal = (ErrorCode.QUEUE_FULL, "the queue is full")
    dispatcher = await start(*replicas)
    with pytest.raises(TriadError, match="the queue is full") as caught:
        await whole(dispatcher, a_request())
    assert caught.value.code is ErrorCode.QUEUE_FULL
    assert sum(dispatcher.in_flight().values()) == 0


async def test_a_bad_request_is_asked_of_one_replica_only(start):
    replicas = [ScriptedReplica("a"), ScriptedReplica("b")]
    for replica in replicas:
        replica.refusal = (ErrorCode.CONTEXT_LENGTH_EXCEEDED, "too long")
    dispatcher = await start(*replicas)
    with pytest.raises(TriadError, match="too long"):
        await whole(dispatcher, a_request())


async def test_a_failure_before_the_first_token_is_raised_on_entering(start):
    replica = ScriptedReplica("a")
    dispatcher = await start(replica)
    task = asyncio.create_task(whole(dispatcher, a_request(timeout_s=1.0)))
    replica.fail(await until_submitted(replica), ErrorCode.DEADLINE_EXCEEDED, "too late")
    with pytest.raises(TriadError, match="too late"):
        await task


async def test_without_replicas_a_request_fails_at_once(start):
    dispatcher = await start()
    assert not dispatcher.ready
    with pytest.raises(Overloaded) as caught:
        await whole(dispatcher, a_request())
    assert caught.value.code is ErrorCode.UNAVAILABLE


async def test_past_all_places_and_the_queue_requests_are_shed(start):
    replica = ScriptedReplica("a")
    dispatcher = await start(replica, max_waiting=2)
    tasks = [asyncio.create_task(whole(dispatcher, a_request(str(i)))) for i in range(4 + 2)]
    await until_submitted(replica, len(tasks))
    with pytest.raises(Overloaded) as caught:
        await whole(dispatcher, a_request("one too many"))
    assert caught.value.code is ErrorCode.QUEUE_FULL
    assert caught.value.retry_after_s >= 1
    async with running(replica.run()):
        assert await asyncio.gather(*tasks) == [TEXT] * len(tasks)


async def test_a_leaving_replica_ends_its_requests_and_takes_no_more(start):
    old, new = ScriptedReplica("old"), ScriptedReplica("new")
    directory = FakeDirectory([old])
    dispatcher = await start(old, directory=directory)
    task = asyncio.create_task(whole(dispatcher, a_request()))
    request_id = await until_submitted(old)
    directory.replicas = [new]
    await eventually(lambda: new.num_channels == 1)
    await eventually(lambda: not dispatcher._connections["old"].is_open)
    play(old, request_id)
    assert await task == TEXT
    old.idle()
    await eventually(lambda: old.num_channels == 0)
    await eventually(lambda: dispatcher.in_flight() == {"new": 0})
    async with running(new.run()):
        assert await whole(dispatcher, a_request()) == TEXT


@pytest.mark.parametrize("trouble", ["incomplete", "error"])
async def test_a_roster_in_trouble_removes_nobody(start, trouble):
    replica = ScriptedReplica("a")
    directory = FakeDirectory([replica])
    dispatcher = await start(replica, directory=directory)
    directory.replicas = []
    directory.complete = trouble != "incomplete"
    directory.error = RuntimeError("no answer") if trouble == "error" else None
    for _ in range(3):
        dispatcher._connections._look_again.set()
        await eventually(lambda: not dispatcher._connections._look_again.is_set())
    assert dispatcher.ready


async def test_load_decides_where_requests_go_and_own_counts_when_it_is_lost(start):
    replicas = [ScriptedReplica("a"), ScriptedReplica("b")]
    loads = ClusterLoad((ObservedLoad(a_load("a", num_running=4), 0.1), ObservedLoad(a_load("b"), 0.1)))
    store = FakeStore(view=ClusterView(loads))
    dispatcher = await start(*replicas, store=store)
    tasks = [asyncio.create_task(whole(dispatcher, a_request(str(i)))) for i in range(3)]
    await eventually(lambda: dispatcher.in_flight() == {"a": 0, "b": 3})
    dispatcher._view._read = {}
    tasks += [asyncio.create_task(whole(dispatcher, a_request(str(i)))) for i in range(3, 6)]
    await eventually(lambda: dispatcher.in_flight() == {"a": 3, "b": 3})
    for replica in replicas:
        for request_id in list(replica.live):
            play(replica, request_id)
    assert await asyncio.gather(*tasks) == [TEXT] * 6


async def test_a_prompt_goes_where_its_beginning_went(start):
    replicas = [ScriptedReplica(name) for name in "abc"]
    dispatcher = await start(*replicas)
    prompts = {name: name * 2000 for name in "xyz"}
    async with AsyncExitStack() as stack:
        for replica in replicas:
            await stack.enter_async_context(running(replica.run()))
        for _ in range(5):
            for prompt in prompts.values():
                await whole(dispatcher, replace(a_request(), prompts=(prompt,)))
    for prompt in prompts.values():
        assert sum(any(r.prompts == (prompt,) for r in replica.submitted) for replica in replicas) == 1


async def test_prompt_tokens_that_wait_are_limited_too(start):
    loads = ClusterLoad((ObservedLoad(a_load("a", num_waiting=1, waiting_prompt_tokens=900), 0.1),))
    replica = ScriptedReplica("a")
    dispatcher = await start(replica, store=FakeStore(view=ClusterView(loads)), max_waiting_tokens=1000)
    with pytest.raises(Overloaded, match="900 prompt tokens") as caught:
        await whole(dispatcher, replace(a_request(), prompts=((1,) * 101,)))
    assert caught.value.code is ErrorCode.QUEUE_FULL
    async with running(replica.run()):
        assert await whole(dispatcher, replace(a_request(), prompts=((1,) * 100,))) == TEXT
