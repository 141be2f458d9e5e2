"""The ingress's side of the socket to a replica."""

import asyncio
import itertools
from typing import cast

from replicas.messages import Accepted, GenerateRequest, ModelInfo, Rejected
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
from router.replica_connection import OnEvents


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

    async def hold_channel(self, channel_id: str, on_events: OnEvents) -> None:
        """As of ReplicaClient. Raises OSError where the replica can't be reached."""
        loop = asyncio.get_running_loop()
        host, port = self._address.host, self._address.port
        transport, connection = await loop.create_connection(lambda: _Connection(on_events), host, port)
        transport.write(hello_frame(self._address.secret, channel_id))
        self._connection = connection
        try:
            await connection.ended
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

    on_events: given what its channel brings, as it comes
    """

    def __init__(self, on_events: OnEvents) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        """Done once nothing comes any more."""
        self._on_events = on_events
        self._frames = FrameBuffer(MAX_FRAME_BYTES)
        self._numbers = itertools.count()
        self._calls: dict[int, asyncio.Future[object]] = {}

    async def call(self, method: Method, argument: object) -> object:
        """Returns the replica's answer. Raises ConnectionError where none comes."""
        if self.ended.done():
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
                elif not self._on_events(message):
                    self._transport.abort()
                    return
        except FrameError:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        for answered in self._calls.values():
            if not answered.done():
                answered.set_exception(ConnectionError(f"the connection to the replica was lost: {error}"))
        if not self.ended.done():
            self.ended.set_result(None)

    def _answered(self, answer: CallAnswer) -> None:
        waiting = self._calls.get(answer.number)
        if waiting is None or waiting.done():
            return  # its caller has gone
        if answer.error is not None:
            waiting.set_exception(ConnectionError(f"the replica could not do it: {answer.error}"))
        else:
            waiting.set_result(answer.value)
