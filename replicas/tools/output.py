"""What a model writes, told apart as it comes: reasoning, the answer's text, and calls.

Text is held back while it may be the beginning of a tag, with the blanks before it, so that no client sees
half a tag; what comes out in the end is the same however the text came in.
"""

from collections.abc import Collection, Mapping
from enum import Enum

from replicas.messages import ToolCallDelta
from replicas.record import record
from replicas.tools.formats import Tag, ToolFormat
from replicas.tools.readers import CallReader, CallSink
from replicas.tools.reasoning import ReasoningMarks


@record
class Parsed:
    """New text of a completion, told apart."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.calls)

    def __add__(self, later: "Parsed") -> "Parsed":
        return Parsed(self.text + later.text, self.reasoning + later.reasoning, self.calls + later.calls)


class _Place(Enum):
    BEGINNING = 0
    REASONING = 1
    GAP = 2
    """Behind reasoning, where blanks mean nothing."""
    ANSWER_BEGINNING = 3
    """Where a bare call may begin."""
    TEXT = 4
    CALLS = 5


class OutputParser:
    """Tells apart one completion's text.

    format_: of calls; None reads none. names: the functions that may be called. reasoning: its marks, or
    None. begins_in_reasoning: its first mark is in the prompt. tag: the spelling of tags and marks in the
    text, where control tokens have one of their own. is_required: the answer is calls alone, so what is left
    of one that was cut is no text. spelled: what stands in the answer for a control token's character that is
    no tag or mark where it came; None leaves it out.
    """

    def __init__(
        self,
        format_: ToolFormat | None,
        names: Collection[str],
        reasoning: ReasoningMarks | None,
        begins_in_reasoning: bool,
        tag: Tag,
        is_required: bool = False,
        spelled: Mapping[int, str | None] | None = None,
    ):
        self._format = format_
        self._names = names
        self._tag = tag
        self._is_required = is_required
        self._spelled = spelled or {}
        self._marks = None if reasoning is None else (tag(reasoning.begin), tag(reasoning.end))
        self._sink = CallSink()
        self._reader: CallReader | None = None
        self._held = ""
        self._num_taken = 0  # characters before the held ones
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._is_blank = True  # nothing but blanks of the reasoning yet
        self.reasoning_end: int | None = None if begins_in_reasoning else 0
        """The index of the character behind the reasoning and its marks; None while it goes on."""
        self._place = _Place.BEGINNING
        if begins_in_reasoning:
            self._place = _Place.REASONING
        elif reasoning is None:
            self._place = _Place.ANSWER_BEGINNING

    @property
    def has_marks(self) -> bool:
        """True if it looks for reasoning."""
        return self._marks is not None

    @property
    def ends_with_call(self) -> bool:
        """True if it has a call, and none that is not whole."""
        return self._sink.num_calls > 0 and (self._reader is None or self._reader.is_whole)

    def push(self, text: str) -> Parsed:
        """Takes more text in; returns what has become certain."""
        self._held += text
        while self._step():
            pass
        return self._take()

    def finish(self) -> Parsed:
        """Returns what was held back, at the text's end. Half a call is no text and is left out."""
        if self._place is _Place.REASONING:
            self._reason(self._held.rstrip())
        elif self._place is not _Place.CALLS and not self._is_required:
            self._text.append(self._held)
        self._drop(len(self._held))
        return self._take()

    def _take(self) -> Parsed:
        text, reasoning = "".join(self._text), "".join(self._reasoning)
        if self._spelled:
            text, reasoning = text.translate(self._spelled), reasoning.translate(self._spelled)
        parsed = Parsed(text, reasoning, self._sink.take())
        self._text, self._reasoning = [], []
        return parsed

    def _drop(self, count: int) -> str:
        dropped, self._held = self._held[:count], self._held[count:]
        self._num_taken += len(dropped)
        return dropped

    def _step(self) -> bool:
        """Goes from one place to the next; False where more text is needed for that."""
        match self._place:
            case _Place.BEGINNING:
                return self._begin()
            case _Place.REASONING:
                return self._go_on_reasoning()
            case _Place.GAP:
                self._drop(len(self._held) - len(self._held.lstrip()))
                return bool(self._held) and self._go_to(_Place.ANSWER_BEGINNING)
            case _Place.ANSWER_BEGINNING:
                return self._begin_answer()
            case _Place.TEXT:
                return self._go_on_text()
            case _Place.CALLS:
                return self._read_calls()

    def _go_to(self, place: _Place) -> bool:
        self._place = place
        return True

    def _begin(self) -> bool:
        assert self._marks is not None
        begin = self._marks[0]
        ahead = self._held.lstrip()
        if ahead.startswith(begin):
            self._drop(len(self._held) - len(ahead) + len(begin))
            self.reasoning_end = None
            return self._go_to(_Place.REASONING)
        return not begin.startswith(ahead) and self._go_to(_Place.ANSWER_BEGINNING)

    def _go_on_reasoning(self) -> bool:
        assert self._marks is not None
        end = self._marks[1]
        before, found, _ = self._held.partition(end)
        if not found:
            self._reason(self._drop(_num_free(self._held, end)))
            return False
        self._reason(before.rstrip())
        self._drop(len(before) + len(end))
        self.reasoning_end = self._num_taken
        return self._go_to(_Place.GAP)

    def _reason(self, text: str) -> None:
        if self._is_blank:
            text = text.lstrip()
        if text:
            self._is_blank = False
            self._reasoning.append(text)

    def _begin_answer(self) -> bool:
        if self._format is None or self._format.opening is not None:
            return self._go_to(_Place.TEXT)
        begins = self._format.begins_call(self._held, self._names, self._tag)
        if begins is None:
            return False
        return self._begin_calls(self._format) if begins else self._go_to(_Place.TEXT)

    def _go_on_text(self) -> bool:
        opening = None if self._format is None else self._format.opening
        if opening is None or self._format is None:
            self._text.append(self._drop(len(self._held)))
            return False
        tag = self._tag(opening)
        before, found, _ = self._held.partition(tag)
        if not found:
            self._text.append(self._drop(_num_free(self._held, tag)))
            return False
        self._text.append(before.rstrip())
        self._drop(len(before) + len(tag))
        return self._begin_calls(self._format)

    def _begin_calls(self, format_: ToolFormat) -> bool:
        self._reader = format_.reader(self._tag)
        return self._go_to(_Place.CALLS)

    def _read_calls(self) -> bool:
        assert self._reader is not None
        self._reader.push(self._drop(len(self._held)), self._sink)
        if self._reader.rest is None:
            return False
        self._held, self._reader = self._reader.rest, None
        return self._go_to(_Place.TEXT)


def _num_free(text: str, tag: str) -> int:
    """The length of the text without its end that may begin the tag, or come as blanks before it."""
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:length]):
            text = text[:-length]
            break
    return len(text.rstrip())
