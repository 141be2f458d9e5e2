"""A bound on a model's reasoning: where it has come to so many tokens, its closing mark is forced.

The bound is a grammar around the answer's own. It follows the marks by bytes, as `replicas.tools.output`
finds them in the text, so that both see the reasoning end at the same token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from replicas.engine.grammar import Grammar, GrammarFailed, allows

_CONTINUATIONS = range(0x80, 0xC0)
"""The bytes with which a character of UTF-8 goes on."""
_LENGTHS = ((0xF5, 1), (0xF0, 4), (0xE0, 3), (0xC2, 2))
"""First bytes of characters, from the greatest down, each with the bytes of those that begin so."""


@dataclass(frozen=True, slots=True)
class SpelledMarks:
    """A model's marks of reasoning in its tokens.

    begin, end: their bytes; those of a mark that is a control token are of no text
    closing: the tokens that write the closing mark
    continuations: a mask of the tokens that are one byte with which a character goes on
    bytes_of: a token's bytes in a text, or those of its mark; none for a control token that is no mark
    """

    begin: bytes
    end: bytes
    closing: tuple[int, ...]
    continuations: bytes
    bytes_of: Callable[[int], bytes]


class _Stage(Enum):
    BEFORE = 0
    WITHIN = 1
    BEHIND = 2


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a completion stands, after any of its tokens."""

    stage: _Stage
    tail: bytes = b""
    """Before the reasoning all bytes so far; within it the last ones, in which a mark or a character may have
    begun."""
    num_tokens: int = 0
    """Tokens of the reasoning."""
    num_closing: int = 0
    """Tokens given of the closing mark that is forced."""

    def after(self, token_id: int, marks: SpelledMarks, is_forced: bool) -> "_Place":
        text = self.tail + marks.bytes_of(token_id)
        match self.stage:
            case _Stage.BEFORE:
                return _begun(text, marks)
            case _Stage.WITHIN:
                within = _within(text, marks)
                if within.stage is _Stage.BEHIND:
                    return within
                num_closing = self.num_closing + is_forced
                return replace(within, num_tokens=self.num_tokens + 1, num_closing=num_closing)
        return self


class BudgetedGrammar:
    """Implements engine.grammar.Grammar: the answer's own grammar, with the reasoning bounded.

    inner: the answer's grammar, which allows any reasoning; None where the answer may be anything
    num_tokens: of the reasoning, without its marks. A character that is not whole then is ended first, by 3
    tokens at most.
    """

    def __init__(
        self, inner: Grammar | None, marks: SpelledMarks, num_tokens: int, begins_in_reasoning: bool
    ):
        self._inner = inner
        self._marks = marks
        self._num_tokens = num_tokens
        self._place = _Place(_Stage.WITHIN if begins_in_reasoning else _Stage.BEFORE)

    @property
    def is_complete(self) -> bool:
        return self._inner is not None and self._inner.is_complete

    def masks(self, draft: Sequence[int]) -> tuple[bytes | None, ...]:
        inner = (None,) * (len(draft) + 1) if self._inner is None else self._inner.masks(draft)
        allowed: list[bytes | None] = []
        place = self._place
        for mask, token in zip(inner, (*draft, None), strict=False):
            try:
                mask = _both(mask, self._bound(place))
            except GrammarFailed:
                if not allowed:
                    raise
                break  # behind a draft alone, which may never come
            allowed.append(mask)
            if token is None or not allows(mask, token):
                break
            place = self._after(place, token)
        return tuple(allowed)

    def num_allowed(self, tokens: Sequence[int]) -> int:
        num_inner = len(tokens) if self._inner is None else self._inner.num_allowed(tokens)
        place = self._place
        for count, token in enumerate(tokens[:num_inner]):
            if not allows(self._bound(place), token):
                return count
            place = self._after(place, token)
        return num_inner

    def mask_behind(self, tokens: Sequence[int]) -> bytes | None:
        inner = None if self._inner is None else self._inner.mask_behind(tokens)
        return _both(inner, self._bound(self._behind(tokens)))

    def forced(self, tokens: Sequence[int]) -> tuple[int, ...]:
        forced: list[int] = []
        place = self._behind(tokens)
        while len(forced) < len(self._marks.closing) and (token := self._forced(place)) is not None:
            forced.append(token)
            place = self._after(place, token)
        if forced or self._inner is None:
            return tuple(forced)
        told = self._inner.forced(tokens)
        return told[: self.num_allowed((*tokens, *told)) - len(tokens)]

    def accept(self, token_id: int) -> None:
        self._place = self._after(self._place, token_id)
        if self._inner is not None:
            self._inner.accept(token_id)

    def _after(self, place: _Place, token_id: int) -> _Place:
        return place.after(token_id, self._marks, is_forced=self._forced(place) is not None)

    def _behind(self, tokens: Sequence[int]) -> _Place:
        place = self._place
        for token in tokens:
            place = self._after(place, token)
        return place

    def _forced(self, place: _Place) -> int | None:
        """The token of the closing mark that is to come next; None where none is."""
        if place.stage is not _Stage.WITHIN or place.num_tokens < self._num_tokens:
            return None
        if _is_unfinished(place.tail) and any(self._marks.continuations):
            return None
        return self._marks.closing[min(place.num_closing, len(self._marks.closing) - 1)]

    def _bound(self, place: _Place) -> bytes | None:
        """A mask of what the reasoning's bound leaves; None for anything."""
        forced = self._forced(place)
        if forced is not None:
            return bytes(forced // 8) + bytes((1 << forced % 8,))
        is_over = place.stage is _Stage.WITHIN and place.num_tokens >= self._num_tokens
        return self._marks.continuations if is_over else None


def continuations(token_of: Callable[[int], int | None]) -> bytes:
    """SpelledMarks.continuations. token_of: a byte's own token, None where there is none."""
    ids = [token for byte in _CONTINUATIONS if (token := token_of(byte)) is not None]
    bits = sum(1 << token for token in set(ids))
    return bits.to_bytes(bits.bit_length() // 8 + 1, "little")


def _begun(text: bytes, marks: SpelledMarks) -> _Place:
    """The place behind a completion's first bytes."""
    ahead = text.decode(errors="surrogateescape").lstrip().encode(errors="surrogateescape")
    if ahead.startswith(marks.begin):
        return _within(ahead[len(marks.begin) :], marks)
    if marks.begin.startswith(ahead) or _is_unfinished(ahead):
        return _Place(_Stage.BEFORE, text)
    return _Place(_Stage.BEHIND)


def _within(text: bytes, marks: SpelledMarks) -> _Place:
    """The place behind bytes of the reasoning, or behind its end; its tokens are not counted."""
    if marks.end in text:
        return _Place(_Stage.BEHIND)
    return _Place(_Stage.WITHIN, text[-max(len(marks.end) - 1, 3) :])


def _is_unfinished(text: bytes) -> bool:
    """True if the text ends within a character."""
    for length in range(1, min(4, len(text) + 1)):
        byte = text[-length]
        if byte not in _CONTINUATIONS:
            return length < next((count for first, count in _LENGTHS if byte >= first), 1)
    return False


def _both(mask: bytes | None, bound: bytes | None) -> bytes | None:
    """What both masks allow. GrammarFailed where that is nothing."""
    if mask is None or bound is None:
        return bound if mask is None else mask
    length = min(len(mask), len(bound))
    both = int.from_bytes(mask[:length], "little") & int.from_bytes(bound[:length], "little")
    if not both:
        raise GrammarFailed("it does not let the reasoning end where its budget does")
    return both.to_bytes(length, "little")
