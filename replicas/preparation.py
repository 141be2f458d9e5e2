"""The preparation of requests between arrival and engine, off the event loop that carries streams.

Tokenizing, templates and schemas grow with what a client sends. tokenizers and llguidance give up the GIL; a
template does not, but shares it.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from replicas.answer_forms import ToolUse
from replicas.engine.grammar import Grammar
from replicas.errors import ErrorCode, TriadError
from replicas.grammar import Asked, JsonGrammar
from replicas.grammar_compiler import GrammarCompiler
from replicas.messages import GenerateRequest, Message, Prompt, TemplateOptions
from replicas.request_state import Echo, is_chat
from replicas.text import TextCodec
from replicas.token_messages import (
    DescribeTokenizer,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
    TokenRequest,
)
from replicas.tools.output import OutputParser
from replicas.truncation import without_first_turns

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
    parsers: Sequence[OutputParser | None]
    """What tells apart the text of each; None for one that is all answer."""
    echoes: Sequence[Echo] = ()
    """Each prompt as its choices' texts begin with it; empty where they don't."""
    warning: str | None = None
    """What of the request's form is not kept to."""


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
        self._num_tokenizing = 0
        self._is_closed = False

    def start(self) -> None:
        """Has compiles made ready, in the background."""
        self._compiling.begin(self._grammars.warm_up)

    def fitted(self, request: GenerateRequest) -> GenerateRequest:
        """The request as this model can take it: ChatForm.fitted."""
        sampling = self._codec.chats.fitted(request.sampling)
        return request if sampling is request.sampling else replace(request, sampling=sampling)

    async def prepare(self, request: GenerateRequest) -> Prepared:
        """Prepares a request. TriadError says what is wrong with it, or that it was dropped meanwhile."""
        if self._is_closed:
            raise TriadError(ErrorCode.UNAVAILABLE, "the replica is shutting down")
        num_chars = _num_chars(request.prompts, request.template, request.sampling.tools)
        if num_chars <= MAX_INLINE_CHARS and not request.sampling.needs_grammar:
            prompts = self._encode(request)
            grammars = (None,) * request.num_indices
            return self._prepared(request, prompts, self._echoes(request, prompts), grammars)
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

    async def tokens(self, request: TokenRequest) -> Tokenized | str:
        """Tokenizes, detokenizes, or describes the tokenizer. TriadError says what is wrong, or that there is
        too much to do."""
        if self._is_closed:
            raise TriadError(ErrorCode.UNAVAILABLE, "the replica is shutting down")
        match request:
            case DescribeTokenizer():
                return self._codec.description()
            case DetokenizeRequest():
                num_chars = len(request.token_ids)
            case TokenizeRequest():
                num_chars = _num_chars((request.prompt,), request.template, request.tools)
        if num_chars <= MAX_INLINE_CHARS:
            return answer(self._codec, request)
        if self._num_tokenizing >= self._max_requests:
            message = f"the replica has {self._max_requests} texts to tokenize; retry later"
            raise TriadError(ErrorCode.QUEUE_FULL, message)
        self._num_tokenizing += 1
        try:
            threads = self._short if num_chars <= MAX_SHORT_CHARS else self._long
            return await threads.run(lambda: answer(self._codec, request))
        finally:
            self._num_tokenizing -= 1

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
        self._codec.chats.check(request.sampling)

        def work() -> tuple[list[list[int]], list[Echo], Asked | None, Sequence[Grammar | None] | None]:
            # A schema that is known to be refused spares the prompts' encoding.
            asked = self._asked(request)
            grammars = self._known(asked, request.num_indices)
            prompts = self._encode(request)
            if self._begins_in_reasoning(request, prompts):
                asked = self._asked(request, begins_in_reasoning=True)
                grammars = self._known(asked, request.num_indices)
            return prompts, self._echoes(request, prompts), asked, grammars

        threads = self._short if num_chars <= MAX_SHORT_CHARS else self._long
        prompts, echoes, asked, grammars = await threads.run(work)
        if grammars is None:
            assert asked is not None
            grammars = await self._compiling.run(lambda: self._compile(asked, request.num_indices))
        return self._prepared(request, prompts, echoes, grammars)

    def _prepared(
        self,
        request: GenerateRequest,
        prompts: list[list[int]],
        echoes: list[Echo],
        grammars: Sequence[Grammar | None],
    ) -> Prepared:
        first, budget = grammars[0], request.sampling.thinking_token_budget
        if budget is not None:
            ids = [prompts[index // request.num_choices] for index in range(request.num_indices)]
            grammars = [
                self._codec.budgeted(grammar, budget.num_tokens, prompt)
                for grammar, prompt in zip(grammars, ids, strict=True)
            ]
        warning = first.warning if isinstance(first, JsonGrammar) else None
        return Prepared(prompts, grammars, self._parsers(request, prompts), echoes, warning)

    def _encode(self, request: GenerateRequest) -> list[list[int]]:
        tools, most = request.sampling.tools, request.truncate_prompt_tokens
        max_tokens = self._max_context if most is None else None

        def encode(prompt: Prompt) -> list[int]:
            return self._codec.encode(prompt, max_tokens, request.template, tools)

        if request.drops_turns:
            (prompt,) = request.prompts
            messages = [item for item in prompt if not isinstance(item, int | str)]
            num_wanted = request.sampling.max_tokens
            return [
                without_first_turns(messages, lambda chat: encode(tuple(chat)), self._max_context, num_wanted)
            ]
        prompts = [encode(prompt) for prompt in request.prompts]
        if most is None:
            return prompts
        if most < 0:
            most = max(1, self._max_context - (request.sampling.max_tokens or 1))
        return [prompt[-most:] for prompt in prompts]

    def _echoes(self, request: GenerateRequest, prompts: list[list[int]]) -> list[Echo]:
        if not request.echo:
            return []
        pairs = zip(request.prompts, prompts, strict=True)
        return [Echo.of(prompt, ids, self._codec) for prompt, ids in pairs]

    def _asked(self, request: GenerateRequest, begins_in_reasoning: bool = False) -> Asked | None:
        if is_chat(request.prompts[0]):
            return self._codec.chats.grammar(request.sampling, begins_in_reasoning)
        return request.sampling.response_format

    def _begins_in_reasoning(self, request: GenerateRequest, prompts: list[list[int]]) -> bool:
        return is_chat(request.prompts[0]) and self._codec.begins_in_reasoning(prompts[0])

    def _parsers(self, request: GenerateRequest, prompts: list[list[int]]) -> Sequence[OutputParser | None]:
        if not is_chat(request.prompts[0]):
            return (None,) * request.num_indices
        begins = self._codec.begins_in_reasoning(prompts[0])
        return [self._codec.chats.parser(request.sampling, begins) for _ in range(request.num_indices)]

    def _known(self, wanted: Asked | None, count: int) -> Sequence[Grammar | None] | None:
        """The grammars of so many choices where they are known at once; None where it takes a compile."""
        if wanted is None:
            return (None,) * count
        grammars = [grammar for _ in range(count) if (grammar := self._grammars.known(wanted)) is not None]
        return grammars if len(grammars) == count else None

    def _compile(self, wanted: Asked, count: int) -> Sequence[Grammar]:
        return [self._grammars.compile(wanted) for _ in range(count)]


def answer(codec: TextCodec, request: TokenizeRequest | DetokenizeRequest) -> Tokenized | str:
    """Does what a request about tokens asks. TriadError as of TextCodec.encode."""
    if isinstance(request, DetokenizeRequest):
        return codec.decode(request.token_ids)
    ids = codec.encode(
        request.prompt,
        template=request.template,
        tools=request.tools,
        adds_special_tokens=request.adds_special_tokens,
    )
    return Tokenized(tuple(ids), tuple(map(codec.piece, ids)) if request.returns_strings else None)


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


def _num_chars(prompts: Iterable[Prompt], template: TemplateOptions, tools: ToolUse | None) -> int:
    """The weight of prompts with all that their template renders."""
    num_chars = sum(map(_num_chars_of, prompts)) + len(template.kwargs)
    return num_chars if tools is None else num_chars + tools.num_chars


def _num_chars_of(prompt: Prompt) -> int:
    """The weight of a prompt: a token id is one character, and a message 50 more than it has, for the
    template."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(1 if isinstance(part, int) else 50 + _num_chars_in(part) for part in prompt)


def _num_chars_in(message: Message) -> int:
    texts = (value if isinstance(value, str) else repr(value) for value in message.values())
    return sum(map(len, texts))
