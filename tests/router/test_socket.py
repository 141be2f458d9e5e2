"""The socket between an ingress and a replica."""

import asyncio
import pickle
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.modes import Mode
from replicas import outgoing, socket_server
from replicas.channels import Channel
from replicas.errors import ErrorCode
from replicas.messages import (
    Accepted,
    DecodingReport,
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    Rejected,
    SamplingParams,
    TextLogprob,
    TracedTokens,
)
from replicas.socket_server import SocketServer
from replicas.token_messages import TokenAnswer, TokenRequest
from replicas.wire import (
    MAX_HELLO_BYTES,
    SECRET_BYTES,
    Call,
    CallAnswer,
    FrameBuffer,
    FrameError,
    SocketAddress,
    answer_frame,
    call_frame,
    events_frame,
    hello_frame,
    read_call,
    read_from_replica,
    read_hello,
)
from router.socket_client import SocketReplicaClient
from tests.eventually import eventually

REQUEST = GenerateRequest("request-1", "channel", ("Hello",), SamplingParams(max_tokens=4))
INFO = ModelInfo("model", tuple(Mode), 1024, 300, "replica-0")

LOGPROBS = st.builds(TextLogprob, st.binary(max_size=4), st.floats(-50, 0), st.integers(0, 9))
TRACES = st.builds(
    TracedTokens, st.sampled_from(Mode), st.integers(0, 9), st.integers(1, 9), st.text(max_size=9)
)
DELTAS = st.builds(
    Delta,
    st.text(max_size=8),
    st.text(max_size=20),
    st.integers(0, 64),
    st.lists(LOGPROBS, max_size=2).map(tuple),
    st.integers(0, 127),
    st.sampled_from([None, *FinishReason]),
    st.lists(TRACES, max_size=2).map(tuple),
)
REPORTS = st.builds(
    DecodingReport, st.dictionaries(st.sampled_from(list(Mode)), st.integers(0, 99)), st.integers(0, 9)
)
ENDS = st.builds(Finished, st.text(max_size=8), st.integers(0, 99), st.integers(0, 99), REPORTS) | st.builds(
    Failed, st.text(max_size=8), st.sampled_from(list(ErrorCode)), st.text(max_size=9), st.none() | REPORTS
)
ITEMS = st.lists(DELTAS | ENDS, max_size=6).map(tuple)


class Recorded:
    """A service whose channels bring what the test puts in."""

    def __init__(self) -> None:
        self.channels: dict[str, Channel] = {}
        self.open: list[str] = []
        self.closed: list[str] = []
        self.submitted: list[GenerateRequest] = []
        self.cancelled: list[str] = []
        self.reply: Accepted | Rejected | Exception = Accepted("request-1", 5)
        self.may_reply = asyncio.Event()
        self.may_reply.set()

    async def submit(self, request: GenerateRequest) -> Accepted | Rejected:
        self.submitted.append(request)
        await self.may_reply.wait()
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply

    async def cancel(self, request_ids: tuple[str, ...]) -> None:
        self.cancelled += request_ids

    async def tokens(self, request: TokenRequest) -> TokenAnswer:
        return "text"

    def open_channel(self, channel_id: str, channel: Channel) -> None:
        self.channels[channel_id] = channel
        self.open.append(channel_id)

    def leave_channel(self, channel_id: str, channel: Channel) -> None:
        assert self.channels[channel_id] is channel
        self.closed.append(channel_id)


async def channel_of(client: SocketReplicaClient, channel_id: str) -> AsyncGenerator[tuple[Event, ...], None]:
    """What a channel brings until it ends; closing this closes it."""
    items: asyncio.Queue[tuple[Event, ...] | None] = asyncio.Queue()

    def take(events: tuple[Event, ...]) -> bool:
        items.put_nowait(events)
        return True

    holding = asyncio.create_task(client.hold_channel(channel_id, take))
    holding.add_done_callback(lambda _: items.put_nowait(None))
    try:
        while (item := await items.get()) is not None:
            yield item
    finally:
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[Recorded, SocketServer]]:
    service = Recorded()
    server = SocketServer(service, "127.0.0.1")
    await server.start()
    try:
        yield service, server
    finally:
        server.close()
        await server.drained()


