"""How a step's wanted rows choose their tokens, as numbers for the kernels: draws, rules of logits, masks.

The rules are those of replicas.model.logit_rules, in the form that replicas.kernels.rules takes.
"""

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass

import numpy as np

from replicas.engine.batch import Segment
from replicas.kernels.rules import ROW_FIELDS, RULE_FIELDS
from replicas.model.logit_rules import Row, may_have_rules
from replicas.model.penalties import Penalty
from replicas.model.runner import rows_of
from replicas.model.sampler import Parameters, uniforms

NUM_DRAWS = 5
"""The numbers of a row in replicas.kernels.sample_rows.Draws."""
_NO_IDS, _NO_AMOUNTS = np.empty(0, np.int64), np.empty(0, np.float32)
_NO_WORDS = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class Choices:
    """The choices of W rows, S of them with rules."""

    draws: np.ndarray
    """[5, W] int32, the bits of each array of Draws, in its order"""
    slots: np.ndarray
    """[W] int32, the number of each row among those with rules; -1 where it has none"""
    ruled: np.ndarray
    """[S, 6] int32, as replicas.kernels.rules has them, places counted from where `words` begins"""
    words: np.ndarray
    """[N] int32"""

    @classmethod
    def greedy(cls, num_rows: int) -> "Choices":
        """The most probable tokens of so many rows."""
        no_rules = np.empty((0, ROW_FIELDS.value), np.int32)
        slots = np.full(num_rows, -1, np.int32)
        return cls(np.zeros((NUM_DRAWS, num_rows), np.int32), slots, no_rules, _NO_WORDS)

    def ruled_behind(self, length: int) -> np.ndarray:
        """`ruled` with places counted from so many words before `words`."""
        shift = length * np.array([0, 1, 0, 1, 0, 1], np.int32)
        return np.where(self.ruled < 0, self.ruled, self.ruled + shift)

    @classmethod
    def of(cls, segments: Sequence[Segment], vocab_size: int, eos_token_ids: Set[int]) -> "Choices":
        """Those of the segments' wanted rows, in order. Token ids outside the vocabulary have no rules."""
        words = _Words()
        slots: list[int] = []
        ruled: list[list[int]] = []
        for segment in segments:
            if not may_have_rules(segment):
                slots.extend([-1] * len(segment.wanted))
                continue
            rows = rows_of(segment)
            for fields in _rules_of(rows, len(slots), words, vocab_size, eos_token_ids):
                slots.append(-1 if fields is None else len(ruled))
                if fields is not None:
                    ruled.append(fields)
        return cls(
            draws=_draws_of(segments),
            slots=np.array(slots, np.int32),
            ruled=np.array(ruled, np.int32).reshape(-1, ROW_FIELDS.value),
            words=words.joined(),
        )


def _draws_of(segments: Sequence[Segment]) -> np.ndarray:
    counts = [len(segment.wanted) for segment in segments]
    draws = np.zeros((NUM_DRAWS, sum(counts)), np.int32)
    if not any(segment.sampling.temperature > 0 for segment in segments):
        return draws
    parameters = [Parameters.of(segment.sampling) for segment in segments]
    seeds = np.repeat([segment.sampling.seed & 0xFFFFFFFFFFFFFFFF for segment in segments], counts)
    positions = [position for segment in segments for position in segment.sampled_positions]
    numbers = np.array([(each.temperature, 0.0, 0.0, each.top_p, each.min_p) for each in parameters])
    draws[:] = np.repeat(numbers.astype(np.float32), counts, axis=0).T.copy().view(np.int32)
    draws[1] = uniforms(seeds.tolist(), positions).astype(np.float32).view(np.int32)
    draws[2] = np.repeat([each.top_k for each in parameters], counts)
    return draws


