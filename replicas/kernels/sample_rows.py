"""Sampled tokens of rows, on the device.

Each row's own token is drawn as AR would draw it: greedily, or by inverting the cumulative distribution,

    token = min { v : sum_{w <= v} exp((x_w - max x) / T)  >  u sum_w exp((x_w - max x) / T) }

with the random number u of the row's position. A row's token does not depend on the other rows, nor on how
many there are.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from replicas.kernels.confidence import Confidence

_BLOCK = 4096
_LOG2_E = tl.constexpr(1.4426950408889634)


class Drawn(NamedTuple):
    """The tokens of R rows."""

    tokens: torch.Tensor
    """[R] int64"""
    pairs: torch.Tensor
    """[2, R] float64, the tokens again, and their probabilities by the softmax of the raw logits: float64
    holds any token id exactly, so both leave the device in one copy."""

    @classmethod
    def empty(cls, num_rows: int, device: torch.device) -> "Drawn":
        return cls(
            torch.empty(num_rows, dtype=torch.int64, device=device),
            torch.empty(2, num_rows, dtype=torch.float64, device=device),
        )


def sample_rows(
    logits: torch.Tensor,
    best: Confidence,
    temperatures: torch.Tensor,
    uniforms: torch.Tensor,
    mask_token_id: int | None,
    out: Drawn | None = None,
) -> Drawn:
    """A token for each row, into `out` if given; best.tokens where the temperature is 0.

    best: confidence(logits); temperatures, uniforms: [R] float32, uniforms in [0, 1]
    """
    num_rows, vocab = logits.shape
    assert logits.stride(1) == 1
    drawn = Drawn.empty(num_rows, logits.device) if out is None else out
    assert drawn.pairs.is_contiguous()
    if not num_rows:
        return drawn
    block = min(_BLOCK, triton.next_power_of_2(vocab))
    num_blocks = triton.cdiv(vocab, block)
    block_sums = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=logits.device)
    mask = -1 if mask_token_id is None else mask_token_id
    _sum_blocks[(num_rows, num_blocks)](
        logits, best.probs, best.log_sums, temperatures, block_sums, logits.stride(0), mask,
        VOCAB=vocab, BLOCK=block, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    _invert[(num_rows,)](
        logits, *best, temperatures, uniforms, block_sums, *drawn, logits.stride(0), mask,
        num_blocks, VOCAB=vocab, BLOCK=block, MAX_BLOCKS=triton.next_power_of_2(num_blocks),
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return drawn


@triton.jit
def _weights(
    logits,
    probs,
    log_sums,
    row,
    start,
    stride,
    temperature,
    mask_token_id,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weights exp((x - max x) / T) of one block of one row."""
    token = start + tl.arange(0, BLOCK)
    largest = tl.load(log_sums + row) + tl.log(tl.load(probs + row))
    is_token = (token < VOCAB) & (token != mask_token_id)
    x = tl.load(logits + row * stride + token, mask=is_token, other=float("-inf")).to(tl.float32)
    return tl.exp2((x - largest) * (_LOG2_E / temperature))


@triton.jit
def _sum_blocks(
    logits,
    probs,
    log_sums,
    temperatures,
    block_sums,
    stride,
    mask_token_id,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        weights = _weights(
            logits, probs, log_sums, row, block * BLOCK, stride, temperature, mask_token_id, VOCAB, BLOCK
        )
        tl.store(block_sums + row * tl.num_programs(1) + block, tl.sum(weights, 0))


@triton.jit
def _invert(
    logits,
    best,
    probs,
    log_sums,
    temperatures,
    uniforms,
    block_sums,
    tokens,
    pairs,
    stride,
    mask_token_id,
    num_blocks,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
):
    """Finds the block in which the cumulative sum passes the target, then the token in it; at temperature 0
    the token is the best.

    Rounding may leave the target unpassed; the last block, or token, of positive weight is then taken.
    """
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    chosen = tl.load(best + row)
    prob = tl.load(probs + row)
    if temperature > 0:
        number = tl.arange(0, MAX_BLOCKS)
        sums = tl.load(block_sums + row * num_blocks + number, mask=number < num_blocks, other=0.0)
        until = tl.cumsum(sums, 0)
        target = tl.load(uniforms + row) * tl.sum(sums, 0)
        passing = tl.min(tl.where(until > target, number, MAX_BLOCKS), 0)
        block = tl.minimum(passing, tl.max(tl.where(sums > 0, number, 0), 0))
        before = tl.sum(tl.where(number < block, sums, 0.0), 0)
        start = block * BLOCK
        weights = _weights(
            logits, probs, log_sums, row, start, stride, temperature, mask_token_id, VOCAB, BLOCK
        )
        offset = tl.arange(0, BLOCK)
        passed = (tl.cumsum(weights, 0) > target - before) & (weights > 0)
        first = tl.min(tl.where(passed, offset, BLOCK), 0)
        token = start + tl.minimum(first, tl.max(tl.where(weights > 0, offset, 0), 0))
        chosen = token.to(tl.int64)
        prob = tl.exp(tl.load(logits + row * stride + chosen).to(tl.float32) - tl.load(log_sums + row))
    tl.store(tokens + row, chosen)
    tl.store(pairs + row, chosen.to(tl.float64))
    tl.store(pairs + tl.num_programs(0) + row, prob.to(tl.float64))


def sample_rows_reference(
    logits: torch.Tensor, temperatures: torch.Tensor, uniforms: torch.Tensor, mask_token_id: int | None
) -> torch.Tensor:
    """The rows' tokens [R] int64 by the definition, in float64."""
    wide = logits.double().clone()
    if mask_token_id is not None:
        wide[:, mask_token_id] = -torch.inf
    tokens = wide.argmax(-1)
    for row in temperatures.nonzero().flatten().tolist():
        scaled = (wide[row] - wide[row].max()) / temperatures[row].double()
        cumulative = scaled.exp().cumsum(0)
        tokens[row] = (cumulative > uniforms[row].double() * cumulative[-1]).int().argmax()
    return tokens
