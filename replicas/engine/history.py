"""A sequence's tokens as penalties count them, each step's on top of those before."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEW_TOKENS = 64
"""So many more tokens are counted one by one; more than that at once, with all before them."""


@dataclass(frozen=True, slots=True)
class Counts:
    """The different tokens of a sequence, and how often its completion has each. The arrays never change."""

    ids: np.ndarray
    """[k] int64, ascending"""
    times: np.ndarray
    """[k] int32, 0 for those of the prompt alone"""

    @classmethod
    def of(cls, token_ids: np.ndarray, prompt_len: int) -> "Counts":
        """Counts all of the tokens; the first prompt_len are the prompt's."""
        # The last bit says whether it is the completion's.
        keys = np.sort(token_ids.astype(np.int32) << 1 | (np.arange(len(token_ids)) >= prompt_len))
        ids = keys >> 1
        starts = np.flatnonzero(np.diff(ids, prepend=-1))
        times = np.add.reduceat(keys & 1, starts) if len(starts) else starts
        return cls(ids[starts].astype(np.int64), times.astype(np.int32))

    def with_more(self, token_ids: Sequence[int], num_of_prompt: int) -> "Counts":
        """The counts with a few more tokens, of which so many, the first ones, are the prompt's."""
        ids, times = self.ids, self.times.copy()
        for index, token in enumerate(token_ids):
            at = ids.searchsorted(token)
            if at == len(ids) or ids[at] != token:
                ids, times = np.insert(ids, at, token), np.insert(times, at, 0)
            times[at] += index >= num_of_prompt
        return Counts(ids, times)

    def below(self, vocab_size: int) -> "Counts":
        """The counts of ids within the vocabulary."""
        end = int(self.ids.searchsorted(vocab_size))
        return self if end == len(self.ids) else Counts(self.ids[:end], self.times[:end])

    def times_of(self, ids: np.ndarray) -> np.ndarray:
        """How often the completion has each of the ids, [n] int32; 0 for ids that are none of these."""
        if not len(self.ids):
            return np.zeros(len(ids), np.int32)
        at = np.minimum(self.ids.searchsorted(ids), len(self.ids) - 1)
        return np.where(self.ids[at] == ids, self.times[at], 0).astype(np.int32)


class History:
    """The tokens of a sequence, to which more are only ever added, and the counts that were last asked for.

    Counts of a few more tokens than the last time take no look at those before.
    """

    def __init__(self, token_ids: Sequence[int], prompt_len: int):
        self._token_ids = array("i", token_ids)
        self._prompt_len = prompt_len
        self._num_counted = 0
        self._counts = Counts(np.empty(0, np.int64), np.empty(0, np.int32))

    def __len__(self) -> int:
        return len(self._token_ids)

    def __reduce__(self) -> tuple[type["History"], tuple[object, ...]]:
        """Leaves the counts out: another process makes its own."""
        return History, (self._token_ids, self._prompt_len)

    def append(self, token_id: int) -> None:
        self._token_ids.append(token_id)

    def first(self, length: int) -> "Prefix":
        """The first tokens, so many of them; all there are at most."""
        return Prefix(self, min(length, len(self)))

    def token_ids(self, length: int, start: int = 0) -> "array[int]":
        """The first tokens, so many of them, from `start` on."""
        return self._token_ids[start:length]

    def counts(self, length: int) -> Counts:
        """The counts of the first tokens, so many of them."""
        counted = self._num_counted
        if not counted <= length <= counted + FEW_TOKENS:
            self._counts = Counts.of(np.array(self._token_ids[:length], np.int32), self._prompt_len)
        elif length > counted:
            num_of_prompt = max(0, self._prompt_len - counted)
            self._counts = self._counts.with_more(self._token_ids[counted:length], num_of_prompt)
        self._num_counted = length
        return self._counts


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """The first tokens of a sequence, which stay the same while it goes on."""

    history: History
    length: int

    @classmethod
    def of(cls, token_ids: Sequence[int], prompt_len: int = 0) -> "Prefix":
        """All of these tokens, of which the first prompt_len are the prompt's."""
        return History(token_ids, prompt_len).first(len(token_ids))

    def __len__(self) -> int:
        return self.length

    def __eq__(self, other: object) -> bool:
        """True for the same tokens, in another process too: ranks of one model must compare alike."""
        if not isinstance(other, Prefix) or self.length != other.length:
            return False
        return self.history is other.history or self.token_ids == other.token_ids

    def __hash__(self) -> int:
        return hash(self.length)

    @property
    def token_ids(self) -> "array[int]":
        return self.history.token_ids(self.length)

    @property
    def counts(self) -> Counts:
        return self.history.counts(self.length)


NO_TOKENS = Prefix.of(())
