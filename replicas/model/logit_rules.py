"""Changes that requests make in their rows' logits before the choice: penalties, biases, min_tokens, masks.

The changes of all rows are a few operations on flat indices, whatever the number of rows, and are made in
place: what they overwrite is kept, which is far less than a copy of the rows.
"""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import torch

from replicas.messages import SamplingParams

_IMPOSSIBLE = -np.inf
_NO_PLACES, _NO_AMOUNTS = np.empty(0, np.int64), np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of logits to choose from.

    `seen` and `then` together are all tokens before it, where the sampling has penalties; else they are
    empty.
    """

    sampling: SamplingParams
    position: int
    """The position of the token chosen."""
    prompt_len: int = 0
    """The length of its sequence's prompt."""
    seen: Sequence[int] = ()
    """The tokens that all rows of its segment share."""
    allowed: bytes | None = None
    """A mask of what the token may be (engine.grammar); None for anything."""
    then: tuple[int, ...] = ()
    """The tokens after `seen`, which begin with those of the segment's row before."""

    @property
    def has_rules(self) -> bool:
        """True if its logits are changed before the choice."""
        sampling = self.sampling
        return (
            sampling.has_penalties
            or bool(sampling.logit_bias)
            or self.forbids_end
            or self.allowed is not None
        )

    @property
    def forbids_end(self) -> bool:
        return self.prompt_len <= self.position < self.prompt_len + self.sampling.min_tokens

    def is_followed_by(self, other: "Row") -> bool:
        """True if the other row has the same tokens before it, and maybe more."""
        return (
            self.seen is other.seen
            and self.sampling is other.sampling
            and self.prompt_len == other.prompt_len
            and self.then == other.then[: len(self.then)]
        )


@dataclass(frozen=True, slots=True)
class Overwritten:
    """Logits that a penalty or a bias has changed, as they were."""

    lines: torch.Tensor
    """[R, n]"""
    ids: torch.Tensor
    """[k] int64, columns of the lines"""
    values: torch.Tensor
    """[R, k]"""
    rows: slice | None
    """The rows of logits that the lines are, with ascending ids; None for all rows as one line."""

    def restore(self, tokens: torch.Tensor) -> None:
        """Restores the logits of these tokens at least, [W] int64, one a row of logits."""
        if self.rows is None:
            self.lines.index_copy_(1, self.ids, self.values)
            return
        columns = tokens[self.rows][:, None]
        at = torch.searchsorted(self.ids, columns).clamp_(max=len(self.ids) - 1)
        is_changed = self.ids[at] == columns
        was = self.values.gather(1, at)
        self.lines.scatter_(1, columns, torch.where(is_changed, was, self.lines.gather(1, columns)))


def apply_rules(
    logits: torch.Tensor, rows: Sequence[Row], ruled: Sequence[int], eos_token_ids: Set[int]
) -> list[Overwritten]:
    """Applies penalties, bias, min_tokens and masks, in this order, to logits [W, vocab] float32, in place.

    ruled: the rows that have any, ascending. Ids outside the vocabulary have no effect. Gives back what is to
    be restored for a token's logits to be the model's again, but those that min_tokens or a mask made -inf.
    """
    stride, vocab_size = logits.stride(0), logits.shape[1]
    whole = logits.as_strided((1, stride * (len(logits) - 1) + vocab_size), (stride * len(logits), 1))
    biases = _Biases(stride, vocab_size)
    # Nothing to warn of: a row that a parameter makes infinite has no token, and says so.
    with np.errstate(all="ignore"):
        groups = list(_groups(rows, ruled))
        penalised = [(first, group) for first, group in groups if group[0].sampling.has_penalties]
        penalties = _Penalties(logits, whole, rows).all(penalised) if penalised else []
        for first, group in groups:
            if group[0].sampling.logit_bias:
                biases.add(range(first, first + len(group)), group[0].sampling.logit_bias)
        ends = [index for index in ruled if rows[index].forbids_end]
        biases.add(ends, [(token, _IMPOSSIBLE) for token in eos_token_ids])
    biased, added = biases.on(logits.device)
    changed = [(part.lines, part.ids, part.rows) for part in penalties] + [(whole, biased, None)]
    overwritten = [Overwritten(lines, ids, lines.index_select(1, ids), at) for lines, ids, at in changed]
    for penalty, was in zip(penalties, overwritten, strict=False):
        penalty.lines.index_copy_(1, penalty.ids, penalty.of(was.values))
    whole.index_add_(1, biased, added)
    _apply_masks(logits, [(index, mask) for index in ruled if (mask := rows[index].allowed) is not None])
    return overwritten


def runs_of(indices: Sequence[int], max_length: int | None = None) -> list[slice]:
    """Ascending indices as slices, one for each run of neighbours, or more where one would be too long."""
    runs: list[slice] = []
    for index in indices:
        last = runs[-1] if runs else None
        if last is None or last.stop != index or last.stop - last.start == max_length:
            runs.append(slice(index, index + 1))
        else:
            runs[-1] = slice(last.start, index + 1)
    return runs


