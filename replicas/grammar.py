"""Forms of answers as grammars over token ids, by llguidance: the implementation of engine.grammar."""

import hashlib
import logging
import re
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from queue import LifoQueue
from random import Random
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from replicas.bounded_process import BoundedProcess, CallExceeded, CallLimits, CallTimeout, ProcessClosed
from replicas.engine.grammar import GrammarFailed
from replicas.errors import ErrorCode, TriadError
from replicas.json_schema import SchemaRefused, enforceable
from replicas.messages import GrammarFormat, GrammarKind, JsonFormat
from replicas.text_grammar import grammar_text

logger = logging.getLogger(__name__)

MAX_CACHED = 64
MAX_CACHED_BYTES = 256 * 2**20
"""The most memory that compiling the schemas kept may have added to the process."""
MAX_REFUSALS = 1024
MAX_MASK_S = 0.1
"""CPU time of one mask at an answer's beginning, above which a schema is refused; the engine's thread waits
for masks. Later masks are bounded by llguidance's fuel, to some 30 ms with a vocabulary of 128,000."""
MAX_DRAFT_MASKS_S = 0.02
"""CPU time after which a draft's further masks are not asked for."""
NUM_WALKS = 4
WALK_LEN = 32
_ESCAPES = 'nrbtf\\"'
"""Characters after a backslash; \\u is left out unless a string of the schema needs it, since a key could
come again, spelled with it."""
WHITESPACE = r" |\n {0,4}"
"""The white space between two tokens of JSON, where there is any: a blank, or a line end with its indent."""
_LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
_STATE = re.compile(r"<state>|<backtrace>|<non-verbose/>")
_SCHEMA = "response_format.json_schema.schema"
Asked = JsonFormat | GrammarFormat


class JsonGrammar:
    """Implements engine.grammar.Grammar."""

    def __init__(self, matcher: LLMatcher, warning: str | None = None):
        self._matcher = matcher
        self.warning = warning
        """What of the order it does not keep to."""
        self._failure: str | None = None

    @property
    def is_complete(self) -> bool:
        return self._failure is None and self._matcher.is_stopped() and not self._matcher.is_error()

    def masks(self, draft: Sequence[int]) -> tuple[bytes, ...]:
        if self._failure is not None:
            raise GrammarFailed(self._failure)
        matcher = self._matcher
        try:
            began_s = time.thread_time()
            masks = [self._mask()]
            for token in draft:
                if time.thread_time() - began_s > MAX_DRAFT_MASKS_S:
                    break
                if matcher.is_stopped() or not matcher.try_consume_tokens([token]):
                    break
                masks.append(self._mask())
            if len(masks) > 1:
                matcher.rollback(len(masks) - 1)
        except GrammarFailed:
            raise
        except BaseException as error:
            raise GrammarFailed(_text_of(error)) from error
        return tuple(masks)

    def accept(self, token_id: int) -> None:
        try:
            self._matcher.consume_token(token_id)
        except BaseException as error:  # the next masks tell of it
            self._failure = _text_of(error)

    def _mask(self) -> bytes:
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise GrammarFailed(_in_short(self._matcher.get_error()))
        return mask


def _text_of(error: BaseException) -> str:
    """The text of an error of llguidance, in short. A panic of Rust's is a BaseException of no public
    class."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error
    return _in_short(str(error))


def _in_short(problem: str) -> str:
    """An error's text without the state that llguidance adds to it."""
    text = " ".join(_STATE.split(problem)[0].split()).rstrip(".")
    return "it allows no answer" if not text or text.startswith("NoExtension") else text


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The vocabulary that schemas are compiled for."""

    tokenizer_json: str
    """The text of a tokenizer.json."""
    size: int
    """The number of the model's logits."""
    eos_token_ids: tuple[int, ...]

    def load(self) -> LLTokenizer:
        """Loads the tokenizer. TriadError where llguidance does not take it."""
        try:
            return LLTokenizer(self.tokenizer_json, n_vocab=self.size, eos_token=list(self.eos_token_ids))
        except BaseException as error:
            message = f"this model's tokenizer does not allow structured output: {_text_of(error)}"
            raise TriadError(ErrorCode.INVALID_REQUEST, message, "response_format") from error


def compile_schema(tokenizer: LLTokenizer, asked: Asked) -> LLMatcher:
    """Compiles an order to a matcher at its beginning, tried on some beginnings of answers.

    SchemaRefused says what is wrong. Not bounded in time or memory, so a schema that is new is for a
    BoundedProcess first.
    """
    try:
        grammar = grammar_text(asked) if isinstance(asked, GrammarFormat) else _of_schema(asked)
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise SchemaRefused(_in_short(matcher.get_error()))
        _try_walks(matcher, tokenizer.vocab_size)
    except SchemaRefused:
        raise
    except BaseException as error:
        raise SchemaRefused(_text_of(error)) from error
    return matcher


