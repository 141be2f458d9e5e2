"""The most probable token of each row of logits, its probability and the row's log-sum-exp, in one pass.

    token = argmax_v x_v    log_sum = log sum_v exp(x_v)    prob = exp(x_token - log_sum)

over all v but the mask token; no softmax is written. Every program keeps the maximum and the sum of
exp(x - maximum) of its part of the vocabulary, rescaled as the maximum grows (Milakov and Gimelshein,
arXiv 1805.02867); where rows are few a row is split among programs and the parts are merged.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from replicas.kernels.launch import dependent_launch, splits_to_fill, wait_for_earlier

_BLOCK = 4096
_MAX_SPLITS = 32


class Confidence(NamedTuple):
    """The most probable token of each row.

    Of a row with a NaN or +inf, or with nothing but -inf, the token is some id of the vocabulary and the
    probability is not finite.
    """

    tokens: torch.Tensor
    """[R] int64; of equal logits the lowest id."""
    probs: torch.Tensor
    """[R] float32, the token's probability."""
    log_sums: torch.Tensor
    """[R] float32, the row's log-sum-exp."""


def confidence(logits: torch.Tensor, mask_token_id: int | None, num_splits: int | None = None) -> Confidence:
    """The confidence of each row of logits [R, vocab], rows contiguous.

    num_splits: programs a row, a power of two; None for as many as fill the device
    """
    num_rows, vocab = logits.shape
    assert logits.stride(1) == 1
    device = logits.device
    found = Confidence(
        torch.empty(num_rows, dtype=torch.int64, device=device),
        torch.empty(num_rows, dtype=torch.float32, device=device),
        torch.empty(num_rows, dtype=torch.float32, device=device),
    )
    if not num_rows:
        return found
    block = min(_BLOCK, triton.next_power_of_2(vocab))
    num_blocks = triton.cdiv(vocab, block)
    if num_splits is None:
        max_splits = min(_MAX_SPLITS, 1 << num_blocks.bit_length() - 1)
        num_splits = splits_to_fill(num_rows, device, max_splits)
    shape = (num_rows, num_splits) if num_splits > 1 else (0,)
    largest = torch.empty(shape, dtype=torch.float32, device=device)
    sums, ids = torch.empty_like(largest), torch.empty(shape, dtype=torch.int32, device=device)
    _scan[(num_rows, num_splits)](
        logits, largest, sums, ids, *found, logits.stride(0),
        mask_token_id=-1 if mask_token_id is None else mask_token_id,
        VOCAB=vocab, NUM_SPLITS=num_splits, BLOCKS_PER_SPLIT=triton.cdiv(num_blocks, num_splits), BLOCK=block,
        num_warps=8, enable_fp_fusion=True, **dependent_launch(device),
    )  # fmt: skip
    if num_splits > 1:
        _merge[(num_rows,)](
            largest, sums, ids, *found, NUM_SPLITS=num_splits, num_warps=1, enable_fp_fusion=True,
            **dependent_launch(device),
        )  # fmt: skip
    return found


@triton.jit
def _load(logits, row, start, stride, mask_token_id, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Loads a block of logits in float32, -inf for the mask token and past the end."""
    token = start + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    return tl.where(token == mask_token_id, float("-inf"), x)


@triton.jit
def _write(tokens, probs, log_sums, row, largest, total, token):
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(probs + row, 1.0 / total)
    tl.store(log_sums + row, largest + tl.log(total))


@triton.jit
def _scan(
    logits,
    largest_parts,
    total_parts,
    token_parts,
    tokens,
    probs,
    log_sums,
    stride,
    mask_token_id,
    VOCAB: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCKS_PER_SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Scans one split of one row."""
    wait_for_earlier(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    first = split * BLOCKS_PER_SPLIT * BLOCK
    largest = float("-inf")
    total = 0.0
    best_start = first
    for start in range(first, first + BLOCKS_PER_SPLIT * BLOCK, BLOCK):
        x = _load(logits, row, start, stride, mask_token_id, VOCAB, BLOCK)
        block_largest = tl.max(x, 0)
        best_start = tl.where(block_largest > largest, start, best_start)
        new_largest = tl.maximum(largest, block_largest)
        # A part with nothing but the mask token, or past the end, has no maximum to subtract.
        offset = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp(largest - offset) + tl.sum(tl.exp(x - offset), 0)
        largest = new_largest
    # The token itself is looked up once at the end: a running argmax would double the work of the loop.
    x = _load(logits, row, best_start, stride, mask_token_id, VOCAB, BLOCK)
    token = best_start + tl.min(tl.where(x == largest, tl.arange(0, BLOCK), BLOCK), 0)
    token = tl.minimum(token, VOCAB - 1)  # a NaN equals nothing, or only what is past the end
    if NUM_SPLITS == 1:
        _write(tokens, probs, log_sums, row, largest, total, token)
    else:
        at = row * NUM_SPLITS + split
        tl.store(largest_parts + at, largest)
        tl.store(total_parts + at, total)
        tl.store(token_parts + at, token)


@triton.jit
def _merge(
    largest_parts, total_parts, token_parts, tokens, probs, log_sums,
    NUM_SPLITS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Merges one row's splits."""
    wait_for_earlier(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    at = row * NUM_SPLITS + tl.arange(0, NUM_SPLITS)
    part = tl.load(largest_parts + at)
    largest = tl.max(part, 0)
    total = tl.sum(tl.load(total_parts + at) * tl.exp(part - largest), 0)
    token = tl.min(tl.where(part == largest, tl.load(token_parts + at), 0x7FFFFFFF), 0)
    token = tl.where(token == 0x7FFFFFFF, 0, token)
    _write(tokens, probs, log_sums, row, largest, total, token)


def confidence_reference(logits: torch.Tensor, mask_token_id: int | None) -> Confidence:
    """The same by the definition; probs and log_sums float64."""
    wide = logits.double()
    if mask_token_id is not None:
        wide = wide.clone()
        wide[:, mask_token_id] = -torch.inf
    largest = wide.amax(-1)
    tokens = (wide == largest[:, None]).int().argmax(-1)
    log_sums = wide.logsumexp(-1)
    return Confidence(tokens, (largest - log_sums).exp(), log_sums)
