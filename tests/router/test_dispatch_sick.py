"""A replica that fails what it is sent, and prompts that no replica can serve, hurt nobody else."""

import asyncio
from dataclasses import replace

import pytest

from policies.control.store import ClusterView
from policies.replica_load import ClusterLoad, ObservedLoad
from replicas.errors import ErrorCode, TriadError
from replicas.messages import Accepted, GenerateRequest, ModelInfo, Rejected, SamplingParams
from replicas.token_messages import TokenizeRequest
from router.dispatch import MAX_UNSURE
from router.ejection import MAX_FAILURES
from router.errors import Overloaded
from router.generation import MAX_LOSSES, Generation
from tests.eventually import eventually
from tests.replicas.engine.scripted import ScriptedRunner
from tests.router.conftest import running
from tests.router.fakes import TEXT, FakeStore, ScriptedReplica, a_load
from tests.router.stack import a_stack
from tests.router.test_dispatch import a_request, play, text_of, until_submitted, whole

CONTEXT = 1024


class SickReplica(ScriptedReplica):
    """Fails every request as soon as it has accepted it, after num_words words."""

    def __init__(self, replica_id: str, code: ErrorCode, num_words: int = 0):
        super().__init__(replica_id)
        self._code = code
        self._num_words = num_words

    async def submit(self, request: GenerateRequest) -> Accepted | Rejected:
        reply = await super().submit(request)
        play(self, request.request_id, self._num_words)
        self.fail(request.request_id, self._code, "the model's forward failed")
        return reply


def sick_looks_emptiest() -> FakeStore:
    loads = (ObservedLoad(a_load("good", num_running=3), 0.0), ObservedLoad(a_load("sick"), 0.0))
    return FakeStore(view=ClusterView(ClusterLoad(loads)))


@pytest.mark.parametrize("code", [ErrorCode.INTERNAL, ErrorCode.UNAVAILABLE])
async def test_a_replica_that_fails_each_request_at_once_draws_no_traffic(start, code):
    sick, good = SickReplica("sick", code), ScriptedReplica("good")
    dispatcher = await start(sick, good, store=sick_looks_emptiest())
    async with running(good.run()):
        for number in range(100):
            assert await whole(dispatcher, a_request(str(number))) == TEXT
    assert len(sick.submitted) == MAX_FAILURES


async def test_one_that_fails_each_stream_after_its_first_words_is_left_out_too(start):
    sick, good = SickReplica("sick", ErrorCode.INTERNAL, num_words=2), ScriptedReplica("good")
    dispatcher = await start(sick, good, store=sick_looks_emptiest())
    num_failed = 0
    async with running(good.run()):
        for number in range(50):
            try:
                async with Generation(dispatcher, a_request(str(number))) as generation:
                    assert "".join([text_of(deltas) async for deltas in generation.deltas()]) == TEXT
            except TriadError:
                num_failed += 1
    assert num_failed == MAX_FAILURES, "what has begun to be told can't be told anew"


async def test_what_no_replica_can_be_sent_is_told_of_its_request_alone():
    message = {"role": "user", "content": "x", "odd": lambda: None}
    odd = replace(a_request(), prompts=((message,),))
    asked = TokenizeRequest((message,), False, odd.template, None, False)
    async with a_stack([ScriptedRunner(), ScriptedRunner()]) as stack:
        dispatcher = stack.dispatcher
        for attempt in (lambda: whole(dispatcher, odd), lambda: dispatcher.tokens(asked)):
            for _ in range(2 * MAX_FAILURES):
                with pytest.raises(TriadError, match="can't be sent") as caught:
                    await attempt()
                assert caught.value.code is ErrorCode.INVALID_REQUEST
        assert not dispatcher._connections._watch._failing
        await stack.settled()


async def test_a_lone_replica_that_fails_goes_on_being_asked_and_its_own_error_is_told(start):
    sick = SickReplica("sick", ErrorCode.INTERNAL)
    dispatcher = await start(sick)
    for number in range(2 * MAX_FAILURES):
        with pytest.raises(TriadError, match="forward failed") as caught:
            await whole(dispatcher, a_request(str(number)))
        assert caught.value.code is ErrorCode.INTERNAL
    assert len(sick.submitted) == 2 * MAX_FAILURES
    assert dispatcher.ready