def _groups(rows: Sequence[Row], ruled: Sequence[int]) -> Iterator[tuple[int, list[Row]]]:
    """The ruled rows by segment: the index of the first, and neighbours that follow each other."""
    group: list[Row] = []
    first = 0
    for index in ruled:
        if group and index == first + len(group) and group[-1].is_followed_by(rows[index]):
            group.append(rows[index])
            continue
        if group:
            yield first, group
        first, group = index, [rows[index]]
    yield first, group


@dataclass(frozen=True, slots=True)
class _Counts:
    """Counts of the tokens seen, each token once a row; ascending, but for of_later's."""

    rows: np.ndarray
    """[n] int64"""
    ids: np.ndarray
    """[n] int64"""
    times: np.ndarray
    """[n] int64, how often the row's completion has the token"""

    @classmethod
    def of(cls, rows: Sequence[Row], indices: Sequence[int], vocab_size: int) -> "_Counts":
        """Counts the tokens before so many rows, in one pass over all of them.

        indices: of these rows
        """
        # The last bit says whether it is the completion's; int32 sorts fastest.
        keys = np.concatenate(
            [part for row in rows for part in (row.seen, row.then)], dtype=np.int32, casting="unsafe"
        )
        keys <<= 1
        start = 0
        for row in rows:
            end = start + len(row.seen) + len(row.then)
            keys[start + row.prompt_len : end] += 1
            keys[start:end].sort()
            start = end
        lengths = [len(row.seen) + len(row.then) for row in rows]
        of_row = np.repeat(np.asarray(indices, dtype=np.int64), lengths)
        ids = keys >> 1
        is_new = np.ones(len(ids), dtype=np.bool_)
        is_new[1:] = (ids[1:] != ids[:-1]) | (of_row[1:] != of_row[:-1])
        starts = np.flatnonzero(is_new)
        times = np.add.reduceat(keys & 1, starts) if len(starts) else starts
        return cls(of_row[starts], ids[starts].astype(np.int64), times.astype(np.int64)).within(vocab_size)

    @classmethod
    def of_later(cls, group: Sequence[Row], first: int, before: "_Counts", vocab_size: int) -> "_Counts":
        """Counts the tokens that each row but the first sees besides the first's own, which `before` counts.

        first: the first row's index. Not ascending.
        """
        times: dict[int, int] = {}
        found: list[tuple[int, int, int]] = []
        position = len(group[0].seen) + len(group[0].then)
        for index, (last, row) in enumerate(pairwise(group), start=first + 1):
            for token in row.then[len(last.then) :]:
                times[token] = times.get(token, 0) + (position >= row.prompt_len)
                position += 1
            found.extend((index, token, count) for token, count in times.items())
        rows, ids, more = np.array(found, dtype=np.int64).reshape(-1, 3).T
        return cls(rows, ids, more + before.times_of(ids)).within(vocab_size)

    @classmethod
    def join(cls, parts: Sequence["_Counts"]) -> "_Counts":
        return cls(
            *(np.concatenate(part) for part in zip(*((c.rows, c.ids, c.times) for c in parts), strict=True))
        )

    def within(self, vocab_size: int) -> "_Counts":
        return self.only((self.ids >= 0) & (self.ids < vocab_size))

    def only(self, are_wanted: np.ndarray) -> "_Counts":
        if are_wanted.all():
            return self
        return _Counts(self.rows[are_wanted], self.ids[are_wanted], self.times[are_wanted])

    def times_of(self, ids: np.ndarray) -> np.ndarray:
        """The number of times that each of the ids comes in these counts, which are of a single row."""
        if not len(self.ids):
            return np.zeros_like(ids)
        at = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
        return np.where(self.ids[at] == ids, self.times[at], 0)