async def read_to_the_end(address: SocketAddress, sent: bytes) -> bytes:
    """What a peer that sends these bytes gets until the replica closes the connection."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(sent)
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


@given(st.lists(ITEMS, max_size=4), st.integers(1, 40))
def test_events_are_the_same_after_the_wire_however_the_bytes_are_cut(items, size):
    stream = b"".join(map(events_frame, items))
    frames = FrameBuffer(2**20)
    found = []
    for begin in range(0, len(stream), size):
        found += frames.feed(stream[begin : begin + size])
    assert [read_from_replica(frame) for frame in found] == items


def test_calls_and_answers_are_the_same_after_the_wire():
    for call in (Call(3, "submit", REQUEST), Call(4, "cancel", ("a", "b"))):
        (frame,) = FrameBuffer(2**20).feed(call_frame(call))
        assert read_call(frame) == call
    for answer in (CallAnswer(3, Accepted("a", 7)), CallAnswer(4), CallAnswer(5, error="no")):
        (frame,) = FrameBuffer(2**20).feed(answer_frame(answer))
        assert read_from_replica(frame) == answer


def test_a_frame_too_long_is_refused_before_it_is_read():
    with pytest.raises(FrameError, match="at most 16"):
        list(FrameBuffer(16).feed(b"\0\0\0\x11"))


@given(st.binary(max_size=80))
def test_who_does_not_know_the_secret_has_no_channel(frame):
    secret = b"s" * SECRET_BYTES
    known = frame.startswith(secret)
    assert (read_hello(frame, secret) is not None) <= known
    (hello,) = FrameBuffer(MAX_HELLO_BYTES).feed(hello_frame(secret, "channel"))
    assert read_hello(hello, secret) == "channel"


def test_an_address_does_not_show_its_secret():
    address = SocketAddress("127.0.0.1", 1)
    assert str(address.secret) not in repr(address)
    assert len(address.secret) == SECRET_BYTES


async def test_calls_are_answered_and_events_arrive():
    async with listening() as (service, server):
        client = SocketReplicaClient(INFO, server.address)
        async with aclosing(channel_of(client, "channel-1")) as items:
            assert await anext(items) == ()
            assert await client.submit(REQUEST) == Accepted("request-1", 5)
            await client.cancel(("request-1",))
            assert service.submitted == [REQUEST]
            assert service.cancelled == ["request-1"]
            event = Delta("request-1", "text", 1)
            service.channels["channel-1"].send((event,))
            assert await anext(items) == (event,)
        await eventually(lambda: service.closed == ["channel-1"])
        await server.drained()


async def test_no_frame_waits_until_the_one_before_is_acknowledged():
    async with listening() as (_, server):
        client = SocketReplicaClient(INFO, server.address)
        async with aclosing(channel_of(client, "channel-1")) as items:
            await anext(items)
            (connection,) = server._connections
            peer = connection._transport.get_extra_info("socket")
            assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_call_that_fails_hurts_no_other():
    async with listening() as (service, server):
        client = SocketReplicaClient(INFO, server.address)
        async with aclosing(channel_of(client, "channel-1")) as items:
            await anext(items)
            service.reply = KeyError("a bug")
            with pytest.raises(ConnectionError, match="a bug"):
                await client.submit(REQUEST)
            service.reply = Rejected("request-1", ErrorCode.QUEUE_FULL, "full")
            assert await client.submit(REQUEST) == service.reply


async def test_calls_under_way_end_with_the_connection():
    async with listening() as (service, server):
        client = SocketReplicaClient(INFO, server.address)
        async with aclosing(channel_of(client, "channel-1")) as items:
            await anext(items)
            service.may_reply.clear()
            calls = [asyncio.create_task(client.submit(REQUEST)) for _ in range(3)]
            await eventually(lambda: len(service.submitted) == 3)
            server.close()
            for call in calls:
                with pytest.raises(ConnectionError):
                    await call
            assert [item async for item in items] == []
        with pytest.raises(ConnectionError, match="no connection"):
            await client.submit(REQUEST)


async def test_a_channel_that_ends_closes_its_connection_after_its_last_event():
    async with listening() as (service, server):
        client = SocketReplicaClient(INFO, server.address)
        last = Failed("request-1", ErrorCode.UNAVAILABLE, "shutting down")
        async with aclosing(channel_of(client, "channel-1")) as items:
            await anext(items)
            service.channels["channel-1"].send((last,))
            service.channels["channel-1"].end()
            assert [item async for item in items] == [(last,)]


class Exploding:
    """What ends the test if it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("a stranger's bytes were unpickled",)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 64,
        hello_frame(b"x" * SECRET_BYTES, "channel-1"),
        hello_frame(b"", "channel-1"),
        hello_frame(b"x" * SECRET_BYTES, "c" * 500),
        len(pickle.dumps(Exploding())).to_bytes(4, "big") + pickle.dumps(Exploding()),
    ],
)
async def test_a_stranger_is_shown_out_and_others_are_served(sent):
    async with listening() as (service, server):
        assert await read_to_the_end(server.address, sent) == b""
        assert service.open == []
        client = SocketReplicaClient(INFO, server.address)
        async with aclosing(channel_of(client, "channel-1")) as items:
            assert await anext(items) == ()