@pytest.mark.parametrize(
    "code",
    [ErrorCode.INVALID_REQUEST, ErrorCode.DEADLINE_EXCEEDED, ErrorCode.CONTEXT_LENGTH_EXCEEDED],
)
async def test_a_requests_own_error_is_neither_tried_elsewhere_nor_held_against_the_replica(start, code):
    sick, good = SickReplica("sick", code), ScriptedReplica("good")
    dispatcher = await start(sick, good, store=sick_looks_emptiest())
    for number in range(2 * MAX_FAILURES):
        with pytest.raises(TriadError):
            await whole(dispatcher, a_request(str(number)))
    assert len(sick.submitted) == 2 * MAX_FAILURES
    assert good.submitted == []


async def test_a_request_that_brings_down_its_replicas_brings_down_two_at_most(start):
    replicas = [SickReplica(name, ErrorCode.INTERNAL) for name in "abcd"]
    dispatcher = await start(*replicas)
    with pytest.raises(TriadError):
        await whole(dispatcher, a_request())
    assert sum(len(replica.submitted) for replica in replicas) == 1 + MAX_LOSSES


async def test_a_submit_that_breaks_off_is_tried_elsewhere_once(start):
    replicas = [ScriptedReplica(name) for name in "abcd"]
    dispatcher = await start(*replicas)
    num_asked = 0

    async def breaks() -> None:
        nonlocal num_asked
        num_asked += 1
        raise ConnectionError("in mid-call")

    for replica in replicas:
        replica.on_submit = breaks
    with pytest.raises(TriadError, match="could not be reached"):
        await whole(dispatcher, a_request())
    assert num_asked == 1 + MAX_LOSSES
    assert sum(dispatcher.in_flight().values()) == 0


async def test_a_request_that_lost_its_replica_is_not_refused_for_want_of_room(start):
    """It was let in once, and others have taken the places since."""
    replicas = [ScriptedReplica("a"), ScriptedReplica("b")]
    dispatcher = await start(*replicas, max_waiting=0)
    tasks = [asyncio.create_task(whole(dispatcher, a_request(str(number)))) for number in range(8)]
    await eventually(lambda: sum(len(replica.live) for replica in replicas) == 8)
    with pytest.raises(Overloaded):
        await whole(dispatcher, a_request("one too many"))
    lost, other = replicas
    lost.break_channels()
    await eventually(lambda: len(other.live) == 8)
    async with running(other.run()):
        assert await asyncio.gather(*tasks) == [TEXT] * 8


async def test_choices_take_places_and_not_requests(start):
    replica = ScriptedReplica("a")
    dispatcher = await start(replica, max_waiting=2)
    many = asyncio.create_task(Generation(dispatcher, replace(a_request("many"), num_choices=5)).__aenter__())
    await until_submitted(replica)
    with pytest.raises(Overloaded):
        await whole(dispatcher, replace(a_request("more"), num_choices=2))
    one = asyncio.create_task(Generation(dispatcher, a_request("one")).__aenter__())
    await until_submitted(replica, 2)
    assert dispatcher.in_flight() == {"a": 2}
    for task in (many, one):
        task.cancel()
    await asyncio.gather(many, one, return_exceptions=True)


@pytest.mark.parametrize(
    ("more", "param"), [({"num_choices": 13}, "n"), ({"prompts": ("x",) * 13}, "prompt")]
)
async def test_more_choices_than_a_replica_has_places_are_a_bad_request_and_no_full_cluster(
    start, more, param
):
    replica = ScriptedReplica("a")
    dispatcher = await start(replica, max_waiting=8)
    with pytest.raises(TriadError, match="13 completions, but a replica takes 12") as caught:
        await whole(dispatcher, replace(a_request(), **more))
    assert (caught.value.code, caught.value.param) == (ErrorCode.INVALID_REQUEST, param)
    assert replica.submitted == []


class SlowReader(ScriptedReplica):
    """Refuses prompts of more than its context, after reading them, which takes until `read` is set."""

    def __init__(self, replica_id: str, max_prompt_chars: int | None = None):
        super().__init__(replica_id)
        self._info = ModelInfo(
            self.info.name, self.info.modes, CONTEXT, 500, replica_id, max_prompt_chars=max_prompt_chars
        )
        self.read = asyncio.Event()
        self.num_read = 0

    async def submit(self, request: GenerateRequest) -> Accepted | Rejected:
        if len(request.prompts[0]) > 4 * CONTEXT:
            self.num_read += 1
            await self.read.wait()
            return Rejected(request.request_id, ErrorCode.CONTEXT_LENGTH_EXCEEDED, "too long", "prompt")
        return await super().submit(request)


