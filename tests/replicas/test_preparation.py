"""Requests on their way to the engine: off the event loop, bounded, and gone when nobody waits for them."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Set
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from replicas.answer_forms import JsonFormat, Tool, ToolUse
from replicas.bounded_process import CallLimits
from replicas.engine.engine import Engine
from replicas.errors import ErrorCode, TriadError
from replicas.grammar_compiler import GrammarCompiler
from replicas.messages import Accepted, GenerateRequest, Prompt, Rejected, SamplingParams, TemplateOptions
from replicas.preparation import MAX_INLINE_CHARS, MAX_SHORT_CHARS, Preparation
from replicas.service import ReplicaService
from replicas.text import TextCodec
from replicas.text_stream import TextStream
from replicas.token_messages import Tokenized, TokenizeRequest
from tests.replicas.channel import channel_of
from tests.replicas.codec import byte_codec, tiny_tokenizer
from tests.replicas.engine.scripted import ScriptedRunner

CONTEXT = 2**20
SHORT, LONG = "s" * (MAX_INLINE_CHARS + 1), "l" * (MAX_SHORT_CHARS + 1)


class GatedCodec(TextCodec):
    """Encoding a long text begins, and goes on when it is let."""

    def __init__(self) -> None:
        super().__init__(tiny_tokenizer())
        self.began, self.gate = threading.Semaphore(0), threading.Semaphore(0)
        self.threads: list[int] = []
        self.streaming: list[int] = []

    def encode(self, prompt: Prompt, max_tokens: int | None = None, *more: Any, **named: Any) -> list[int]:
        self.threads.append(threading.get_ident())
        if prompt == LONG:
            self.began.release()
            assert self.gate.acquire(timeout=30)
        return super().encode(prompt, max_tokens, *more, **named)

    def stream(self, *more: Any, **named: Any) -> TextStream:
        self.streaming.append(threading.get_ident())
        return super().stream(*more, **named)

    def grammars(self, vocab_size: int, eos_token_ids: Set[int]) -> GrammarCompiler:
        backend = tiny_tokenizer().backend_tokenizer
        target = "tests.replicas.bounded_targets:prover_with_traps"
        limits = CallLimits(cpu_s=60.0)
        return GrammarCompiler(backend.to_str(), vocab_size, eos_token_ids, target=target, limits=limits)


class ManyPages(ScriptedRunner):
    def __init__(self) -> None:
        super().__init__(num_pages=CONTEXT // 4, max_context=CONTEXT)


@asynccontextmanager
async def preparing(max_requests: int = 8) -> AsyncIterator[tuple[Preparation, GatedCodec]]:
    codec = GatedCodec()
    preparation = Preparation(codec, codec.grammars(259, {2}), CONTEXT, max_requests)
    try:
        yield preparation, codec
    finally:
        codec.gate.release(100)
        preparation.close()


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[ReplicaService, GatedCodec]]:
    codec = GatedCodec()
    service = ReplicaService(Engine(ManyPages()), codec, "replica")
    service.start()
    try:
        yield service, codec
    finally:
        codec.gate.release(100)
        await service.stop()


def request(name: str, text: str, schema: str | None = None, channel: str = "c") -> GenerateRequest:
    form = None if schema is None else JsonFormat(schema)
    return GenerateRequest(name, channel, (text,), SamplingParams(max_tokens=4, response_format=form))


async def began(codec: GatedCodec) -> None:
    assert await asyncio.to_thread(codec.began.acquire, timeout=30)


async def test_long_prompts_are_encoded_elsewhere_and_short_ones_do_not_wait_for_them() -> None:
    async with preparing() as (preparation, codec):
        long = asyncio.create_task(preparation.prepare(request("long", LONG)))
        await began(codec)
        assert (await preparation.prepare(request("short", SHORT))).prompts == [codec.encode(SHORT)]
        assert (await preparation.prepare(request("inline", "hi"))).grammars == (None,)
        assert not long.done()
        assert threading.get_ident() not in codec.threads[:2]
        codec.gate.release()
        assert len((await long).prompts[0]) == len(LONG)


async def test_a_prompt_of_a_million_characters_leaves_the_loop_free() -> None:
    codec = byte_codec()
    preparation = Preparation(codec, codec.grammars(259, {2}), CONTEXT, 8)
    text = "the quick brown fox jumps over " * 32_000
    began_s = time.thread_time()
    prepared = await preparation.prepare(request("r", text))
    assert len(prepared.prompts[0]) == len(text)
    taken_s = time.thread_time() - began_s
    began_s = time.thread_time()
    codec.encode(text)
    assert taken_s < (time.thread_time() - began_s) / 10
    preparation.close()


TOOLS = tuple(Tool(f"f{k}", '{"type": "object"}', "Reads a file. " * 10) for k in range(30))
ODD = TemplateOptions(kwargs=json.dumps({"odd": "x" * MAX_INLINE_CHARS}))


@pytest.mark.parametrize(
    ("tools", "template", "is_elsewhere"),
    [
        ((), TemplateOptions(), False),
        (TOOLS[:1], TemplateOptions(kwargs='{"odd": 1}'), False),
        (TOOLS, TemplateOptions(), True),
        ((), ODD, True),
    ],
)
async def test_all_that_a_template_renders_counts(
    tools: tuple[Tool, ...], template: TemplateOptions, is_elsewhere: bool
) -> None:
    prompt = ({"role": "user", "content": "hi"},)
    async with preparing() as (preparation, codec):
        use = ToolUse(tools, frozenset()) if tools else None
        told = await preparation.tokens(TokenizeRequest(prompt, False, template, use))
        assert isinstance(told, Tokenized)
        if use is None:
            prepared = await preparation.prepare(
                replace(request("r", ""), prompts=(prompt,), template=template)
            )
            assert prepared.prompts == [list(told.token_ids)]
        assert {thread == threading.get_ident() for thread in codec.threads} == {not is_elsewhere}


@pytest.mark.parametrize("length", [5, MAX_INLINE_CHARS, MAX_SHORT_CHARS])
async def test_a_prompt_is_made_an_echo_once_for_all_its_choices(length: int) -> None:
    async with preparing() as (preparation, codec):
        texts = ("née" * length, "b" * length)
        ids = tuple(codec.encode(texts[0]))
        asked = replace(request("r", ""), prompts=(*texts, ids), num_choices=40, echo=True)
        prepared = await preparation.prepare(asked)
        assert [echo.text for echo in prepared.echoes] == [*texts, texts[0]]
        assert [echo.ids for echo in prepared.echoes] == prepared.prompts
        assert prepared.echoes[0].starts[:6] == [0, 1, 1, 2, 3, 4]
        assert len(codec.streaming) == 3
        assert (threading.get_ident() in codec.streaming) == (length == 5)
        assert (await preparation.prepare(replace(asked, echo=False))).echoes == []
        assert len(codec.streaming) == 3


async def test_what_can_never_fit_is_refused_by_its_length() -> None:
    async with preparing() as (preparation, _):
        for prompt, param in (
            ("x" * 2 * CONTEXT * 30, "prompt"),
            (({"role": "user", "content": ""},) * (CONTEXT + 1), "messages"),
        ):
            asked = replace(request("r", ""), prompts=(prompt,))
            with pytest.raises(TriadError) as caught:
                await preparation.prepare(asked)
            assert (caught.value.code, caught.value.param) == (ErrorCode.CONTEXT_LENGTH_EXCEEDED, param)


async def test_no_more_than_so_many_are_under_way() -> None:
    async with preparing(max_requests=2) as (preparation, codec):
        tasks = [asyncio.create_task(preparation.prepare(request(f"r{k}", LONG))) for k in range(2)]
        await began(codec)
        with pytest.raises(TriadError, match="retry later") as caught:
            await preparation.prepare(request("r2", LONG))
        assert caught.value.code is ErrorCode.QUEUE_FULL
        codec.gate.release(2)
        await asyncio.gather(*tasks)
        await preparation.prepare(request("r2", SHORT))


async def test_one_that_waits_too_long_for_a_thread_may_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicas.preparation.MAX_WAIT_S", 0.05)
    async with preparing() as (preparation, codec):
        first = asyncio.create_task(preparation.prepare(request("first", LONG)))
        await began(codec)
        with pytest.raises(TriadError, match="retry later") as caught:
            await preparation.prepare(request("second", LONG))
        assert caught.value.code is ErrorCode.QUEUE_FULL
        codec.gate.release()
        await first


async def test_the_same_request_twice_is_refused_while_it_is_prepared() -> None:
    async with preparing() as (preparation, codec):
        first = asyncio.create_task(preparation.prepare(request("r", LONG)))
        await began(codec)
        with pytest.raises(TriadError, match="running already"):
            await preparation.prepare(request("r", LONG))
        codec.gate.release()
        await first


@pytest.mark.parametrize("schema", [None, '{"title": "never comes back"}'])
async def test_a_cancel_while_a_request_is_prepared_leaves_nothing(schema: str | None) -> None:
    async with serving() as (service, codec):
        stream = channel_of(service, "c")
        await anext(stream)
        submitting = asyncio.create_task(service.submit(request("r", LONG, schema)))
        await began(codec)
        if schema is not None:
            codec.gate.release()  # it is the compile that goes on
        await service.cancel(("r", "unknown"))
        answer = await asyncio.wait_for(submitting, 20)
        assert isinstance(answer, Rejected)
        assert answer.code is ErrorCode.CANCELLED
        codec.gate.release()
        assert isinstance(await service.submit(request("r", "hello")), Accepted)
        await stream.aclose()


async def test_a_channel_that_closes_while_a_request_is_prepared_leaves_nothing() -> None:
    async with serving() as (service, codec):
        gone, stays = channel_of(service, "gone"), channel_of(service, "stays")
        await anext(gone)
        await anext(stays)
        orphan = asyncio.create_task(service.submit(request("orphan", LONG, channel="gone")))
        await began(codec)
        other = asyncio.create_task(service.submit(request("other", SHORT, channel="stays")))
        await gone.aclose()
        answer = await orphan
        assert isinstance(answer, Rejected)
        assert answer.code is ErrorCode.UNAVAILABLE
        assert isinstance(await other, Accepted)
        codec.gate.release()
        await service.state()
        assert set(service._requests.request_ids) <= {"other"}
        await stays.aclose()


async def test_a_caller_that_goes_while_its_request_is_prepared_leaves_nothing() -> None:
    async with serving() as (service, codec):
        stream = channel_of(service, "c")
        await anext(stream)
        submitting = asyncio.create_task(service.submit(request("r", LONG)))
        await began(codec)
        submitting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submitting
        codec.gate.release()
        assert isinstance(await service.submit(request("r", SHORT)), Accepted)
        await stream.aclose()


async def test_a_schema_that_never_comes_back_does_not_hold_up_the_end() -> None:
    async with serving() as (service, _):
        stream = channel_of(service, "c")
        await anext(stream)
        assert isinstance(await service.submit(request("json", "x", "{}")), Accepted)
        asked = request("r", "x", '{"title": "never comes back"}')
        submitting = asyncio.create_task(service.submit(asked))
        await asyncio.sleep(0)
        await asyncio.wait_for(service.stop(), 20)
        answer = await asyncio.wait_for(submitting, 20)
        assert isinstance(answer, Rejected)
        assert answer.code is ErrorCode.UNAVAILABLE
        assert isinstance(await service.submit(request("late", "x", "{}")), Rejected)
