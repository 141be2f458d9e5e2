"""Sampled tokens of rows, on the device, within top_k, top_p and min_p, and without a sort.

Each row's own token is drawn as AR would draw it: greedily, or by inverting the cumulative distribution,

    w_v = exp((x_v - max x) / T), 0 where it is below min_p or v is not kept
    token = min { v : sum_{u <= v} w_u  >  r sum_u w_u }

with the random number r of the row's position. Kept are the first top_k in the order of falling logits, of
equal ones the lower ids first, and of these the first whose weights come to top_p of all of theirs, the one
that crosses it among them. So what is kept is all logits above one of them, and of those equal to it the
first few: a threshold, found by halving the range of values. Each pass over the row moves a bound to a value
that is there, so a search ends after some 20 of them, and always. A threshold found by pivots instead of a
sort is FlashInfer's idea (https://flashinfer.ai/2025/03/10/sampling.html); it draws by rejection, with more
random numbers, where this is the same token from the same one number as on the CPU
(replicas.model.sampler).

A row's token does not depend on the other rows, nor on how many there are.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from replicas.kernels.confidence import Confidence
from replicas.kernels.launch import dependent_launch, wait_for_earlier

_BLOCK = 8192
_LOG2_E = tl.constexpr(1.4426950408889634)


class Draws(NamedTuple):
    """How each of R rows is drawn."""

    temperatures: torch.Tensor
    """[R] float32; 0 for the most probable token"""
    uniforms: torch.Tensor
    """[R] float32 in [0, 1]"""
    top_ks: torch.Tensor
    """[R] int32; 0 for no limit"""
    top_ps: torch.Tensor
    """[R] float32 in [0, 1]"""
    min_ps: torch.Tensor
    """[R] float32 in [0, 1]"""

    @classmethod
    def at(cls, temperatures: torch.Tensor, uniforms: torch.Tensor) -> "Draws":
        """Draws from the whole vocabulary."""
        top_ks = torch.zeros_like(temperatures, dtype=torch.int32)
        return cls(
            temperatures, uniforms, top_ks, torch.ones_like(temperatures), torch.zeros_like(temperatures)
        )


class Ruled(NamedTuple):
    """The logits of rows that rules have changed (replicas.kernels.rules)."""

    slots: torch.Tensor
    """[R] int32, each row's line of `lines`; -1 for rows without rules"""
    lines: torch.Tensor
    """[S, vocab] float32"""


class Drawn(NamedTuple):
    """The tokens of R rows."""

    tokens: torch.Tensor
    """[R] int64"""
    report: torch.Tensor
    """[3, R] float64: the tokens again, which float64 holds exactly, their probabilities by the softmax of
    the raw logits, and the raw logits' log-sum-exps; so all leave the device in one copy. The probability is
    NaN where a row has no token, since its logits, or what rules made of them, are not finite."""

    @classmethod
    def empty(cls, num_rows: int, device: torch.device) -> "Drawn":
        return cls(
            torch.empty(num_rows, dtype=torch.int64, device=device),
            torch.empty(3, num_rows, dtype=torch.float64, device=device),
        )


def sample_rows(
    logits: torch.Tensor,
    best: Confidence,
    draws: Draws,
    mask_token_id: int | None,
    ruled: Ruled | None = None,
    out: Drawn | None = None,
) -> Drawn:
    """A token for each row of logits [R, vocab], into `out` if given.

    best: confidence(logits), whose tokens are those of greedy rows without rules
    """
    num_rows, vocab = logits.shape
    assert logits.stride(1) == 1
    drawn = Drawn.empty(num_rows, logits.device) if out is None else out
    assert drawn.report.is_contiguous()
    if not num_rows:
        return drawn
    slots, lines = (None, None) if ruled is None else ruled
    _draw[(num_rows,)](
        logits, lines, slots, *best, *draws, *drawn, logits.stride(0),
        -1 if mask_token_id is None else mask_token_id,
        VOCAB=vocab, BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)), num_warps=16, enable_fp_fusion=True,
        **dependent_launch(logits.device),
    )  # fmt: skip
    return drawn


