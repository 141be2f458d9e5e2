"""Compiles forms of answers, new ones in a process of its own first, and keeps those used last."""

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Set
from dataclasses import dataclass, replace
from queue import LifoQueue

from llguidance import LLMatcher, LLTokenizer

from replicas.answer_forms import GrammarFormat
from replicas.bounded_process import BoundedProcess, CallExceeded, CallLimits, CallTimeout, ProcessClosed
from replicas.errors import ErrorCode, TriadError
from replicas.grammar import Asked, JsonGrammar, Verdict, Vocabulary, compile_order
from replicas.json_schema import SchemaRefused
from replicas.tools.grammar import AnswerGrammar

logger = logging.getLogger(__name__)

MAX_CACHED = 64
MAX_CACHED_BYTES = 256 * 2**20
"""The most memory that compiling the schemas kept may have added to the process."""
MAX_REFUSALS = 1024


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
        # By a digest, since a schema may be long: what is wrong, and the field.
        self._refused: OrderedDict[bytes, tuple[str, str | None]] = OrderedDict()
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
            refused = self._refused.get(_digest(asked))
            if refused is not None:
                raise TriadError(ErrorCode.INVALID_REQUEST, *refused)
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
                problem = f"{_name(asked)} can't be enforced: {verdict.problem}{hint}"
                raise self._refuse(asked, problem, verdict.param)
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
                param=asked.param,
            )
        except CallTimeout:
            message = "the replica is too busy to compile the request's schema; retry later"
            raise TriadError(ErrorCode.QUEUE_FULL, message) from None
        except ProcessClosed:
            raise TriadError(ErrorCode.UNAVAILABLE, "the replica is shutting down") from None
        assert isinstance(verdict, Verdict)
        if verdict.num_bytes > MAX_CACHED_BYTES // 2:
            return Verdict(
                f"it is too complex: compiled it takes {verdict.num_bytes >> 20} MiB",
                is_too_complex=True,
                param=asked.param,
            )
        return verdict

    def _hint(self, process: BoundedProcess, asked: Asked, verdict: Verdict) -> str:
        """The advice to set strict to false, where the schema then compiles; else empty."""
        if isinstance(asked, GrammarFormat) or verdict.is_too_complex:
            return ""
        milder: Asked
        if isinstance(asked, AnswerGrammar):
            is_strict, milder = asked.is_strict, asked.with_strict(False)
        else:
            is_strict, milder = not asked.best_effort, replace(asked, best_effort=True)
        if not is_strict or self._prove(process, milder).problem is not None:
            return ""
        return '; with "strict": false what can\'t be enforced is left out'

    def _load_tokenizer(self) -> LLTokenizer:
        with self._loading:
            if self._tokenizer is None:
                self._tokenizer = self._vocabulary.load()
            return self._tokenizer

    def _refuse(self, asked: Asked, problem: str, param: str | None) -> TriadError:
        with self._lock:
            self._refused[_digest(asked)] = problem, param
            if len(self._refused) > MAX_REFUSALS:
                self._refused.popitem(last=False)
        return TriadError(ErrorCode.INVALID_REQUEST, problem, param)

    def _keep(self, asked: Asked, num_bytes: int) -> JsonGrammar:
        try:
            matcher, warning = compile_order(self._load_tokenizer(), asked)
        except SchemaRefused as refused:  # though it was not in the other process
            message = f"{_name(asked)} can't be enforced: {refused}"
            raise TriadError(ErrorCode.INVALID_REQUEST, message, refused.param) from refused
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


def _name(asked: Asked) -> str:
    form = asked.answer if isinstance(asked, AnswerGrammar) and not asked.tools else asked
    return f"the form '{form.kind}'" if isinstance(form, GrammarFormat) else "the schema"


def _digest(asked: Asked) -> bytes:
    return hashlib.sha256(repr(asked).encode()).digest()