@dataclass(frozen=True, slots=True)
class _Penalty:
    """A change of some columns of some lines."""

    lines: torch.Tensor
    """[R, n], as in Overwritten"""
    rows: slice | None
    """As in Overwritten."""
    ids: torch.Tensor
    """[k] int64, each once"""
    scale: torch.Tensor
    """[k] float32"""
    shrinks: bool
    """True if scale is at least 1 in all of k, false if in none."""
    taken_off: torch.Tensor | None
    """[k] float32; None for nothing"""

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The penalised values [R, k]; the given ones are not changed.

        Divided by the scale above 0, multiplied below: the lower of the two if it shrinks, else the higher.
        """
        divided, multiplied = values / self.scale, values * self.scale
        choice = torch.minimum if self.shrinks else torch.maximum
        penalised = choice(divided, multiplied, out=divided)
        return penalised if self.taken_off is None else penalised.sub_(self.taken_off)


class _Penalties:
    """Builds the penalties of rows from their repetition, presence and frequency parameters."""

    def __init__(self, logits: torch.Tensor, whole: torch.Tensor, rows: Sequence[Row]):
        """whole: [1, N], the logits as one line."""
        self._logits, self._whole = logits, whole
        params = [row.sampling for row in rows]
        self._scale = np.array([p.repetition_penalty for p in params])
        self._presence = np.array([p.presence_penalty for p in params])
        self._frequency = np.array([p.frequency_penalty for p in params])

    def all(self, groups: Sequence[tuple[int, list[Row]]]) -> list[_Penalty]:
        """The penalties of all groups. Each begins with the model's logits, so where two meet the later one
        counts."""
        vocab_size = self._logits.shape[1]
        found: list[_Penalty] = []
        alone, later = [], []
        for first, group in groups:
            if len(group) == 1:
                alone.append((first, group[0]))
                continue
            before = _Counts.of(group[:1], [first], vocab_size)
            found += self._of(before, slice(first, first + len(group)))
            later.append(_Counts.of_later(group, first, before, vocab_size))
        if alone:
            indices, rows = zip(*alone, strict=True)
            later.append(_Counts.of(rows, indices, vocab_size))
        return found + self._of(_Counts.join(later), None) if later else found

    def _of(self, counts: _Counts, rows: slice | None) -> list[_Penalty]:
        """The penalties of these counts, on the same ids of all these rows; None: of the counts' own rows."""
        shrinks = self._scale[counts.rows] >= 1
        found = []
        for kind in (True, False):
            part = counts.only(shrinks == kind)
            if len(part.ids):
                found.append(self._build(part, kind, rows))
        return found

    def _build(self, counts: _Counts, shrinks: bool, rows: slice | None) -> _Penalty:
        own, ids, times = counts.rows, counts.ids, counts.times
        lines, device = self._whole if rows is None else self._logits[rows], self._logits.device
        columns = ids + own * self._logits.stride(0) if rows is None else ids
        taken_off = None
        if self._presence.any() or self._frequency.any():
            amounts = self._presence[own] * (times > 0) + self._frequency[own] * times
            taken_off = torch.from_numpy(amounts.astype(np.float32)).to(device)
        scale = torch.from_numpy(self._scale[own].astype(np.float32)).to(device)
        return _Penalty(lines, rows, torch.from_numpy(columns).to(device), scale, shrinks, taken_off)


class _Biases:
    """Biases of logits, by their places in all the logits as one line."""

    def __init__(self, stride: int, vocab_size: int):
        self._stride = stride
        self._vocab_size = vocab_size
        self._places, self._amounts = [_NO_PLACES], [_NO_AMOUNTS]

    def add(self, rows: Sequence[int], biases: Sequence[tuple[int, float]]) -> None:
        """Adds the same biases for all of the rows."""
        pairs = np.fromiter(chain.from_iterable(biases), np.float64, 2 * len(biases)).reshape(-1, 2)
        pairs = pairs[(pairs[:, 0] >= 0) & (pairs[:, 0] < self._vocab_size)]
        starts = np.array(rows, dtype=np.int64) * self._stride
        self._places.append((starts[:, None] + pairs[:, 0].astype(np.int64)).ravel())
        self._amounts.append(np.tile(pairs[:, 1], len(starts)).astype(np.float32))

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The places [n] int64, and what is added there, [1, n]."""
        places, amounts = np.concatenate(self._places), np.concatenate(self._amounts)
        return torch.from_numpy(places).to(device), torch.from_numpy(amounts)[None].to(device)


def _apply_masks(logits: torch.Tensor, masks: Sequence[tuple[int, bytes]]) -> None:
    """Makes all that a row's mask does not allow impossible, for each (row, mask)."""
    vocab_size = logits.shape[1]
    num_bytes = -(-vocab_size // 8)
    most = _MOST.to(logits.device)
    for run in runs_of([index for index, _ in masks], max(1, _MASKED_AT_ONCE // vocab_size)):
        part, masks = masks[: run.stop - run.start], masks[run.stop - run.start :]
        packed = b"".join(mask[:num_bytes].ljust(num_bytes, b"\0") for _, mask in part)
        octets = torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(logits.device).int()
        bounds = most.index_select(0, octets).view(len(part), -1)[:, :vocab_size]
        torch.minimum(logits[run], bounds, out=logits[run])


def _bounds_by_octet() -> torch.Tensor:
    """[256, 8] float32: for each bit of an octet, the least first, inf where it is set and -inf where not."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(np.where(bits == 1, np.inf, -np.inf).astype(np.float32))


_MOST = _bounds_by_octet()
"""The upper bounds that masks set on logits, by octet; the choice by each bit costs ten times as much."""
_MASKED_AT_ONCE = 1 << 18
"""The number of logits masked at once, so that their bounds stay in the processor's cache."""
