"""Changes that requests make in their rows' logits before the choice: penalties, biases, min_tokens, masks.

The changes of all rows are a few operations on flat indices, whatever the number of rows, and are made in
place: what they overwrite is kept, which is far less than a copy of the rows.
"""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from replicas.engine.batch import Segment
from replicas.engine.history import NO_TOKENS, Prefix
from replicas.messages import SamplingParams
from replicas.model.penalties import Overwritten, Penalise, Penalty, as_line, penalise

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
    seen: Prefix = NO_TOKENS
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


def may_have_rules(segment: Segment) -> bool:
    """True if rows of the segment may have rules."""
    sampling = segment.sampling
    return bool(
        segment.allowed or sampling.has_penalties or sampling.logit_bias or sampling.min_tokens
    )  # fmt: skip


def takes_most_probable(segment: Segment) -> bool:
    """True if all that is asked of the segment's rows is the most probable token and its probability."""
    sampling = segment.sampling
    return not (sampling.temperature > 0 or sampling.logprobs is not None or may_have_rules(segment))


def apply_rules(
    logits: torch.Tensor,
    rows: Sequence[Row],
    ruled: Sequence[int],
    eos_token_ids: Set[int],
    penalise: Penalise = penalise,
) -> list[Overwritten]:
    """Applies penalties, bias, min_tokens and masks, in this order, to logits [W, vocab] float32, in place.

    ruled: the rows that have any, ascending. Ids outside the vocabulary have no effect. Gives back what is to
    be restored, in this order, for a token's logits to be the model's again, but those that min_tokens or a
    mask made -inf.
    """
    vocab_size = logits.shape[1]
    whole = as_line(logits)
    biases = _Biases(logits.stride(0), vocab_size)
    groups = list(_groups(rows, ruled))
    for first, group in groups:
        if group[0].sampling.logit_bias:
            biases.add(range(first, first + len(group)), group[0].sampling.logit_bias)
    ends = [index for index in ruled if rows[index].forbids_end]
    if ends:
        biases.add(ends, [(token, _IMPOSSIBLE) for token in eos_token_ids])
    biased, added = biases.on(logits.device)
    overwritten = [Overwritten(whole, biased, whole.index_select(1, biased), None)] if len(biased) else []
    penalties = [
        _penalty(first, group, vocab_size) for first, group in groups if group[0].sampling.has_penalties
    ]
    if penalties:
        overwritten += penalise(logits, penalties)
    if len(biased):
        whole.index_add_(1, biased, added)
    _apply_masks(logits, [(index, mask) for index in ruled if (mask := rows[index].allowed) is not None])
    return overwritten


def _penalty(first: int, group: Sequence[Row], vocab_size: int) -> Penalty:
    """The penalties of neighbours that follow each other."""
    row, own = group[0], [row.then for row in group]
    return Penalty.of(row.sampling, first, row.seen, own, row.prompt_len, vocab_size)


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
        with np.errstate(over="ignore"):  # a row that a bias makes infinite has no token, and says so
            self._amounts.append(np.tile(pairs[:, 1], len(starts)).astype(np.float32))

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The places [n] int64, and what is added there, [1, n]."""
        places, amounts = np.concatenate(self._places), np.concatenate(self._amounts)
        return torch.from_numpy(places).to(device), torch.from_numpy(amounts)[None].to(device)


def _apply_masks(logits: torch.Tensor, masks: Sequence[tuple[int, bytes]]) -> None:
    """Makes all that a row's mask does not allow impossible, for each (row, mask)."""
    vocab_size = logits.shape[1]
    num_bytes = -(-vocab_size // 8)
    by_octet = _BOUNDS_BY_OCTET.to(logits.device)
    for run in runs_of([index for index, _ in masks], max(1, _MASKED_AT_ONCE // vocab_size)):
        part, masks = masks[: run.stop - run.start], masks[run.stop - run.start :]
        packed = b"".join(mask[:num_bytes].ljust(num_bytes, b"\0") for _, mask in part)
        octets = torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(logits.device).int()
        bounds = by_octet.index_select(0, octets).view(len(part), -1)[:, :vocab_size]
        torch.minimum(logits[run], bounds, out=logits[run])


def _bounds_by_octet() -> torch.Tensor:
    """[256, 8] float32: for each bit of an octet, the least first, inf where it is set and -inf where not."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(np.where(bits == 1, np.inf, -np.inf).astype(np.float32))


_BOUNDS_BY_OCTET = _bounds_by_octet()
"""The upper bounds that masks set on logits, by octet; the choice by each bit costs ten times as much."""
_MASKED_AT_ONCE = 1 << 15
"""The number of logits masked at once: their bounds stay in the processor's cache, and torch takes one
thread, where a second one would wait for a core that the forward's threads or others have."""
