"""Forms of answers as grammars over token ids, by llguidance: the implementation of engine.grammar."""

import re
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from replicas.answer_forms import GrammarFormat, JsonFormat
from replicas.engine.grammar import GrammarFailed
from replicas.errors import ErrorCode, TriadError
from replicas.json_schema import WHITESPACE, SchemaRefused, enforceable
from replicas.text_grammar import grammar_text
from replicas.tools.grammar import AnswerGrammar

MAX_MASK_S = 0.1
"""CPU time of one mask, or of taking a token, above which a schema is refused at an answer's beginning, and
the answer ends later; the engine's thread waits for it. llguidance's own fuel bounds most masks to some 30 ms
with a vocabulary of 128,000, but not those of a right recursion, which grow with the answer."""
MAX_DRAFT_MASKS_S = 0.02
"""CPU time after which a draft's further masks are not asked for."""
NUM_WALKS = 4
WALK_LEN = 32
_LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
_STATE = re.compile(r"<state>|<backtrace>|<non-verbose/>|\n\s*\d+ \| ")
"""What follows an error's own text: the parser's state, or the lines of the grammar."""
_LARK_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")
T = TypeVar("T")
Asked = JsonFormat | GrammarFormat | AnswerGrammar
"""The order for an answer that is one JSON value, has another form, or has calls or reasoning in it."""


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
            num_taken = 0
            for token in draft:
                if time.thread_time() - began_s > MAX_DRAFT_MASKS_S:
                    break
                if matcher.is_stopped() or not matcher.try_consume_tokens([token]):
                    break
                num_taken += 1
                try:
                    masks.append(self._mask())
                except GrammarFailed:  # behind a draft alone, which may never come
                    break
            if num_taken:
                matcher.rollback(num_taken)
        except GrammarFailed:
            raise
        except BaseException as error:
            raise GrammarFailed(_text_of(error)) from error
        return tuple(masks)

    def num_allowed(self, tokens: Sequence[int]) -> int:
        if self._failure is not None:
            raise GrammarFailed(self._failure)
        try:
            count = self._matcher.validate_tokens(list(tokens))
        except BaseException as error:
            raise GrammarFailed(_text_of(error)) from error
        if self._matcher.is_error():
            raise GrammarFailed(_in_short(self._matcher.get_error()))
        return count

    def mask_behind(self, tokens: Sequence[int]) -> bytes:
        return self._behind(tokens, self._mask)

    def forced(self, tokens: Sequence[int]) -> tuple[int, ...]:
        return self._behind(tokens, self._forced)

    def _behind(self, tokens: Sequence[int], look: Callable[[], T]) -> T:
        """What is seen behind these tokens."""
        if self._failure is not None:
            raise GrammarFailed(self._failure)
        matcher = self._matcher
        try:
            if not matcher.consume_tokens(list(tokens)):
                raise GrammarFailed(_in_short(matcher.get_error()))
            seen = look()
            matcher.rollback(len(tokens))
        except GrammarFailed:
            raise
        except BaseException as error:
            raise GrammarFailed(_text_of(error)) from error
        return seen

    def _forced(self) -> tuple[int, ...]:
        if self._matcher.is_stopped():
            return ()
        tokens = self._matcher.compute_ff_tokens()
        num_allowed = self._matcher.validate_tokens(tokens)  # an end of text that is named may not come
        return tuple(tokens[:num_allowed])

    def accept(self, token_id: int) -> None:
        began_s = time.thread_time()
        try:
            self._matcher.consume_token(token_id)
        except BaseException as error:  # the next masks tell of it
            self._failure = _text_of(error)
        if (taken_s := time.thread_time() - began_s) > MAX_MASK_S:
            self._failure = _too_slow(taken_s)

    def _mask(self) -> bytes:
        began_s = time.thread_time()
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise GrammarFailed(_in_short(self._matcher.get_error()))
        if (taken_s := time.thread_time() - began_s) > MAX_MASK_S:
            raise GrammarFailed(_too_slow(taken_s))
        return mask


def _too_slow(taken_s: float) -> str:
    what = f"it takes {taken_s * 1e3:.0f} ms a token by now"
    return f"{what}; write what repeats as (item)*, or with its recursion on the left"


def _text_of(error: BaseException) -> str:
    """The text of an error of llguidance, in short. A panic of Rust's is a BaseException of no public
    class."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error
    return _in_short(str(error))


def _in_short(problem: str) -> str:
    """An error's text without the state that llguidance adds to it."""
    text = " ".join(_STATE.split(_LARK_PLACE.sub("", problem))[0].split()).rstrip(".")
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
        matcher = LLMatcher(tokenizer, _grammar(asked), log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise SchemaRefused(_in_short(matcher.get_error()))
        _try_walks(matcher, tokenizer.vocab_size)
    except SchemaRefused as refused:
        raise _located(tokenizer, asked, refused) from None
    except BaseException as error:
        raise _located(tokenizer, asked, SchemaRefused(_text_of(error))) from error
    return matcher


def _grammar(asked: Asked) -> str:
    if isinstance(asked, AnswerGrammar):
        return asked.lark()
    if isinstance(asked, GrammarFormat):
        return grammar_text(asked)
    checked = enforceable(asked.schema, asked.best_effort)
    whitespace = WHITESPACE if asked.whitespace is None else asked.whitespace
    options = checked.options(whitespace, asked.best_effort)
    return str(LLMatcher.grammar_from_json_schema(checked.schema, overrides=options))


def _located(tokenizer: LLTokenizer, asked: Asked, refused: SchemaRefused) -> SchemaRefused:
    """The refusal with the field at fault: the first part of the order that is refused by itself as well."""
    if refused.param is not None:
        return refused
    if isinstance(asked, AnswerGrammar):
        for alone in asked.apart():
            try:
                compile_schema(tokenizer, alone)
            except SchemaRefused as cause:
                return cause
    return SchemaRefused(str(refused), asked.param)


def compile_order(tokenizer: LLTokenizer, asked: Asked) -> tuple[LLMatcher, str | None]:
    """As compile_schema, with a warning where something had to be left out of what is not strict."""
    strict, warning = _strict(asked), None
    if strict != asked:
        try:
            return compile_schema(tokenizer, strict), None
        except SchemaRefused as refused:
            name = asked.tool_at(refused.param) if isinstance(asked, AnswerGrammar) else None
            whose = "" if name is None else f" of the tool '{name}'"
            warning = f"the schema{whose} is enforced in part: {refused}"
    return compile_schema(tokenizer, asked), warning


def _strict(asked: Asked) -> Asked:
    """The order, all of whose schemas are strict."""
    if isinstance(asked, JsonFormat):
        return replace(asked, best_effort=False)
    return asked.with_strict(True) if isinstance(asked, AnswerGrammar) else asked


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
    param: str | None = None
    """The field that is refused."""


def prover(vocabulary: Vocabulary) -> Callable[[Asked], Verdict]:
    """Makes the function that tries schemas; the target of a BoundedProcess."""
    tokenizer = vocabulary.load()

    def prove(asked: Asked) -> Verdict:
        before = _resident_bytes()
        try:
            matcher, _ = compile_order(tokenizer, asked)
        except SchemaRefused as refused:
            return Verdict(str(refused), param=refused.param)
        num_bytes = max(0, _resident_bytes() - before)
        del matcher
        return Verdict(None, num_bytes=num_bytes)

    return prove


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
