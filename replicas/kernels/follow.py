"""Completes, on the device, segments that were packed before the step before them was over.

The host packs each as long as it may come to be. What the step before has sampled says what it is; the rule
is that of `replicas.engine.ahead.settled`. A segment that comes to be shorter has rows of padding behind it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from replicas.kernels.attention import SEGMENT_FIELDS
from replicas.kernels.sample_rows import Drawn

_FIELDS = tl.constexpr(14)
_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Open:
    """A segment as it is packed, and what it follows."""

    source: int
    """The row, among those sampled in the step before, of the first token checked there."""
    num_checked: int
    """Tokens checked; as many less one were drafted, and are in `drafted`."""
    num_drafted: int
    """Tokens drafted behind them, in the rows after the checked ones."""
    drafted: tuple[int, ...]
    segment: int
    """Its index in the step's segments."""
    first_row: int
    first_wanted: int
    start: int
    """Its first position where no more than one checked token is taken."""
    num_causal: int
    num_masks: int
    first_page: int
    """Where its pages begin in the page table."""
    uniforms: np.ndarray | None
    """[num_checked + wanted rows - 1] float32, the random numbers of the positions from start + 1 on; None
    where its rows are greedy."""


def pack(opens: Sequence[Open], num_sampled: int) -> np.ndarray:
    """The segments as the kernel reads them, [N] int32: their fields, then their tokens and numbers.

    num_sampled: rows that the step before has sampled, those of padding among them
    """
    fields = np.zeros((len(opens), _FIELDS.value), np.int32)
    rest: list[np.ndarray] = []
    at = fields.size
    for row, item in zip(fields, opens, strict=True):
        row[:11] = (
            item.source, item.num_checked, item.num_drafted, item.segment, item.first_row, item.first_wanted,
            item.start, item.num_causal, item.num_masks, item.first_page, at,
        )  # fmt: skip
        row[13] = num_sampled
        rest.append(np.array(item.drafted, np.int32))
        at += len(item.drafted)
        if item.uniforms is not None:
            row[11], row[12] = 1, at
            rest.append(item.uniforms.view(np.int32))
            at += len(item.uniforms)
    return np.concatenate([fields.ravel(), *rest])


def follow(
    opens: torch.Tensor,
    num_opens: int,
    sampled: Drawn,
    parts: Mapping[str, torch.Tensor],
    page_size: int,
    mask_token_id: int | None,
    prob_one: int,
) -> None:
    """Completes num_opens segments of a step in place.

    opens: as `pack` gives them, on the device
    sampled: of the step before
    prob_one: a probability of 1, where probabilities are reckoned with in whole numbers
    parts: the step's sections by name (replicas.model.cuda.inputs), int32
    """
    has_adapter = len(parts["adapter"]) > 0
    _follow[(num_opens,)](
        opens,
        *sampled,
        parts["token_ids"],
        parts["positions"],
        parts["slots"],
        parts["wanted"],
        parts["adapter"] if has_adapter else None,
        parts["wanted_adapter"] if has_adapter else None,
        parts["uniforms"],
        parts["segments"],
        parts["page_table"],
        PAGE_SIZE=page_size,
        MASK=-1 if mask_token_id is None else mask_token_id,
        ONE=prob_one,
        BLOCK=_BLOCK,
        num_warps=2,
        enable_fp_fusion=True,
    )


@triton.jit
def _follow(
    opens,
    tokens,
    report,
    token_ids,
    positions,
    slots,
    wanted,
    adapter,
    wanted_adapter,
    uniforms,
    segments,
    page_table,
    PAGE_SIZE: tl.constexpr,
    MASK: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    field = opens + tl.program_id(0) * _FIELDS
    source = tl.load(field)
    num_checked = tl.load(field + 1)
    num_drafted = tl.load(field + 2)
    segment = tl.load(field + 3)
    first_row = tl.load(field + 4)
    first_wanted = tl.load(field + 5)
    most_causal = tl.load(field + 7)
    num_masks = tl.load(field + 8)
    table = page_table + tl.load(field + 9)
    drafted = opens + tl.load(field + 10)
    is_drawn = tl.load(field + 11)
    numbers = opens + tl.load(field + 12)
    probs = report + tl.load(field + 13) + source + num_checked  # the second of the report's rows
    offset = tl.arange(0, BLOCK)

    num_accepted = num_checked - 1
    for first in range(0, num_checked - 1, BLOCK):
        index = first + offset
        is_token = index < num_checked - 1
        own = tl.load(tokens + source + index, mask=is_token, other=0)
        then = tl.load(drafted + index, mask=is_token, other=0)
        differs = is_token & (own != then)
        num_accepted = tl.minimum(num_accepted, tl.min(tl.where(differs, index, num_accepted), 0))

    most = tl.minimum(num_drafted, most_causal - 1)
    most = tl.where(num_accepted == num_checked - 1, most, 0)
    zero = tl.zeros((), tl.int64)
    survival, full = zero + ONE, zero
    for drafted_index in range(0, most):
        prob = (tl.load(probs + drafted_index) * ONE).to(tl.int64)
        survival = survival * prob // ONE
        full += survival
    count = most * 0
    survival, expected, best_value = zero + ONE, zero, zero
    for drafted_index in range(0, most):
        prob = (tl.load(probs + drafted_index) * ONE).to(tl.int64)
        survival = survival * prob // ONE
        expected += survival
        value = expected * ONE - (ONE - survival) * full
        is_best = value >= best_value
        best_value = tl.where(is_best, value, best_value)
        count = tl.where(is_best, drafted_index + 1, count)

    num_causal = count + 1
    length = num_causal + num_masks
    start = tl.load(field + 6) + num_accepted
    tl.store(segments + SEGMENT_FIELDS * segment + 1, start)
    tl.store(segments + SEGMENT_FIELDS * segment + 2, length)
    tl.store(segments + SEGMENT_FIELDS * segment + 3, num_causal)
    for first in range(0, most_causal + num_masks, BLOCK):
        index = first + offset
        is_row = index < most_causal + num_masks
        is_token = index < length
        is_causal = index < num_causal
        # Behind the checked tokens are those drafted, and these follow the last of them.
        token = tl.load(tokens + source + num_accepted + index, mask=is_row & is_causal, other=MASK)
        position = start + index
        page = tl.load(table + position // PAGE_SIZE, mask=is_row & is_token, other=0)
        slot = tl.where(is_token, page * PAGE_SIZE + position % PAGE_SIZE, -1)
        tl.store(token_ids + first_row + index, tl.where(is_token, token, 0).to(tl.int32), mask=is_row)
        tl.store(positions + first_row + index, tl.where(is_token, position, 0), mask=is_row)
        tl.store(slots + first_row + index, slot, mask=is_row)
        # Of the masks the first, the next seed's, is not wanted.
        is_wanted = index < most_causal + tl.maximum(num_masks - 1, 0)
        row = index + (index >= num_causal).to(tl.int32)
        row = tl.where(row < length, row, 0)
        tl.store(wanted + first_wanted + index, first_row + row, mask=is_wanted)
        if adapter is not None:
            is_adapted = (index >= num_causal) & is_token
            tl.store(adapter + first_row + index, tl.where(is_adapted, first_row + index, -1), mask=is_row)
            is_adapted = row >= num_causal
            at = tl.where(is_adapted, first_wanted + index, -1)
            tl.store(wanted_adapter + first_wanted + index, at, mask=is_wanted)
        is_number = is_wanted & (is_drawn > 0)
        number = tl.load(numbers + num_accepted + index, mask=is_number, other=0)
        tl.store(uniforms + first_wanted + index, number, mask=is_number)