async def test_a_call_of_another_version_ends_its_connection_and_no_other():
    async with listening() as (service, server):
        client = SocketReplicaClient(INFO, server.address)
        async with aclosing(channel_of(client, "channel-1")) as items:
            assert await anext(items) == ()
            for unread in (b"\x80\x05.", pickle.dumps((1, "submit")), b"cno_such_module\nname\n."):
                frame = len(unread).to_bytes(4, "big") + unread
                hello = hello_frame(server.address.secret, "channel-2")
                await read_to_the_end(server.address, hello + frame)
            assert "channel-1" not in service.closed
            assert await client.submit(REQUEST) == Accepted("request-1", 5)


@pytest.mark.parametrize(
    "frame", [b"E\x80\x05.", b"E" + pickle.dumps([(1, 2)]), b"A" + pickle.dumps((1, 2, 3, 4))]
)
def test_a_message_of_another_version_is_no_frame(frame):
    with pytest.raises(FrameError, match="can't be read"):
        read_from_replica(frame)


async def test_who_says_nothing_is_shown_out(monkeypatch):
    monkeypatch.setattr(socket_server, "HELLO_S", 0.05)
    async with listening() as (service, server):
        assert await read_to_the_end(server.address, b"\0\0") == b""
        assert service.open == []


async def test_what_one_thread_sends_arrives_in_order_whole_and_before_the_end():
    async with listening() as (service, server):
        client = SocketReplicaClient(INFO, server.address)
        async with aclosing(channel_of(client, "channel-1")) as items:
            await anext(items)
            channel = service.channels["channel-1"]
            sent = [Delta("request-1", str(number) * 2**16, number) for number in range(200)]

            def engine() -> None:
                for event in sent:
                    channel.send((event,))

            await asyncio.to_thread(engine)
            assert await client.submit(REQUEST) == Accepted("request-1", 5)  # its answer came behind them
            channel.end()
            assert [event async for item in items for event in item] == sent


async def test_a_peer_that_reads_nothing_holds_up_nobody_and_is_given_up(monkeypatch):
    monkeypatch.setattr(outgoing, "MAX_WAITING_BYTES", 2**25)
    async with listening() as (service, server):
        with socket.create_connection((server.address.host, server.address.port)) as peer:
            peer.sendall(hello_frame(server.address.secret, "slow"))
            await eventually(lambda: service.open == ["slow"])
            text = "x" * 2**20

            def engine() -> None:
                for _ in range(64):
                    service.channels["slow"].send((Delta("request-1", text, 1),))

            client = SocketReplicaClient(INFO, server.address)
            async with aclosing(channel_of(client, "quick")) as items:
                assert await anext(items) == ()
                await asyncio.to_thread(engine)
                assert await client.submit(REQUEST) == Accepted("request-1", 5)
                await eventually(lambda: "slow" in service.closed)
                assert "quick" not in service.closed


async def test_drained_waits_for_the_last_ingress():
    async with listening() as (_, server):
        client = SocketReplicaClient(INFO, server.address)
        async with aclosing(channel_of(client, "channel-1")) as items:
            await anext(items)
            waiting = asyncio.create_task(server.drained())
            await client.cancel(())
            assert not waiting.done()
        await waiting
