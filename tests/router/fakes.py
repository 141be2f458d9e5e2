"""A replica, a directory and a store in this process, in place of those behind Ray and Redis."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from policies.control.plan import DecisionRecord
from policies.control.store import ClusterView, LoadStore, StoreUnavailable
from policies.modes import Mode
from policies.replica_load import ClusterLoad, ReplicaLoad
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
    TextLogprob,
)
from replicas.token_messages import (
    DetokenizeRequest,
    Refused,
    TokenAnswer,
    Tokenized,
    TokenRequest,
)
from router.replica_connection import OnEvents, ReplicaClient, Roster

MODEL = "triad-test"
WORDS = ("Once", " upon", " a", " time", "…", " «née»", ".")
TEXT = "".join(WORDS)


class ChannelBroke(Exception):
    """What a fake transport raises when its replica dies."""


def a_load(replica_id: str, **more: object) -> ReplicaLoad:
    values = {
        "num_running": 0,
        "num_waiting": 0,
        "num_auto": 0,
        "max_running": 4,
        "pages_used": 0,
        "num_pages": 100,
    }
    return ReplicaLoad(replica_id, **(values | more))  # type: ignore[arg-type]


@dataclass
class RequestState:
    """A request at the replica, and how much of its answer is out."""

    request: GenerateRequest
    num_sent: int = 0


class ScriptedReplica(ReplicaClient):
    """Answers requests with WORDS, one at each step() in all their choices; run() steps all the time.

    A word is a token. The first choice ends last.

    refusal: what submit answers instead. on_submit: awaited in submit, to hold it up or break it.
    """

    def __init__(self, replica_id: str, modes: Sequence[Mode] = tuple(Mode), words: Sequence[str] = WORDS):
        self._info = ModelInfo(MODEL, tuple(modes), 1024, 500, replica_id)
        self.words = words
        self.live: dict[str, RequestState] = {}
        self.submitted: list[GenerateRequest] = []
        self.cancelled: list[str] = []
        self.asked: list[TokenRequest] = []
        self.terminals: list[str] = []
        self.refusal: tuple[ErrorCode, str] | None = None
        self.on_submit: Callable[[], object] | None = None
        self.is_up = True
        self._channels: dict[str, asyncio.Queue[tuple[Event, ...] | Exception]] = {}

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def num_channels(self) -> int:
        return len(self._channels)

    async def submit(self, request: GenerateRequest) -> Accepted | Rejected:
        if not self.is_up:
            raise ChannelBroke("no such replica")
        if self.on_submit is not None:
            await self.on_submit()  # type: ignore[misc]
        if self.refusal is not None:
            return Rejected(request.request_id, *self.refusal)
        if request.channel_id not in self._channels:
            return Rejected(request.request_id, ErrorCode.UNAVAILABLE, "no such channel")
        self.submitted.append(request)
        self.live[request.request_id] = RequestState(request)
        return Accepted(request.request_id, 5)

    async def cancel(self, request_ids: tuple[str, ...]) -> None:
        for request_id in request_ids:
            if request_id in self.live:
                self.cancelled.append(request_id)
                self.fail(request_id, ErrorCode.CANCELLED, "cancelled")

    async def tokens(self, request: TokenRequest) -> TokenAnswer:
        """A token is a character's code."""
        if not self.is_up:
            raise ChannelBroke("no such replica")
        self.asked.append(request)
        if self.refusal is not None:
            return Refused(*self.refusal)
        if isinstance(request, DetokenizeRequest):
            return "".join(map(chr, request.token_ids))
        text = request.prompt if isinstance(request.prompt, str) else str(request.prompt)
        return Tokenized(tuple(map(ord, text)), tuple(text) if request.returns_strings else None)

    async def hold_channel(self, channel_id: str, on_events: OnEvents) -> None:
        if not self.is_up:
            raise ChannelBroke("no such replica")
        queue: asyncio.Queue[tuple[Event, ...] | Exception] = asyncio.Queue()
        self._channels[channel_id] = queue
        try:
            item: tuple[Event, ...] | Exception = ()
            while not isinstance(item, Exception) and on_events(item):
                item = await queue.get()
            if isinstance(item, Exception):
                raise item
        finally:
            del self._channels[channel_id]
            for request_id, live in list(self.live.items()):
                if live.request.channel_id == channel_id:
                    self.fail(request_id, ErrorCode.CANCELLED, "its channel closed")

    def step(self, request_id: str) -> None:
        """The next word of each choice of a request, or their end."""
        live = self.live[request_id]
        indices = range(live.request.num_indices)
        if live.num_sent < len(self.words):
            for index in indices:
                self._publish(live, self._word(live, index))
            live.num_sent += 1
            return
        for index in reversed(indices):
            self._publish(live, Delta(request_id, "", 0, (), index, FinishReason.STOP))
        report = DecodingReport({Mode.DIFFUSION: 4, Mode.AR: 3}, 5, 1, "threshold", self.info.replica_id)
        self._end(request_id, Finished(request_id, 5, len(indices) * len(self.words), report))

    def _word(self, live: RequestState, index: int) -> Delta:
        word = self.words[live.num_sent]
        count = live.request.sampling.logprobs
        logprobs: tuple[TextLogprob, ...] = ()
        if count is not None:
            offset = sum(map(len, self.words[: live.num_sent]))
            top = tuple(TextLogprob(bytes([0xC3, k]), -float(k)) for k in range(count))
            logprobs = (TextLogprob(word.encode(), float("-inf"), offset, top),)
        return Delta(live.request.request_id, word, 1, logprobs, index)

    def fail(self, request_id: str, code: ErrorCode, message: str) -> None:
        """Says what it had made: all by `ar`, a token a forward."""
        live = self.live[request_id]
        num = live.num_sent * live.request.num_indices
        report = DecodingReport({Mode.AR: num}, num, 0, "request", self.info.replica_id)
        self._end(request_id, Failed(request_id, code, message, report if num else None, num))

    def idle(self) -> None:
        """A keep-alive on every channel."""
        for queue in self._channels.values():
            queue.put_nowait(())

    def break_channels(self) -> None:
        for queue in self._channels.values():
            queue.put_nowait(ChannelBroke("the actor died"))

    async def run(self) -> None:
        """Serves as a real one would: every request a step forward, again and again."""
        while True:
            for request_id in list(self.live):
                self.step(request_id)
            await asyncio.sleep(0)

    def _end(self, request_id: str, event: Event) -> None:
        live = self.live.pop(request_id)
        self.terminals.append(request_id)
        self._publish(live, event)

    def _publish(self, live: RequestState, event: Event) -> None:
        queue = self._channels.get(live.request.channel_id)
        if queue is not None:
            queue.put_nowait((event,))


@dataclass
class FakeDirectory:
    replicas: list[ScriptedReplica]
    complete: bool = True
    error: Exception | None = None

    async def roster(self) -> Roster:
        if self.error is not None:
            raise self.error
        return Roster(list(self.replicas), self.complete)


@dataclass
class FakeStore(LoadStore):
    """Answers with what it is given; error makes it unavailable."""

    view: ClusterView = field(default_factory=lambda: ClusterView(ClusterLoad(())))
    decisions: tuple[DecisionRecord, ...] = ()
    error: str | None = None

    async def close(self) -> None:
        return

    async def read_loads(self) -> ClusterLoad:
        return (await self.read_view()).loads

    async def read_view(self) -> ClusterView:
        self._check()
        return self.view

    async def recent_decisions(self, num: int = 1000) -> tuple[DecisionRecord, ...]:
        self._check()
        return self.decisions[:num]

    def _check(self) -> None:
        if self.error is not None:
            raise StoreUnavailable(self.error)
