"""What an answer consists of in APIs that have its reasoning, its text and its calls as blocks in a row."""

import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from replicas.messages import Delta, Finished, TextLogprob
from router.answer import Answer, Counts
from router.errors import encode

_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


class Kind(Enum):
    REASONING = "reasoning"
    TEXT = "text"
    CALL = "call"


class Step(Enum):
    OPENED = "opened"
    GREW = "grew"
    CLOSED = "closed"


@dataclass(slots=True)
class Block:
    """One block; a call's text is its arguments' JSON."""

    kind: Kind
    index: int
    call_id: str = ""
    name: str = ""
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def arguments(self) -> str:
        """A call's arguments, as the model wrote them; none where it was cut before they were whole.

        Their JSON may have numbers that Python can't write, and depths that it can't read.
        """
        text = self.text
        try:
            is_whole = isinstance(json.loads(text, parse_int=str, parse_float=str), dict)
        except RecursionError:
            bare = _STRING.sub("", text)
            is_whole = '"' not in bare and all(bare.count(b) == bare.count(e) for b, e in ("[]", "{}"))
        except ValueError:
            is_whole = False
        return text if is_whole else "{}"


Change = tuple[Step, Block, str]
"""A step of a block, and the text that it grew by."""


class Blocks:
    """The blocks of one answer as its text comes in: one is open at a time."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None

    def take(self, delta: Delta) -> Iterator[Change]:
        if delta.reasoning:
            yield from self._grow(Kind.REASONING, delta.reasoning)
        if delta.text:
            yield from self._grow(Kind.TEXT, delta.text)
        for piece in delta.tool_calls:
            if piece.name is not None:
                yield from self._begin(Block(Kind.CALL, len(self.all), piece.call_id or "", piece.name))
            if piece.arguments:
                yield from self._grow(Kind.CALL, piece.arguments)

    def close(self) -> Iterator[Change]:
        """Closes the last block; an answer without any has an empty text."""
        if not self.all:
            yield from self._begin(Block(Kind.TEXT, 0))
        if self._open is not None:
            yield Step.CLOSED, self._open, ""
            self._open = None

    def _grow(self, kind: Kind, text: str) -> Iterator[Change]:
        if self._open is None or self._open.kind is not kind:
            yield from self._begin(Block(kind, len(self.all)))
        assert self._open is not None
        self._open.parts.append(text)
        yield Step.GREW, self._open, text

    def _begin(self, block: Block) -> Iterator[Change]:
        if self._open is not None:
            yield Step.CLOSED, self._open, ""
        self._open = block
        self.all.append(block)
        yield Step.OPENED, block, ""


def named_event(name: str, body: dict[str, Any]) -> bytes:
    """One server-sent event that has its name."""
    return b"event: " + name.encode() + b"\ndata: " + encode(body) + b"\n\n"


@dataclass(frozen=True, slots=True)
class BlockAnswer(Answer):
    """An answer of one choice in blocks."""

    blocks: Blocks = field(default_factory=Blocks)

    @abstractmethod
    def change(self, step: Step, block: Block, text: str) -> bytes:
        """The events of a step."""

    @abstractmethod
    def body(self, last: Delta, finished: Finished) -> dict[str, Any]:
        """The whole answer, once all blocks are there."""

    def delta(self, delta: Delta, so_far: Counts) -> bytes:
        return b"".join(self.change(*change) for change in self.blocks.take(delta))

    def whole(self, choices: Sequence[Delta], finished: Finished) -> dict[str, Any]:
        (only,) = choices
        for _ in (*self.blocks.take(only), *self.blocks.close()):
            pass
        return self.body(only, finished)

    def closed(self) -> bytes:
        """The events of the last block's end."""
        return b"".join(self.change(*change) for change in self.blocks.close())

    def end(self, last: Delta, so_far: Counts) -> bytes:
        raise AssertionError("there is one choice")

    def logprobs(self, entries: Sequence[TextLogprob]) -> dict[str, Any]:
        raise AssertionError("nothing asks for log-probabilities")
