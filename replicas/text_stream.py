"""The text of one completion as its tokens come: held back where it may change, ended by its stops."""

import codecs
from collections.abc import Mapping, Set

from replicas.token_bytes import TokenBytes

FIRST_MARK = 0xD800
"""The first of the surrogates that stand for control tokens a stop string names; no decoded text has them."""


class TextStream:
    """One completion's text, as its tokens come: their bytes as UTF-8, control tokens left out.

    stop: each form of a stop string, with the string as the client wrote it.

    A U+FFFD stands for each longest run of bytes that begins a character and does not end it, and for each
    byte that can't begin one. Text is held back while it may be the beginning of a stop string or of a
    character whose bytes are not all there. The text ends before the stop string that is complete first; one
    that is complete with the first min_tokens tokens does not count. A stop string may name control tokens
    (marks: what stands for which in `stop`), as in '<|end|>', though they are not in the text.

    starts: for each token taken in, through the one that completed a stop, how many characters of decoded
    text came before its own. first: the index of the token at the text's beginning, where SentencePiece has a
    space too many; None while there is none. num_released: the characters given out. releases: for each token
    accepted, what num_released was after it. stop_reason: the stop string, or the stop token, that ended it.
    """

    def __init__(
        self,
        token_bytes: TokenBytes,
        stop: Mapping[str, str],
        marks: dict[int, str],
        min_tokens: int,
        continues_text: bool,
        stop_token_ids: Set[int] = frozenset(),
        includes_stop: bool = False,
        shown_special_ids: Set[int] = frozenset(),
    ):
        self._bytes = token_bytes
        self._stop = stop
        self._marks = marks
        self._unmarked = dict.fromkeys(map(ord, marks.values()))
        self._min_tokens = min_tokens
        self._stop_token_ids = stop_token_ids
        self._includes_stop = includes_stop
        self._shown_special_ids = shown_special_ids
        self._is_beginning = not continues_text
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = b""  # of a character that is not all there
        self._held = ""
        self._num_seen = 0  # characters and marks that were searched for stops
        self._num_protected = 0  # those of the first min_tokens tokens
        self._num_decoded = 0
        self._freed = ""
        self.stopped = False
        self.stop_reason: str | int | None = None
        self.failure: Exception | None = None
        self.starts: list[int] = []
        self.first: int | None = None
        self.num_released = 0
        self.releases: list[int] = []

    @property
    def num_tokens(self) -> int:
        return len(self.starts)

    def accept(self, token_id: int) -> bool:
        """Takes one more token in, its text for take(). True if the text ends with it. Never raises.

        After a failure, which ends it too, the text is of no use.
        """
        try:
            self._freed += self._push(token_id)
        except Exception as error:
            self.failure = error
        self.releases.append(self.num_released)
        return self.stopped or self.failure is not None

    def take(self) -> str:
        """The text that has become certain since the last call."""
        freed, self._freed = self._freed, ""
        return freed

    def push(self, token_ids: tuple[int, ...]) -> str:
        """The text that has become certain. Takes nothing more once stopped."""
        released = ""
        for token in token_ids:
            if self.stopped:
                break
            released += self._push(token)
        return released

    def finish(self) -> str:
        """The text that was held back, at the end of a completion that no stop string ended."""
        if self.stopped:
            return ""
        rest = self._utf8.decode(b"", True)
        released = self._release(rest, len(rest))
        if self.stopped:
            return released
        held, self._held = self._held, ""
        return released + self._visible(held)

    def _push(self, token_id: int) -> str:
        if token_id in self._stop_token_ids and self.num_tokens >= self._min_tokens:
            return self._end_at(token_id)
        return self._push_text(token_id)

    def _end_at(self, token_id: int) -> str:
        """The rest of a text that a stop token ends."""
        if self._includes_stop:
            released = self._push_text(token_id)
        else:
            self.starts.append(self._num_decoded)
            released = ""
        if not self.stopped:
            released += self.finish()
        if not self.stopped:
            self.stopped, self.stop_reason = True, token_id
        return released

    def _push_text(self, token_id: int) -> str:
        if token_id in self._bytes.special_ids and token_id not in self._shown_special_ids:
            self.starts.append(self._num_decoded)
            mark = self._marks.get(token_id)
            return "" if mark is None else self._release(mark, 0)
        if self._is_beginning:
            self._is_beginning = False
            self.first = self.num_tokens
            piece = self._bytes.first(token_id)
        else:
            piece = self._bytes.further(token_id)
        num_broken = _num_broken(self._pending, piece) if self._pending else 0
        self.starts.append(self._num_decoded + num_broken)
        text = self._utf8.decode(piece)
        if self._pending or not piece.isascii():
            self._pending = self._utf8.getstate()[0]
        return self._release(text, len(text))

    def _release(self, text: str, num_decoded: int) -> str:
        self._num_decoded += num_decoded
        if not self._stop:
            self.num_released += len(text)
            return text
        self._held += text
        self._num_seen += len(text)
        if self.num_tokens <= self._min_tokens:
            self._num_protected = self._num_seen
        if (found := self._find_stop()) is not None:
            begin, end, form = found
            self.stopped, self.stop_reason = True, self._stop[form]
            return self._visible(self._held[: end if self._includes_stop else begin])
        num_held = max(_overlap(self._held, stop) for stop in self._stop)
        cut = len(self._held) - num_held
        released, self._held = self._held[:cut], self._held[cut:]
        return self._visible(released)

    def _find_stop(self) -> tuple[int, int, str] | None:
        """The stop string that is complete first in the held text, the longest of several: where it begins
        and ends, and its form."""
        protected = self._num_protected - (self._num_seen - len(self._held))
        found = []
        for stop in self._stop:
            begin = self._held.find(stop, max(0, protected - len(stop) + 1))
            if begin >= 0:
                found.append((begin + len(stop), begin, stop))
        if not found:
            return None
        end, begin, form = min(found)
        return begin, end, form

    def _visible(self, text: str) -> str:
        """The part of a decoded text without marks; counts it as given out."""
        if self._marks:
            text = text.translate(self._unmarked)
        self.num_released += len(text)
        return text


def _num_broken(pending: bytes, piece: bytes) -> int:
    """Characters that the pending bytes are by themselves; 0 where the piece goes on with them."""
    if len((pending + piece[:1]).decode(errors="replace")) == 1:
        return 0
    return len(pending.decode(errors="replace"))


def _overlap(text: str, stop: str) -> int:
    """The length of the longest proper beginning of stop that text ends with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
