"""The light client: tokens count as they arrive, however the stream is cut, and a bad stream is an error."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from benchmarks.load import LoadError
from benchmarks.stream_client import Ask, Clients, StreamConnection, Tally, over_http
from tests.eventually import eventually

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
REQUEST = b"POST / HTTP/1.1\r\n\r\n"


def event(num_tokens: int, text: str = "a") -> bytes:
    usage = b'"usage":{"prompt_tokens":7,"completion_tokens":%d,"total_tokens":9}' % num_tokens
    return b'data: {"choices":[{"delta":{"content":"%b"}}],%b}\n\n' % (text.encode(), usage)


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


WHOLE = HEAD + chunked(event(0, ""), event(1), event(5) + event(9), event(9) + b"data: [DONE]\n\n")


@asynccontextmanager
async def server(answers: Iterator[list[bytes]]) -> AsyncIterator[int]:
    """Answers each request on a connection with the pieces that come next; without any it closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 16):
            pieces = next(answers, [])
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if not b"".join(pieces).endswith(b"0\r\n\r\n"):
                break
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        yield listening.sockets[0].getsockname()[1]


@pytest.mark.parametrize("size", [1, 2, 7, 64, len(WHOLE)])
async def test_tokens_count_once_however_the_stream_is_cut(size: int) -> None:
    pieces = [WHOLE[at : at + size] for at in range(0, len(WHOLE), size)]
    tally = Tally()
    async with server(iter([pieces, pieces])) as port:
        connection = StreamConnection(port)
        await connection.ask(REQUEST, tally)
        assert (tally.num_tokens, tally.num_chunks, tally.num_requests) == (9, 5, 1)
        await connection.ask(REQUEST, tally)
        connection.close()
    assert (tally.num_tokens, tally.num_chunks, tally.num_requests) == (18, 10, 2)
    assert len(tally.ttfts_s) == len(tally.tpots_s) == 2


async def test_tokens_count_before_their_request_ends() -> None:
    go_on = asyncio.Event()
    tally = Tally()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        begun = HEAD + chunked(event(0, ""), event(5))[: -len(b"0\r\n\r\n")]
        writer.write(begun)
        await go_on.wait()
        writer.write(chunked(event(9) + b"data: [DONE]\n\n"))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        connection = StreamConnection(listening.sockets[0].getsockname()[1])
        asking = asyncio.create_task(connection.ask(REQUEST, tally))
        await eventually(lambda: tally.num_tokens)
        assert (tally.num_tokens, tally.num_requests) == (5, 0)
        go_on.set()
        await asking
        connection.close()
    assert (tally.num_tokens, tally.num_requests) == (9, 1)


@pytest.mark.parametrize(
    "answer",
    [
        b'HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{"',
        WHOLE[:-30],
        HEAD + chunked(event(3), b'data: {"error":{"message":"lost"}}\n\n'),
    ],
)
async def test_what_is_no_whole_stream_is_an_error_and_the_next_request_goes_on(answer: bytes) -> None:
    tally = Tally()
    async with server(iter([[answer], [WHOLE]])) as port:
        connection = StreamConnection(port)
        with pytest.raises(LoadError):
            await connection.ask(REQUEST, tally)
        assert tally.num_requests == 0
        await connection.ask(REQUEST, tally)
        connection.close()
    assert tally.num_requests == 1


async def test_text_that_looks_like_a_count_or_an_error_is_text() -> None:
    text = r"\"completion_tokens\":999,\"error\":1"
    tally = Tally()
    async with server(iter([[HEAD + chunked(event(2, text), b"data: [DONE]\n\n")]])) as port:
        connection = StreamConnection(port)
        await connection.ask(REQUEST, tally)
        connection.close()
    assert tally.num_tokens == 2


async def test_the_number_of_clients_follows_and_each_ends_its_request() -> None:
    running, most = 0, 0
    tick = asyncio.Condition()

    @asynccontextmanager
    async def opener() -> AsyncIterator[Ask]:
        async def ask(prompt: str, tally: Tally) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            async with tick:
                await tick.wait()
            running -= 1
            tally.num_requests += 1

        yield ask

    async def turn() -> None:
        before = running
        for _ in range(10):
            await asyncio.sleep(0)
        async with tick:
            tick.notify_all()
        for _ in range(10 * (before + 1)):
            await asyncio.sleep(0)

    clients = Clients(opener, ["a", "b"])
    clients.set_number(3)
    await turn()
    assert running == 3
    clients.set_number(1)
    assert running == 3
    await turn()
    assert running == 1
    clients.set_number(4)
    await turn()
    assert running == most == 4
    leaving = asyncio.create_task(clients.leave())
    await turn()
    await leaving
    assert running == 0


async def test_clients_of_a_server_that_answers_nothing_give_up() -> None:
    async with server(iter([])) as port:
        pass
    clients = Clients(over_http(port, "m", 4, True, {}), ["a"])
    clients.set_number(1)
    with pytest.raises(LoadError):
        await clients.hold(30.0)