def unfit(name: str, num_chars: int = 20 * CONTEXT) -> GenerateRequest:
    return GenerateRequest(name, "", ("x" * num_chars,), SamplingParams())


async def test_prompts_that_never_fit_take_no_place_from_ordinary_ones(start):
    """A client in a loop sends them, and each takes a replica a while to read."""
    replica = SlowReader("a")
    dispatcher = await start(replica, max_waiting=0)
    flood = [asyncio.create_task(whole(dispatcher, unfit(str(number)))) for number in range(100)]
    await eventually(lambda: replica.num_read == MAX_UNSURE)
    async with running(replica.run()):
        for number in range(32):
            batch = [whole(dispatcher, a_request(f"{number} {index}")) for index in range(4)]
            assert await asyncio.gather(*batch) == [TEXT] * 4
    replica.read.set()
    errors = await asyncio.gather(*flood, return_exceptions=True)
    codes = [error.code for error in errors if isinstance(error, TriadError)]
    assert len(codes) == 100
    assert set(codes) == {ErrorCode.CONTEXT_LENGTH_EXCEEDED, ErrorCode.QUEUE_FULL}
    assert codes.count(ErrorCode.CONTEXT_LENGTH_EXCEEDED) == MAX_UNSURE
    assert dispatcher._num_unsure == 0
    assert dispatcher._traffic.in_flight("a") == 0


async def test_what_the_replica_refuses_is_taken_out_at_once(start):
    replica = SlowReader("a")
    replica.read.set()
    dispatcher = await start(replica, max_waiting=0)
    for number in range(50):
        with pytest.raises(TriadError) as caught:
            await whole(dispatcher, unfit(str(number), 4 * CONTEXT + 1))
        assert caught.value.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED
    async with running(replica.run()):
        assert await asyncio.gather(*(whole(dispatcher, a_request(str(n))) for n in range(4))) == [TEXT] * 4


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ("x" * 9000, "prompt"),
        ((1,) * CONTEXT, "prompt"),
        (({"role": "system", "content": "s"}, {"role": "user", "content": "x" * 9000}), "messages"),
    ],
)
async def test_a_prompt_that_no_tokenizer_makes_fit_is_refused_before_it_is_sent(start, prompt, param):
    replica = SlowReader("a", max_prompt_chars=8 * CONTEXT)
    dispatcher = await start(replica)
    await eventually(lambda: dispatcher.model is not None)
    with pytest.raises(TriadError, match=f"context length is {CONTEXT} tokens") as caught:
        await whole(dispatcher, replace(a_request(), prompts=(prompt,)))
    assert (caught.value.code, caught.value.param) == (ErrorCode.CONTEXT_LENGTH_EXCEEDED, param)
    assert replica.num_read == 0


async def test_what_a_template_may_leave_out_of_a_chat_does_not_count_against_it(start):
    replica = SlowReader("a", max_prompt_chars=8 * CONTEXT)
    dispatcher = await start(replica)
    chat = (
        {"role": "user", "content": "hello" + " " * 9000},
        {"role": "assistant", "content": "<think>" + "x" * 9000 + "</think>"},
        {"role": "user", "content": "again"},
    )
    async with running(replica.run()):
        assert await whole(dispatcher, replace(a_request(), prompts=(chat,))) == TEXT


class Poisoned(ScriptedRunner):
    def run(self, batch):  # type: ignore[no-untyped-def]
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


async def test_with_real_replicas_one_of_which_fails_each_forward_all_requests_end_well():
    async with a_stack([Poisoned(), ScriptedRunner()]) as stack:
        for number in range(100):
            request = GenerateRequest(f"r{number}", "", ("hello",), SamplingParams(max_tokens=5))
            async with Generation(stack.dispatcher, request) as generation:
                await generation.whole()
                assert generation.finished is not None
                assert generation.finished.report.replica_id != stack.replicas[0].service.replica_id
        dead, sound = (replica.service for replica in stack.replicas)
        with pytest.raises(RuntimeError, match="died"):
            dead.check()
        await eventually(lambda: sound.snapshot().num_in_flight == 0)
        assert sum(stack.dispatcher.in_flight().values()) == 0
