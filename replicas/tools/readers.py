"""Readers of calls: the text behind a call's opening in, pieces of calls out, as both come."""

import re
import secrets
from abc import ABC, abstractmethod

from replicas.messages import ToolCallDelta

_OF_JSON = re.compile(r'["{}\[\]]')
OF_PYTHON = re.compile(r"""["'(){}\[\]]""")
_STRING_PARTS = {quote: re.compile(rf"[{quote}\\]") for quote in "\"'"}


class CallSink:
    """Takes the calls of one completion, as they are read; gives each an index and an id."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._pieces: list[ToolCallDelta] = []

    def begin(self, name: str, arguments: str = "") -> None:
        call_id = f"call_{secrets.token_hex(12)}"
        self._pieces.append(ToolCallDelta(self.num_calls, arguments, call_id, name))
        self.num_calls += 1

    def add(self, arguments: str) -> None:
        if arguments:
            self._pieces.append(ToolCallDelta(self.num_calls - 1, arguments))

    def take(self) -> tuple[ToolCallDelta, ...]:
        pieces, self._pieces = tuple(self._pieces), []
        return pieces


class CallReader(ABC):
    """Reads the calls behind one opening.

    rest: the text behind them, once they have ended; None before. is_whole: True unless the last call that
    has begun still goes on.
    """

    rest: str | None = None
    is_whole = True

    @abstractmethod
    def push(self, text: str, sink: CallSink) -> None:
        """Takes more text in. The calls are the same, however the text is cut."""


class ObjectScanner:
    """Finds the end of an object that comes in parts, whatever stands in its strings.

    marks: what its brackets and quotes are, JSON's or Python's
    """

    def __init__(self, marks: re.Pattern[str] = _OF_JSON) -> None:
        self._marks = marks
        self._depth = 0
        self._quote = ""
        """The one that ends the string; empty outside of strings."""
        self._is_escaped = False

    def scan(self, text: str) -> int | None:
        """The index behind the object's end; None where the object goes on behind this text."""
        at = 0
        while at < len(text):
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            found = (_STRING_PARTS[self._quote] if self._quote else self._marks).search(text, at)
            if found is None:
                return None
            at = found.end()
            match found[0]:
                case "\\":
                    self._is_escaped = True
                case '"' | "'" as quote:
                    self._quote = "" if self._quote else quote
                case "{" | "[" | "(":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if not self._depth:
                        return at
        return None


class JsonCallReader(CallReader):
    """Reads calls whose arguments are a JSON object.

    header: what comes before the arguments, with a group `name`. close: what comes behind them. separator:
    what stands between two calls; empty where there is one alone. end: what comes behind the last call.
    """

    def __init__(self, header: re.Pattern[str], close: re.Pattern[str], separator: str = "", end: str = ""):
        self._header = header
        self._close = close
        self._separator = separator
        self._end = end
        self._text = ""
        self._scanner: ObjectScanner | None = None
        self._is_between = False

    def push(self, text: str, sink: CallSink) -> None:
        self._text += text
        while self.rest is None and self._goes_on(sink):
            pass

    def _goes_on(self, sink: CallSink) -> bool:
        """Takes the next part of a call off the text; False where it is not all there."""
        if self._is_between:
            return self._pass_between()
        if self._scanner is not None:
            return self._read_arguments(self._scanner, sink)
        pattern = self._header if self.is_whole else self._close
        found = pattern.match(self._text)
        if found is None:
            return False
        self._text = self._text[found.end() :]
        if pattern is self._header:
            sink.begin(found["name"])
            self._scanner, self.is_whole = ObjectScanner(), False
        else:
            self.is_whole = True
            self._is_between = bool(self._separator)
            if not self._is_between:
                self.rest = self._text
        return True

    def _read_arguments(self, scanner: ObjectScanner, sink: CallSink) -> bool:
        end = scanner.scan(self._text)
        sink.add(self._text[:end])
        self._text = "" if end is None else self._text[end:]
        if end is not None:
            self._scanner = None
        return end is not None

    def _pass_between(self) -> bool:
        ahead = self._text.lstrip()
        if not ahead:
            return False
        self._is_between = False
        if ahead.startswith(self._separator):
            self._text = ahead[len(self._separator) :]
        else:
            self.rest = ahead.removeprefix(self._end)
        return True
