"""Steps as what has changed since the steps before: what the leader of a split model sends to the others.

Most of a sequence's segment is as it was in the one before: the request's sampling, all pages but maybe one,
how many tokens are causal, what penalties count. Both sides keep each sequence's last segment, and forget it
by the same rule, so a change says enough.
"""

import pickle
from collections import OrderedDict
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, NamedTuple

from policies.modes import Mode
from replicas.engine.batch import ScheduledBatch, Segment
from replicas.engine.history import NO_TOKENS, History, Prefix
from replicas.messages import SamplingParams

KEPT_STEPS = 64
"""The steps after which a sequence without a segment in them is forgotten, and sent whole when it comes
again."""

_SENT, _KEPT, _FOLLOWS = slice(3), slice(3, -1), -1
_NAMES = tuple(entry.name for entry in fields(Segment))
assert (*_NAMES[_SENT], _NAMES[_FOLLOWS]) == ("seq_id", "start", "token_ids", "follows")
_kept = attrgetter(*_NAMES[_KEPT])
"""What is sent of a segment where it has changed alone; the fields before it always are."""
_BLANK = Segment(0, 0, (), (), 0, False, (), SamplingParams())
"""What a sequence's first segment is a change of."""


class Step(NamedTuple):
    """What goes to the followers."""

    batch: ScheduledBatch
    follows: bool
    """True if it is begun behind the step before it."""


@dataclass(slots=True)
class _Known:
    """What both sides know of a sequence."""

    segment: Segment
    history: History | None = None
    """The last one that its segments had; each side has its own."""
    num_tokens: int = 0
    """The history's tokens that the followers have."""
    last_step: int = 0


class _Memory:
    """The sequences of the last steps, by number."""

    def __init__(self) -> None:
        self._known: OrderedDict[int, _Known] = OrderedDict()
        self._num_steps = 0

    def __len__(self) -> int:
        return len(self._known)

    def of(self, seq_id: int) -> _Known:
        """What is known of a sequence that is in this step."""
        known = self._known.get(seq_id)
        if known is None:
            known = self._known[seq_id] = _Known(_BLANK)
        self._known.move_to_end(seq_id)
        known.last_step = self._num_steps
        return known

    def end_step(self) -> None:
        known = self._known
        while known and next(iter(known.values())).last_step <= self._num_steps - KEPT_STEPS:
            known.popitem(last=False)
        self._num_steps += 1


_Row = tuple[int, int, tuple[int, ...], dict[str, Any] | None, Any]
"""What is sent of a segment: its first fields, the others that have changed, and the row of the one it
follows."""


class StepEncoder:
    """The leader's side. Each step that is encoded has to reach the followers, in this order."""

    def __init__(self) -> None:
        self._memory = _Memory()

    def encode(self, step: Step) -> bytes:
        """The step as bytes, never none."""
        batch = step.batch
        rows = [self._row(segment) for segment in batch.segments]
        self._memory.end_step()
        mode = None if batch.mode is None else batch.mode.value
        return pickle.dumps((mode, step.follows, rows), pickle.HIGHEST_PROTOCOL)

    def _row(self, segment: Segment) -> _Row:
        known = self._memory.of(segment.seq_id)
        # What it follows is nearly what is known, but for what has come of it.
        followed = None if segment.follows is None else self._row(segment.follows)
        changes = _changes(segment, known)
        known.segment = segment
        return segment.seq_id, segment.start, segment.token_ids, changes, followed


def _changes(segment: Segment, known: _Known) -> dict[str, Any] | None:
    kept, before = _kept(segment), _kept(known.segment)
    if kept == before:
        return None
    found = {
        name: value
        for name, value, was in zip(_NAMES[_KEPT], kept, before, strict=True)
        if value is not was and value != was
    }
    if "pages" in found:
        count = len(known.segment.pages)
        if segment.pages[:count] != known.segment.pages:
            count = 0
        found["pages"] = count, segment.pages[count:]
    if "history" in found:
        found["history"] = _history_change(segment.history, known)
    return found


_HistoryChange = Prefix | tuple[tuple[int, ...], int] | None
"""A history that is new, the tokens added to the last one with the length that counts, or that there is
none."""


def _history_change(prefix: Prefix, known: _Known) -> _HistoryChange:
    history = prefix.history
    if not len(prefix):
        return None
    if history is not known.history:
        known.history, known.num_tokens = history, len(history)
        return prefix
    added = tuple(history.token_ids(len(prefix), known.num_tokens))
    known.num_tokens += len(added)
    return added, len(prefix)


class StepDecoder:
    """A follower's side."""

    def __init__(self) -> None:
        self._memory = _Memory()

    def decode(self, message: bytes) -> Step:
        mode, follows, rows = pickle.loads(message)
        segments = tuple(self._segment(row) for row in rows)
        self._memory.end_step()
        return Step(ScheduledBatch(segments, None if mode is None else Mode(mode)), follows)

    def _segment(self, row: _Row) -> Segment:
        seq_id, start, token_ids, changes, followed_row = row
        known = self._memory.of(seq_id)
        followed = None if followed_row is None else self._segment(followed_row)
        kept: tuple[Any, ...] = _kept(known.segment)
        if changes is not None:
            if "pages" in changes:
                count, added = changes["pages"]
                changes["pages"] = known.segment.pages[:count] + added
            if "history" in changes:
                changes["history"] = _history(changes["history"], known)
            kept = tuple((dict(zip(_NAMES[_KEPT], kept, strict=True)) | changes).values())
        values = (seq_id, start, token_ids, *kept, followed)
        known.segment = Segment(*values)
        return known.segment


def _history(change: _HistoryChange, known: _Known) -> Prefix:
    if change is None:
        return NO_TOKENS
    if isinstance(change, Prefix):
        known.history = change.history
        return change
    added, length = change
    assert known.history is not None, "the first one is sent whole"
    for token in added:
        known.history.append(token)
    return known.history.first(length)
