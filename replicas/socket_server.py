"""The replica's side of the sockets to its ingresses: calls come in, and a channel's events go out.

One connection is one token channel. It goes by plain TCP, as Serve's own streams cost about 0.35 ms of CPU
an item on each side, several times what a step's events cost otherwise. The engine's thread writes to the
socket itself, so a step wakes nobody here.
"""

import asyncio
import logging
import socket
from collections.abc import Sequence
from typing import Any, Protocol, cast

from replicas.channels import Channel
from replicas.messages import Accepted, Event, GenerateRequest, Rejected
from replicas.outgoing import Outgoing
from replicas.token_messages import TokenAnswer, TokenRequest
from replicas.wire import (
    MAX_FRAME_BYTES,
    MAX_HELLO_BYTES,
    Call,
    CallAnswer,
    FrameBuffer,
    FrameError,
    SocketAddress,
    answer_frame,
    events_frame,
    read_call,
    read_hello,
)

logger = logging.getLogger(__name__)

HELLO_S = 5.0
"""The time in which a peer must have sent its first frame."""
KEEP_ALIVE_S = 1.0
"""The time after which there is an item again, be it empty."""
SILENCE_MS = 15_000
"""The time after which a peer that acknowledges nothing counts as gone."""


class Service(Protocol):
    """What is served, as replicas.service.ReplicaService has it."""

    async def submit(self, request: GenerateRequest) -> Accepted | Rejected: ...

    async def cancel(self, request_ids: tuple[str, ...]) -> None: ...

    async def tokens(self, request: TokenRequest) -> TokenAnswer: ...

    def open_channel(self, channel_id: str, channel: Channel) -> None: ...

    def leave_channel(self, channel_id: str, channel: Channel) -> None: ...


class SocketServer:
    """Listens for ingresses from its making on, and serves them from start() on.

    host: the address of this machine by which the ingresses reach it. Raises OSError where it has no such.
    """

    def __init__(self, service: Service, host: str):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family)
        self.address = SocketAddress(host, self._socket.getsockname()[1])
        self._service = service
        self._connections: set[_Connection] = set()
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connection, sock=self._socket)

    async def drained(self) -> None:
        """Waits until no ingress is connected: each leaves with the last request that it has here."""
        await self._is_empty.wait()

    def close(self) -> None:
        """Ends all connections, and with them the requests on them."""
        if self._server is None:
            self._socket.close()
        else:
            self._server.close()
        for connection in tuple(self._connections):
            connection.abort()

    def joined(self, connection: "_Connection") -> None:
        self._connections.add(connection)
        self._is_empty.clear()

    def left(self, connection: "_Connection") -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._is_empty.set()

    def _connection(self) -> "_Connection":
        return _Connection(self, self._service, self.address.secret)


class _Connection(asyncio.Protocol):
    """One ingress's connection, which is a replicas.channels.Channel."""

    def __init__(self, server: SocketServer, service: Service, secret: bytes):
        self._server = server
        self._service = service
        self._secret = secret
        self._frames = FrameBuffer(MAX_HELLO_BYTES)
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._channel_id: str | None = None

    def abort(self) -> None:
        """Ends the connection at once: what the engine's thread goes on to say is not sent."""
        self._out.close()
        self._transport.abort()

    def send(self, events: Sequence[Event]) -> None:
        self._out.send(events_frame(events))

    def end(self) -> None:
        self._out.end()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._out = Outgoing(self._transport)
        peer = transport.get_extra_info("socket")
        # Else a step's events may wait 40 ms for the ingress to acknowledge those before. uvloop sets it by
        # itself, asyncio only where the listening socket was made with the protocol's number.
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_MS)
        self._timer = self._loop.call_later(HELLO_S, self.abort)

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._frames.feed(data):
                if self._channel_id is not None:
                    self._spawn(self._answer(read_call(frame)))
                else:
                    self._greet(frame)
        except FrameError as error:
            logger.warning("a connection is closed: %s", error)
            self.abort()

    def _greet(self, frame: bytes) -> None:
        self._channel_id = read_hello(frame, self._secret)
        if self._channel_id is None:
            raise FrameError("its first frame has not the secret of this replica")
        self._timer.cancel()
        self._frames.max_bytes = MAX_FRAME_BYTES
        self._server.joined(self)
        self._service.open_channel(self._channel_id, self)
        self._keep_alive()

    def _keep_alive(self) -> None:
        self.send(())
        self._timer = self._loop.call_later(KEEP_ALIVE_S, self._keep_alive)

    async def _answer(self, call: Call) -> None:
        try:
            value: Any = None
            if call.method == "submit":
                value = await self._service.submit(call.argument)
            elif call.method == "tokens":
                value = await self._service.tokens(call.argument)
            else:
                await self._service.cancel(call.argument)
            answer = CallAnswer(call.number, value)
        except Exception as error:
            logger.exception("a call of %s failed", call.method)
            answer = CallAnswer(call.number, error=repr(error))
        self._out.send(answer_frame(answer))

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        for task in tuple(self._tasks):
            task.cancel()
        if self._channel_id is not None:
            self._service.leave_channel(self._channel_id, self)
        self._out.close()
        self._server.left(self)
