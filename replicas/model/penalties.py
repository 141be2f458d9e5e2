"""Penalties of repetition, presence and frequency, on the logits of rows that go on from the same tokens.

A token that is among those before its row has its logit divided by repetition_penalty above 0, multiplied
below, and less presence_penalty and frequency_penalty for each time that the completion has it, as OpenAI's
API and Hugging Face's transformers define them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from replicas.engine.history import Counts, Prefix
from replicas.messages import SamplingParams

_NO_IDS, _NO_TIMES = np.empty(0, np.int64), np.empty(0, np.int32)


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


@dataclass(frozen=True, slots=True)
class Penalty:
    """What one request's penalties are to change in its rows, which are neighbours."""

    rows: slice
    scale: float
    """The repetition penalty."""
    taken_off: np.ndarray
    """[n] float32, by the number of times that the completion has a token"""
    shared: Counts
    """Of the tokens that all the rows have before them, within the vocabulary."""
    own_starts: np.ndarray
    """[R + 1] int64, where each row's own counts begin in what follows"""
    own_ids: np.ndarray
    """[m] int64, each once a row: tokens that the row has besides, whatever `shared` says of them"""
    own_times: np.ndarray
    """[m] int32, how often the row's completion has them in all"""

    @classmethod
    def of(
        cls,
        sampling: SamplingParams,
        first_row: int,
        shared: Prefix,
        own: Sequence[Sequence[int]],
        prompt_len: int,
        vocab_size: int,
    ) -> "Penalty":
        """Counts what the rows have before them.

        own: for each row the tokens after the shared ones, which begin with those of the row before it
        """
        counts = shared.counts.below(vocab_size)
        starts, ids, times = _own_counts(counts, own, len(shared), prompt_len, vocab_size)
        most = max(int(part.max(initial=0)) for part in (counts.times, times))
        by_times = np.arange(most + 1)
        with np.errstate(all="ignore"):  # a row that becomes infinite has no token, and says so
            taken_off = sampling.presence_penalty * (by_times > 0) + sampling.frequency_penalty * by_times
            taken_off = taken_off.astype(np.float32)
        rows = slice(first_row, first_row + len(own))
        return cls(rows, sampling.repetition_penalty, taken_off, counts, starts, ids, times)

    @property
    def shrinks(self) -> bool:
        return self.scale >= 1

    @property
    def num_rows(self) -> int:
        return len(self.own_starts) - 1

    @property
    def own_places(self) -> tuple[np.ndarray, np.ndarray]:
        """The row of logits and the column of each of the own ids, both [m] int64."""
        rows = np.repeat(np.arange(self.rows.start, self.rows.stop), np.diff(self.own_starts))
        return rows, self.own_ids


Penalise = Callable[[torch.Tensor, Sequence[Penalty]], list[Overwritten]]


def _own_counts(
    shared: Counts, own: Sequence[Sequence[int]], start: int, prompt_len: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each row's own counts begin, the ids, and the times, as a Penalty has them."""
    if not own[-1]:
        return np.zeros(len(own) + 1, np.int64), _NO_IDS, _NO_TIMES
    token_ids = np.asarray(own[-1], dtype=np.int64)
    is_completion = np.arange(start, start + len(token_ids)) >= prompt_len
    first_rows = np.searchsorted([len(tokens) for tokens in own], np.arange(len(token_ids)), side="right")
    ids, columns = np.unique(token_ids, return_inverse=True)
    is_seen = np.zeros((len(own), len(ids)), np.bool_)
    is_seen[first_rows, columns] = True
    is_seen = np.logical_or.accumulate(is_seen) & (ids < vocab_size)
    times = np.zeros(is_seen.shape, np.int32)
    np.add.at(times, (first_rows, columns), is_completion)
    times = times.cumsum(axis=0, dtype=np.int32) + shared.times_of(ids)
    rows, columns = is_seen.nonzero()
    return rows.searchsorted(np.arange(len(own) + 1)), ids[columns], times[rows, columns]


@dataclass(frozen=True, slots=True)
class _Change:
    """A change of some columns of some lines, all shapes as in Overwritten."""

    lines: torch.Tensor
    rows: slice | None
    ids: torch.Tensor
    scale: torch.Tensor
    """[k] or [1]"""
    shrinks: bool
    """True if scale is at least 1 in all of k, false if in none."""
    taken_off: torch.Tensor
    """[k]"""

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The penalised values [R, k]; the given ones are not changed.

        Divided by the scale above 0, multiplied below: the lower of the two if it shrinks, else the higher.
        """
        divided, multiplied = values / self.scale, values * self.scale
        choice = torch.minimum if self.shrinks else torch.maximum
        return choice(divided, multiplied, out=divided).sub_(self.taken_off)


def penalise(logits: torch.Tensor, penalties: Sequence[Penalty]) -> list[Overwritten]:
    """Applies the penalties to logits [W, vocab] float32, in place, and gives back what they overwrite.

    A part for each of the penalties with several rows, and two for all the rest, however much that is.
    """
    shared = [penalty for penalty in penalties if penalty.num_rows > 1 and len(penalty.shared.ids)]
    changes = [_of_shared(logits, penalty) for penalty in shared]
    for shrinks in (True, False):
        rest = [penalty for penalty in penalties if penalty.shrinks == shrinks]
        changes += [_of_the_rest(logits, rest)] if rest else []
    overwritten = [
        Overwritten(change.lines, change.ids, change.lines.index_select(1, change.ids), change.rows)
        for change in changes
    ]
    for change, was in zip(changes, overwritten, strict=True):
        change.lines.index_copy_(1, change.ids, change.of(was.values))
    return overwritten


def as_line(logits: torch.Tensor) -> torch.Tensor:
    """Logits [W, vocab] as [1, n], with what lies between the rows."""
    stride = logits.stride(0)
    return logits.as_strided((1, stride * (len(logits) - 1) + logits.shape[1]), (stride * len(logits), 1))


def _of_shared(logits: torch.Tensor, penalty: Penalty) -> _Change:
    device = logits.device
    scale = torch.tensor([penalty.scale], device=device)
    ids = torch.from_numpy(penalty.shared.ids).to(device)
    taken_off = torch.from_numpy(penalty.taken_off[penalty.shared.times]).to(device)
    return _Change(logits[penalty.rows], penalty.rows, ids, scale, penalty.shrinks, taken_off)


def _of_the_rest(logits: torch.Tensor, penalties: Sequence[Penalty]) -> _Change:
    """The rows' own counts, and the shared ones of rows that share them with no other.

    The penalties are not none, and alike in that they shrink or not.
    """
    places: list[np.ndarray] = []
    scales: list[np.ndarray] = []
    taken_off: list[np.ndarray] = []
    for penalty in penalties:
        rows, ids = penalty.own_places
        times = penalty.own_times
        if penalty.num_rows == 1:
            is_shared = ~np.isin(penalty.shared.ids, ids)
            ids = np.concatenate((penalty.shared.ids[is_shared], ids))
            times = np.concatenate((penalty.shared.times[is_shared], times))
            rows = np.full(len(ids), penalty.rows.start)
        places.append(rows * logits.stride(0) + ids)
        scales.append(np.full(len(ids), penalty.scale, np.float32))
        taken_off.append(penalty.taken_off[times])
    joined = [torch.from_numpy(np.concatenate(parts)) for parts in (places, scales, taken_off)]
    columns, scale, amounts = (part.to(logits.device) for part in joined)
    return _Change(as_line(logits), None, columns, scale, penalties[0].shrinks, amounts)