def _of_schema(asked: JsonFormat) -> str:
    """The grammar of a schema, with little white space unless the request says otherwise.

    Where it is free a small model may go on with it for ever.
    """
    checked = enforceable(asked.schema, asked.best_effort)
    options: Any = {
        "item_separator": ",",
        "key_separator": ":",
        "whitespace_flexible": True,
        "whitespace_pattern": WHITESPACE if asked.whitespace is None else asked.whitespace,
        "lenient": asked.best_effort,
        "coerce_one_of": asked.best_effort,
        "json_allowed_escapes": _ESCAPES + "u" * checked.has_controls,
    }
    return str(LLMatcher.grammar_from_json_schema(checked.schema, overrides=options))


def compile_order(tokenizer: LLTokenizer, asked: Asked) -> tuple[LLMatcher, str | None]:
    """As compile_schema, with a warning where something had to be left out of what is not strict."""
    warning = None
    if isinstance(asked, JsonFormat) and asked.best_effort:
        try:
            return compile_schema(tokenizer, replace(asked, best_effort=False)), None
        except SchemaRefused as refused:
            warning = f"the schema is enforced in part: {refused}"
    return compile_schema(tokenizer, asked), warning


def _try_walks(matcher: LLMatcher, vocab_size: int) -> None:
    """Finds what fails or is slow at an answer's beginning, and leaves the lexer warm, which copies share.

    A schema of which no answer can be, as one that refers to itself only, fails at the first mask.
    """
    for seed in range(NUM_WALKS):
        random, walk = Random(seed), matcher.deep_copy()
        for _ in range(WALK_LEN):
            began_s = time.thread_time()
            mask = walk.compute_bitmask()
            taken_s = time.thread_time() - began_s
            if walk.is_error():
                raise SchemaRefused(_in_short(walk.get_error()))
            if taken_s > MAX_MASK_S:
                raise SchemaRefused(f"it is too complex: {taken_s * 1e3:.0f} ms for what one token may be")
            bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=vocab_size, bitorder="little")
            allowed = bits.nonzero()[0]
            if walk.is_stopped() or not len(allowed):
                break
            walk.consume_token(int(random.choice(allowed)))


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of compiling a schema in another process."""

    problem: str | None
    """A refusal's message; None where the schema compiled."""
    num_bytes: int = 0
    """The memory that it added to that process."""
    is_too_complex: bool = False
    """True if a limit was the problem."""


def prover(vocabulary: Vocabulary) -> Callable[[Asked], Verdict]:
    """Makes the function that tries schemas; the target of a BoundedProcess."""
    tokenizer = vocabulary.load()

    def prove(asked: Asked) -> Verdict:
        before = _resident_bytes()
        try:
            matcher, _ = compile_order(tokenizer, asked)
        except SchemaRefused as refused:
            return Verdict(str(refused))
        num_bytes = max(0, _resident_bytes() - before)
        del matcher
        return Verdict(None, num_bytes)

    return prove


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@dataclass(frozen=True, slots=True)
class _Compiled:
    matcher: LLMatcher
    num_bytes: int
    warning: str | None = None


