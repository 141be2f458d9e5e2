"""The preparation of requests between arrival and engine, off the event loop that carries streams.

Tokenizing, templates and schemas grow with what a client sends. tokenizers and llguidance give up the GIL; a
template does not, but shares it.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from replicas.engine.grammar import Grammar
from replicas.errors import ErrorCode, TriadError
from replicas.grammar import Asked, GrammarCompiler, JsonGrammar
from replicas.messages import GenerateRequest, Prompt
from replicas.text import TextCodec

T = TypeVar("T")

MAX_WAIT_S = 5.0
"""The longest wait of a job for a free thread."""
MAX_INLINE_CHARS = 2_000
"""Prompts up to here, a millisecond of work, are not worth a thread's wake-up."""
MAX_SHORT_CHARS = 20_000
"""Prompts up to here, some milliseconds of work, do not wait behind longer ones."""
NUM_COMPILES = 2


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request made ready for the engine."""

    prompts: Sequence[list[int]]
    """Token ids of each prompt."""
    grammars: Sequence[Grammar | None]
    """One for each choice of each prompt, by index."""

    @property
    def warning(self) -> str | None:
        """What of the request's form is not kept to."""
        first = self.grammars[0]
        return first.warning if isinstance(first, JsonGrammar) else None


@dataclass(slots=True)
class _UnderWay:
    task: asyncio.Task[Prepared]
    channel_id: str
    dropped: TriadError | None = None

    def drop(self, code: ErrorCode, message: str) -> None:
        self.dropped = TriadError(code, message)
        self.task.cancel()


class Preparation:
    """Prepares requests; lives on one event loop.

    max_context: tokens; a text that must have more is refused by its length
    max_requests: requests under way at once
    """

    def __init__(self, codec: TextCodec, grammars: GrammarCompiler, max_context: int, max_requests: int):
        self._codec = codec
        self._grammars = grammars
        self._max_context = max_context
        self._max_requests = max_requests
        self._under_way: dict[str, _UnderWay] = {}
        self._short, self._long = _Threads("prompt", 1), _Threads("long-prompt", 1)
        self._compiling = _Threads("grammar", NUM_COMPILES)
        self._is_closed = False

    def start(self) -> None:
        """Has compiles made ready, in the background."""
        self._compiling.begin(self._grammars.warm_up)

    async def prepare(self, request: GenerateRequest) -> Prepared:
        """Prepares a request. TriadError says what is wrong with it, or that it was dropped meanwhile."""
        if self._is_closed:
            raise TriadError(ErrorCode.UNAVAILABLE, "the replica is shutting down")
        num_chars = sum(map(_num_chars, request.prompts))
        if num_chars <= MAX_INLINE_CHARS and request.sampling.response_format is None:
            return Prepared(self._encode(request), (None,) * request.num_indices)
        request_id = request.request_id
        if request_id in self._under_way:
            message = f"a request {request_id!r} is running already"
            raise TriadError(ErrorCode.INVALID_REQUEST, message)
        if len(self._under_way) >= self._max_requests:
            message = f"the replica has {self._max_requests} requests to prepare; retry later"
            raise TriadError(ErrorCode.QUEUE_FULL, message)
        under_way = _UnderWay(asyncio.create_task(self._prepare(request, num_chars)), request.channel_id)
        self._under_way[request_id] = under_way
        try:
            await asyncio.wait((under_way.task,))
        finally:
            del self._under_way[request_id]
            under_way.task.cancel()
        if under_way.dropped is not None:
            raise under_way.dropped
        return under_way.task.result()

    def drop(self, request_ids: Iterable[str]) -> None:
        """Ends the requests that are under way with CANCELLED."""
        for request_id in request_ids:
            if request_id in self._under_way:
                self._under_way[request_id].drop(ErrorCode.CANCELLED, "the request was cancelled")

    def drop_channel(self, channel_id: str) -> None:
        """Ends the requests of a channel that has closed with UNAVAILABLE."""
        for under_way in self._under_way.values():
            if under_way.channel_id == channel_id:
                under_way.drop(ErrorCode.UNAVAILABLE, f"the channel {channel_id!r} has closed")

    def close(self) -> None:
        """Ends what is under way with UNAVAILABLE, without waiting for a thread."""
        self._is_closed = True
        for under_way in self._under_way.values():
            under_way.drop(ErrorCode.UNAVAILABLE, "the replica is shutting down")
        self._grammars.close()
        for threads in (self._short, self._long, self._compiling):
            threads.close()

    async def _prepare(self, request: GenerateRequest, num_chars: int) -> Prepared:
        wanted = request.sampling.response_format

        def work() -> tuple[list[list[int]], Sequence[Grammar | None] | None]:
            # A schema that is known to be refused spares the prompts' encoding.
            grammars = self._known(wanted, request.num_indices)
            return self._encode(request), grammars

        threads = self._short if num_chars <= MAX_SHORT_CHARS else self._long
        prompts, grammars = await threads.run(work)
        if grammars is None:
            assert wanted is not None
            grammars = await self._compiling.run(lambda: self._compile(wanted, request.num_indices))
        return Prepared(prompts, grammars)

    def _encode(self, request: GenerateRequest) -> list[list[int]]:
        most = request.truncate_prompt_tokens
        if most is None:
            encode = self._codec.encode
            return [encode(prompt, self._max_context, request.template) for prompt in request.prompts]
        if most < 0:
            most = max(1, self._max_context - (request.sampling.max_tokens or 1))
        return [self._codec.encode(prompt, None, request.template)[-most:] for prompt in request.prompts]

    def _known(self, wanted: Asked | None, count: int) -> Sequence[Grammar | None] | None:
        """The grammars of so many choices where they are known at once; None where it takes a compile."""
        if wanted is None:
            return (None,) * count
        grammars = [grammar for _ in range(count) if (grammar := self._grammars.known(wanted)) is not None]
        return grammars if len(grammars) == count else None

    def _compile(self, wanted: Asked, count: int) -> Sequence[Grammar]:
        return [self._grammars.compile(wanted) for _ in range(count)]


class _Threads:
    """A few threads, for which a job waits MAX_WAIT_S at most."""

    def __init__(self, name: str, count: int):
        self._pool = ThreadPoolExecutor(count, name)
        self._free = asyncio.Semaphore(count)

    async def run(self, job: Callable[[], T]) -> T:
        """Runs a job. TriadError when no thread was free in time. A job goes on when its caller is
        cancelled."""
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                await self._free.acquire()
        except TimeoutError:
            message = "the replica has too many long prompts or new schemas to prepare; retry later"
            raise TriadError(ErrorCode.QUEUE_FULL, message) from None
        future = asyncio.get_running_loop().run_in_executor(self._pool, job)
        future.add_done_callback(self._ended)
        return await asyncio.shield(future)

    def begin(self, job: Callable[[], None]) -> None:
        """Runs a job in the background, without counting it; to be called before any run()."""
        self._pool.submit(job)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ended(self, future: "asyncio.Future[T]") -> None:
        self._free.release()
        if not future.cancelled():
            future.exception()  # its caller may be gone


def _num_chars(prompt: Prompt) -> int:
    """The weight of a prompt: a token id is one character, and a message 50 more than it has, for the
    template."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(1 if isinstance(part, int) else 50 + sum(map(len, part.values())) for part in prompt)