@triton.jit
def _load(
    logits, lines, row, slot, start, stride, mask_token_id, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A block of the row's logits in float32, -inf for the mask token and past the end."""
    token = start + tl.arange(0, BLOCK)
    is_token = token < VOCAB
    if lines is not None:
        if slot >= 0:
            x = tl.load(lines + slot * VOCAB + token, mask=is_token, other=float("-inf"))
        else:
            x = tl.load(logits + row * stride + token, mask=is_token, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(logits + row * stride + token, mask=is_token, other=float("-inf")).to(tl.float32)
    return tl.where(token == mask_token_id, float("-inf"), x)


@triton.jit
def _weigh(x, largest, sharpness, min_p):
    weight = tl.exp2((x - largest) * sharpness)
    return tl.where(weight < min_p, 0.0, weight)


@triton.jit
def _threshold(
    logits, lines, row, slot, stride, mask_token_id, largest, sharpness, min_p, lowest, wanted,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, BY_COUNT: tl.constexpr,
):  # fmt: skip
    """The largest logit, at least `lowest`, such that those not below it are `wanted`: in number, or by
    weight. `lowest` and `largest` are logits of the row; those from `lowest` on are as many as wanted."""
    low, high = lowest, largest
    while low < high:
        pivot = tl.minimum(0.5 * low + 0.5 * high, high)
        pivot = tl.where(pivot > low, pivot, high)
        found = tl.zeros((), tl.int32 if BY_COUNT else tl.float64)
        least, most = float("inf"), float("-inf")
        for start in range(0, VOCAB, BLOCK):
            x = _load(logits, lines, row, slot, start, stride, mask_token_id, VOCAB, BLOCK)
            is_above = x >= pivot
            if BY_COUNT:
                found += tl.sum(is_above.to(tl.int32), 0)
            else:
                weight = tl.where(is_above, _weigh(x, largest, sharpness, min_p), 0.0)
                found += tl.sum(weight, 0).to(tl.float64)
            least = tl.minimum(least, tl.min(tl.where(is_above, x, float("inf")), 0))
            most = tl.maximum(most, tl.max(tl.where(is_above, float("-inf"), x), 0))
        if found >= wanted:
            low = least
            if found == wanted:
                high = least
        else:
            high = most
    return low


@triton.jit
def _above(
    logits, lines, row, slot, stride, mask_token_id, largest, sharpness, min_p, threshold,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the logits above the threshold the number and the weight, and the number of those equal to it."""
    number, equals, total = 0, 0, tl.cast(0.0, tl.float64)
    for start in range(0, VOCAB, BLOCK):
        x = _load(logits, lines, row, slot, start, stride, mask_token_id, VOCAB, BLOCK)
        is_above = x > threshold
        number += tl.sum(is_above.to(tl.int32), 0)
        equals += tl.sum((x == threshold).to(tl.int32), 0)
        weight = tl.where(is_above, _weigh(x, largest, sharpness, min_p), 0.0)
        total += tl.sum(weight, 0).to(tl.float64)
    return number, total, equals


@triton.jit
def _draw(
    logits,
    lines,
    slots,
    best,
    probs,
    log_sums,
    temperatures,
    uniforms,
    top_ks,
    top_ps,
    min_ps,
    tokens,
    report,
    stride,
    mask_token_id,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Draws one row's token.

    Rounding may leave the target unpassed; the last block, or token, of positive weight is then taken.
    """
    wait_for_earlier(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    chosen = tl.load(best + row)
    prob = tl.load(probs + row).to(tl.float64)
    log_sum = tl.load(log_sums + row)
    slot = tl.full((), -1, tl.int64)
    if slots is not None:
        slot = tl.load(slots + row).to(tl.int64)
    if (temperature > 0) | (slot >= 0):
        offset = tl.arange(0, BLOCK)
        largest, first, num_nans = float("-inf"), 0, 0
        for start in range(0, VOCAB, BLOCK):
            x = _load(logits, lines, row, slot, start, stride, mask_token_id, VOCAB, BLOCK)
            block_largest = tl.max(x, 0)
            first = tl.where(block_largest > largest, start, first)
            largest = tl.maximum(largest, block_largest)
            num_nans += tl.sum((x != x).to(tl.int32), 0)
        is_finite = (largest > float("-inf")) & (largest < float("inf")) & (num_nans == 0)
        at = offset
        if (temperature > 0) & is_finite:
            sharpness = _LOG2_E / temperature
            min_p = tl.load(min_ps + row)
            top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
            lowest, number, total = largest, 0, tl.cast(0.0, tl.float64)
            for start in range(0, VOCAB, BLOCK):
                x = _load(logits, lines, row, slot, start, stride, mask_token_id, VOCAB, BLOCK)
                weight = _weigh(x, largest, sharpness, min_p)
                lowest = tl.minimum(lowest, tl.min(tl.where(weight > 0, x, float("inf")), 0))
                number += tl.sum((weight > 0).to(tl.int32), 0)
                total += tl.sum(weight, 0).to(tl.float64)
            threshold, num_equal = lowest, tl.full((), 0x7FFFFFFF, tl.int32)
            if (top_k > 0) & (top_k < number):
                threshold = _threshold(
                    logits, lines, row, slot, stride, mask_token_id, largest, sharpness, min_p,
                    threshold, top_k, VOCAB, BLOCK, True,
                )  # fmt: skip
                number, total, equals = _above(
                    logits, lines, row, slot, stride, mask_token_id, largest, sharpness, min_p, threshold,
                    VOCAB, BLOCK,
                )  # fmt: skip
                num_equal = tl.minimum(top_k - number, equals)
                total += num_equal * _weigh(threshold, largest, sharpness, min_p).to(tl.float64)
            if top_p < 1:
                wanted = tl.maximum(top_p.to(tl.float64) * total, 1e-30)
                lowest = threshold
                threshold = _threshold(
                    logits, lines, row, slot, stride, mask_token_id, largest, sharpness, min_p,
                    threshold, wanted, VOCAB, BLOCK, False,
                )  # fmt: skip
                number, total, equals = _above(
                    logits, lines, row, slot, stride, mask_token_id, largest, sharpness, min_p, threshold,
                    VOCAB, BLOCK,
                )  # fmt: skip
                if threshold > lowest:
                    num_equal = equals
                each = _weigh(threshold, largest, sharpness, min_p).to(tl.float64)
                enough = tl.ceil(tl.minimum((wanted - total) / each, 1e9)).to(tl.int32)
                num_equal = tl.minimum(tl.minimum(num_equal, equals), tl.maximum(enough, 1))
                total += num_equal * each
            target = tl.load(uniforms + row).to(tl.float64) * total
            each = _weigh(threshold, largest, sharpness, min_p)
            sums = tl.cast(0.0, tl.float64)
            equals = tl.full((), 0, tl.int32)
            before, first, equals_before = sums, 0, equals
            is_passed = 0
            for start in range(0, VOCAB, BLOCK):
                x = _load(logits, lines, row, slot, start, stride, mask_token_id, VOCAB, BLOCK)
                weight = _weigh(x, largest, sharpness, min_p)
                here = tl.sum((x == threshold).to(tl.int32), 0)
                kept = tl.minimum(tl.maximum(num_equal - equals, 0), here)
                part = tl.sum(tl.where(x > threshold, weight, 0.0), 0) + kept * each
                if (part > 0) & (is_passed == 0):
                    before, first, equals_before = sums, start, equals
                sums += part.to(tl.float64)
                equals += here
                is_passed = tl.where(sums > target, 1, is_passed)
            x = _load(logits, lines, row, slot, first, stride, mask_token_id, VOCAB, BLOCK)
            is_equal = x == threshold
            place = equals_before + tl.cumsum(is_equal.to(tl.int32), 0)
            is_kept = (x > threshold) | (is_equal & (place <= num_equal))
            weight = tl.where(is_kept, _weigh(x, largest, sharpness, min_p), 0.0)
            is_last = tl.max(tl.where(weight > 0, offset, 0), 0)
            passed = (tl.cumsum(weight, 0) > (target - before).to(tl.float32)) & (weight > 0)
            at = tl.where(passed, offset, is_last)
        else:
            x = _load(logits, lines, row, slot, first, stride, mask_token_id, VOCAB, BLOCK)
            at = tl.where(x == largest, offset, BLOCK)
        token = tl.minimum(first + tl.min(at, 0), VOCAB - 1)
        chosen = token.to(tl.int64)
        prob = tl.exp(tl.load(logits + row * stride + chosen).to(tl.float32) - log_sum).to(tl.float64)
        prob = tl.where(is_finite, prob, float("nan"))
    num_rows = tl.num_programs(0)
    tl.store(tokens + row, chosen)
    tl.store(report + row, chosen.to(tl.float64))
    tl.store(report + num_rows + row, prob)
    tl.store(report + 2 * num_rows + row, log_sum.to(tl.float64))


def sample_rows_reference(logits: torch.Tensor, draws: Draws, mask_token_id: int | None) -> torch.Tensor:
    """The rows' tokens [R] int64 by the definition, in float64, with a sort."""
    wide = logits.double().clone()
    if mask_token_id is not None:
        wide[:, mask_token_id] = -torch.inf
    tokens = wide.argmax(-1)
    for row in draws.temperatures.nonzero().flatten().tolist():
        temperature, uniform, top_k, top_p, min_p = (part[row] for part in draws)
        weights = ((wide[row] - wide[row].max()) / temperature.double()).exp()
        weights[weights < min_p] = 0.0
        order = wide[row].argsort(descending=True, stable=True)
        ordered = weights[order]
        if top_k > 0:
            ordered[top_k:] = 0.0
        if top_p < 1:
            is_past = ordered.cumsum(0) - ordered >= top_p.double() * ordered.sum()
            is_past[0] = False
            ordered[is_past] = 0.0
        cumulative = torch.zeros_like(weights).scatter_(0, order, ordered).cumsum(0)
        tokens[row] = (cumulative > uniform.double() * cumulative[-1]).int().argmax()
    return tokens