class _Words:
    """Numbers laid one after the other."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = [_NO_WORDS]
        self._length = 0

    def add(self, numbers: np.ndarray) -> int:
        """Adds numbers [n] int32; returns where they begin."""
        at = self._length
        self._parts.append(numbers)
        self._length += len(numbers)
        return at

    def joined(self) -> np.ndarray:
        return np.concatenate(self._parts)


@dataclass(frozen=True, slots=True)
class _Biases:
    """What is added to the logits of some tokens."""

    ids: np.ndarray
    """[k] int64, ascending"""
    amounts: np.ndarray
    """[k] float32"""

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, float]], vocab_size: int) -> "_Biases":
        """Of pairs of a token and an amount; the amounts of a token that is there several times are
        added."""
        table = np.array(sorted((token, at) for token, at in pairs if 0 <= token < vocab_size), np.float64)
        if not len(table):
            return cls(_NO_IDS, _NO_AMOUNTS)
        ids, starts = np.unique(table[:, 0].astype(np.int64), return_index=True)
        with np.errstate(all="ignore"):  # a row that a bias makes infinite has no token, and says so
            return cls(ids, np.add.reduceat(table[:, 1].astype(np.float32), starts))

    def of_ids(self, ids: np.ndarray) -> np.ndarray:
        """What is added for each of the ids [n] -> [n] float32."""
        if not len(self.ids):
            return np.zeros(len(ids), np.float32)
        at = np.minimum(self.ids.searchsorted(ids), len(self.ids) - 1)
        return np.where(self.ids[at] == ids, self.amounts[at], np.float32(0.0))


def _rules_of(
    rows: Sequence[Row], first_row: int, words: _Words, vocab_size: int, eos_token_ids: Set[int]
) -> Iterator[list[int] | None]:
    """The fields of each of a segment's rows; None for a row without rules."""
    sampling = rows[0].sampling if rows else None
    if sampling is None:
        return
    penalty = None
    if sampling.has_penalties:
        own = [row.then for row in rows]
        penalty = Penalty.of(sampling, 0, rows[0].seen, own, rows[0].prompt_len, vocab_size)
    usual = _Biases.of(sampling.logit_bias, vocab_size)
    endless = usual
    if sampling.min_tokens:
        ends = [(token, -np.inf) for token in eos_token_ids]
        endless = _Biases.of([*sampling.logit_bias, *ends], vocab_size)
    num_words = -(-vocab_size // 32)
    shared: list[int] | None = None
    for index, row in enumerate(rows):
        if not row.has_rules:
            yield None
            continue
        if shared is None:
            ids, times = (_NO_IDS, _NO_IDS) if penalty is None else (penalty.shared.ids, penalty.shared.times)
            shared = _add(words, ids, times, usual.ids, penalty, usual)
        biases = endless if row.forbids_end else usual
        ids, times = _NO_IDS, _NO_IDS
        if penalty is not None:
            part = slice(int(penalty.own_starts[index]), int(penalty.own_starts[index + 1]))
            ids, times = penalty.own_ids[part], penalty.own_times[part]
        own_rules = _add_own(words, row, ids, times, penalty, biases, eos_token_ids, vocab_size)
        allowed = -1
        if row.allowed is not None:
            mask = row.allowed[: 4 * num_words].ljust(4 * num_words, b"\0")
            allowed = words.add(np.frombuffer(mask, "<i4"))
        yield [first_row + index, *shared, *own_rules, allowed]


def _add_own(
    words: _Words,
    row: Row,
    ids: np.ndarray,
    times: np.ndarray,
    penalty: Penalty | None,
    biases: _Biases,
    eos_token_ids: Set[int],
    vocab_size: int,
) -> list[int]:
    """Adds the rules that a row has instead of the shared ones: of tokens that it alone has before it, and
    of the ends that may not come yet, as often as the shared tokens have them."""
    if row.forbids_end:
        ends = np.array(sorted(token for token in eos_token_ids if 0 <= token < vocab_size), np.int64)
        is_new = ~np.isin(ends, ids)
        ends = ends[is_new]
        if penalty is not None:
            is_seen = np.isin(ends, penalty.shared.ids)
            ids = np.concatenate((ids, ends[is_seen]))
            times = np.concatenate((times, penalty.shared.times_of(ends[is_seen])))
            ends = ends[~is_seen]
        return _add(words, ids, times, ends, penalty, biases)
    return _add(words, ids, times, _NO_IDS, penalty, biases)


def _add(
    words: _Words,
    ids: np.ndarray,
    times: np.ndarray,
    others: np.ndarray,
    penalty: Penalty | None,
    biases: _Biases,
) -> list[int]:
    """Adds the rules of tokens that the penalty is of, and of others -> where they begin, and how many.

    ids, times: as in Penalty
    """
    others = others[~np.isin(others, ids)]
    rules = np.zeros((len(ids) + len(others), RULE_FIELDS.value), np.int32)
    rules[:, 0] = tokens = np.concatenate((ids, others))
    scales, taken_off = np.ones(len(tokens), np.float32), np.zeros(len(tokens), np.float32)
    if penalty is not None:
        scales[: len(ids)] = penalty.scale
        taken_off[: len(ids)] = penalty.taken_off[times]
    for field, amounts in enumerate((scales, taken_off, biases.of_ids(tokens)), start=1):
        rules[:, field] = amounts.view(np.int32)
    return [words.add(rules.ravel()), len(rules)]
