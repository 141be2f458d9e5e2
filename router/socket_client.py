"""The ingress's side of the socket to a replica."""

import asyncio
import itertools
from collections.abc import AsyncGenerator
from typing import cast

from replicas.mailbox import Mailbox
from replicas.messages import Accepted, Event, GenerateRequest, ModelInfo, Rejected
from replicas.token_messages import TokenAnswer, TokenRequest
from replicas.wire import (
    MAX_FRAME_BYTES,
    Call,
    CallAnswer,
    FrameBuffer,
    FrameError,
    Method,
    SocketAddress,
    call_frame,
    hello_frame,
    read_from_replica,
)


class SocketReplicaClient:
    """router.replica_connection.ReplicaClient over a socket, which is open while its channel is."""

    def __init__(self, info: ModelInfo, address: SocketAddress):
        self.info = info
        self._address = address
        self._connection: _Connection | None = None

    async def submit(self, request: GenerateRequest) -> Accepted | Rejected:
        return cast("Accepted | Rejected", await self._call("submit", request))

    async def cancel(self, request_ids: tuple[str, ...]) -> None:
        await self._call("cancel", request_ids)

    async def tokens(self, request: TokenRequest) -> TokenAnswer:
        return cast("TokenAnswer", await self._call("tokens", request))

    async def channel(self, channel_id: str) -> AsyncGenerator[tuple[Event, ...], None]:
        """As of ReplicaClient. Raises OSError where the replica can't be reached."""
        loop = asyncio.get_running_loop()
        host, port = self._address.host, self._address.port
        transport, connection = await loop.create_connection(_Connection, host, port)
        transport.write(hello_frame(self._address.secret, channel_id))
        self._connection = connection
        try:
            while (events := await connection.events.take()) is not None:
                yield tuple(events)
        finally:
            transport.abort()
            if self._connection is connection:
                self._connection = None

    async def _call(self, method: Method, argument: object) -> object:
        if self._connection is None:
            raise ConnectionError(f"no connection to replica {self.info.replica_id} is open")
        return await self._connection.call(method, argument)


class _Connection(asyncio.Protocol):
    """A connection to a replica.

    events: what its channel brought; they end with the connection
    """

    def __init__(self) -> None:
        self.events: Mailbox[Event] = Mailbox()
        self._frames = FrameBuffer(MAX_FRAME_BYTES)
        self._numbers = itertools.count()
        self._calls: dict[int, asyncio.Future[object]] = {}
        self._has_ended = False

    async def call(self, method: Method, argument: object) -> object:
        """Returns the replica's answer. Raises ConnectionError where none comes."""
        if self._has_ended:
            raise ConnectionError("the connection has ended")
        number = next(self._numbers)
        answered = self._calls[number] = asyncio.get_running_loop().create_future()
        try:
            self._transport.write(call_frame(Call(number, method, argument)))
            return await answered
        finally:
            del self._calls[number]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._frames.feed(data):
                message = read_from_replica(frame)
                if isinstance(message, CallAnswer):
                    self._answered(message)
                else:
                    self.events.put(message)
        except FrameError:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._has_ended = True
        for answered in self._calls.values():
            if not answered.done():
                answered.set_exception(ConnectionError(f"the connection to the replica was lost: {error}"))
        self.events.end()

    def _answered(self, answer: CallAnswer) -> None:
        waiting = self._calls.get(answer.number)
        if waiting is None or waiting.done():
            return  # its caller has gone
        if answer.error is not None:
            waiting.set_exception(ConnectionError(f"the replica could not do it: {answer.error}"))
        else:
            waiting.set_result(answer.value)