class GrammarCompiler:
    """Compiles schemas, each in a process of its own first. From any thread, num_processes at a time.

    Those used last are kept, MAX_CACHED of them and MAX_CACHED_BYTES, and why the last MAX_REFUSALS were
    refused. target: of the processes; it proves what this process then compiles.
    """

    def __init__(
        self,
        tokenizer_json: str,
        vocab_size: int,
        eos_token_ids: Set[int],
        *,
        limits: CallLimits | None = None,
        num_processes: int = 2,
        target: str = "replicas.grammar:prover",
    ):
        self._vocabulary = Vocabulary(tokenizer_json, vocab_size, tuple(sorted(eos_token_ids)))
        self._limits = limits = limits or CallLimits()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Asked, _Compiled] = OrderedDict()
        self._refused: OrderedDict[bytes, str] = OrderedDict()  # by a digest, since a schema may be long
        self._lock = threading.Lock()  # of the two above
        self._loading = threading.Lock()
        self._processes = [BoundedProcess(target, self._vocabulary, limits) for _ in range(num_processes)]
        self._idle: LifoQueue[BoundedProcess] = LifoQueue()
        for process in self._processes:
            self._idle.put(process)

    def warm_up(self) -> None:
        """Loads what the first compile would have to wait for, seconds of it where a vocabulary is large."""
        process = self._idle.get()
        try:
            process.start()
            self._load_tokenizer()
        except (TriadError, CallExceeded, CallTimeout, ProcessClosed):
            pass  # a request that needs it is told
        finally:
            self._idle.put(process)

    def known(self, asked: Asked) -> JsonGrammar | None:
        """The grammar or the TriadError of compile(), where it is known at once; None where it takes a
        compile."""
        with self._lock:
            problem = self._refused.get(_digest(asked))
            if problem is not None:
                raise TriadError(ErrorCode.INVALID_REQUEST, problem, _field(asked))
            kept = self._compiled.get(asked)
            if kept is None:
                return None
            self._compiled.move_to_end(asked)
            return JsonGrammar(kept.matcher.deep_copy(), kept.warning)

    def compile(self, asked: Asked) -> JsonGrammar:
        """Compiles a schema to a grammar at its beginning. TriadError says what is wrong with a schema.

        Takes milliseconds as a rule, and at most what the limits allow, twice where a schema is refused.
        """
        grammar = self.known(asked)
        if grammar is not None:
            return grammar
        process = self._idle.get()
        try:
            verdict = self._prove(process, asked)
            if verdict.problem is not None:
                hint = self._hint(process, asked, verdict)
                raise self._refuse(asked, f"{_name(asked)} can't be enforced: {verdict.problem}{hint}")
            return self._keep(asked, verdict.num_bytes)
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """Ends the processes, and compiles under way with UNAVAILABLE."""
        for process in self._processes:
            process.close()

    def _prove(self, process: BoundedProcess, asked: Asked) -> Verdict:
        limits = self._limits
        try:
            verdict = process.call(asked)
        except CallExceeded:
            return Verdict(
                f"it is too complex to compile within {limits.cpu_s:g} s of CPU time and "
                f"{limits.memory_bytes >> 20} MiB; make it smaller",
                is_too_complex=True,
            )
        except CallTimeout:
            message = "the replica is too busy to compile the schema of response_format; retry later"
            raise TriadError(ErrorCode.QUEUE_FULL, message) from None
        except ProcessClosed:
            raise TriadError(ErrorCode.UNAVAILABLE, "the replica is shutting down") from None
        assert isinstance(verdict, Verdict)
        if verdict.num_bytes > MAX_CACHED_BYTES // 2:
            return Verdict(
                f"it is too complex: compiled it takes {verdict.num_bytes >> 20} MiB", is_too_complex=True
            )
        return verdict

    def _hint(self, process: BoundedProcess, asked: Asked, verdict: Verdict) -> str:
        """The advice to set strict to false, where the schema then compiles; else empty."""
        if isinstance(asked, GrammarFormat) or asked.best_effort or verdict.is_too_complex:
            return ""
        if self._prove(process, replace(asked, best_effort=True)).problem is not None:
            return ""
        return '; with "strict": false what can\'t be enforced is left out'

    def _load_tokenizer(self) -> LLTokenizer:
        with self._loading:
            if self._tokenizer is None:
                self._tokenizer = self._vocabulary.load()
            return self._tokenizer

    def _refuse(self, asked: Asked, problem: str) -> TriadError:
        with self._lock:
            self._refused[_digest(asked)] = problem
            if len(self._refused) > MAX_REFUSALS:
                self._refused.popitem(last=False)
        return TriadError(ErrorCode.INVALID_REQUEST, problem, _field(asked))

    def _keep(self, asked: Asked, num_bytes: int) -> JsonGrammar:
        try:
            matcher, warning = compile_order(self._load_tokenizer(), asked)
        except SchemaRefused as refused:  # though it was not in the other process
            message = f"{_name(asked)} can't be enforced: {refused}"
            raise TriadError(ErrorCode.INVALID_REQUEST, message, _field(asked)) from refused
        if warning is not None:
            logger.warning("%s", warning)
        with self._lock:
            self._compiled[asked] = _Compiled(matcher, num_bytes, warning)
            while len(self._compiled) > MAX_CACHED or (
                len(self._compiled) > 1
                and sum(kept.num_bytes for kept in self._compiled.values()) > MAX_CACHED_BYTES
            ):
                self._compiled.popitem(last=False)
        return JsonGrammar(matcher.deep_copy(), warning)


def _field(asked: Asked) -> str:
    if isinstance(asked, JsonFormat):
        return _SCHEMA
    return "bad_words" if asked.kind is GrammarKind.WITHOUT_WORDS else f"structured_outputs.{asked.kind}"


def _name(asked: Asked) -> str:
    return "the schema" if isinstance(asked, JsonFormat) else f"the form '{asked.kind}'"


def _digest(asked: Asked) -> bytes:
    return hashlib.sha256(repr(asked).encode()).digest()
