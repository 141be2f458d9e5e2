"""The most probable tokens of rows, the most probable first, of equal logits the lowest id first."""

import torch
import triton
import triton.language as tl

_BLOCK = 8192


def rank_rows(
    logits: torch.Tensor, rows: torch.Tensor, num_ranked: int, mask_token_id: int | None
) -> torch.Tensor:
    """Token ids and logits [2, n, num_ranked] float64 of n rows of logits [R, vocab].

    rows: [n] int32. In rows that are not finite ids are some of the vocabulary.
    """
    vocab = logits.shape[1]
    assert logits.stride(1) == 1
    num_ranked = min(num_ranked, vocab)
    ranked = torch.empty(2, len(rows), num_ranked, dtype=torch.float64, device=logits.device)
    if ranked.numel():
        _rank_rows[(len(rows),)](
            logits, rows, ranked, logits.stride(0), num_ranked,
            -1 if mask_token_id is None else mask_token_id,
            VOCAB=vocab, BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)), num_warps=16,
            enable_fp_fusion=True,
        )  # fmt: skip
    return ranked


@triton.jit(do_not_specialize=["num_ranked"])
def _rank_rows(
    logits, rows, ranked, stride, num_ranked, mask_token_id, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Ranks one row's tokens: each pass finds the next in order."""
    at = ranked + tl.program_id(0).to(tl.int64) * num_ranked
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    last, last_token = float("inf"), -1
    for rank in range(num_ranked):
        largest, token = float("-inf"), VOCAB
        for start in range(0, VOCAB, BLOCK):
            x = tl.load(logits + row * stride + start + offset, mask=start + offset < VOCAB, other=0.0)
            x = tl.where(start + offset == mask_token_id, float("-inf"), x.to(tl.float32))
            is_left = (x < last) | ((x == last) & (start + offset > last_token))
            is_left = is_left & (start + offset < VOCAB)
            block_largest = tl.max(tl.where(is_left, x, float("-inf")), 0)
            is_first = is_left & (x == block_largest)
            block_token = start + tl.min(tl.where(is_first, offset, BLOCK), 0)
            is_larger = (block_largest > largest) | ((token == VOCAB) & (block_token < start + BLOCK))
            token = tl.where(is_larger, block_token, token)
            largest = tl.maximum(largest, block_largest)
        last, last_token = largest, tl.minimum(token, VOCAB - 1)
        tl.store(at + rank, last_token.to(tl.float64))
        tl.store(at + tl.num_programs(0).to(tl.int64) * num_ranked + rank, tl.cast(last, tl.float64))


def rank_rows_reference(
    logits: torch.Tensor, rows: torch.Tensor, num_ranked: int, mask_token_id: int | None
) -> torch.Tensor:
    """The same by the definition."""
    wide = logits[rows.long()].double()
    if mask_token_id is not None:
        wide[:, mask_token_id] = -torch.inf
    values, ids = wide.sort(descending=True, stable=True)
    return torch.stack((ids.double(), values))[:, :, :num_ranked]
