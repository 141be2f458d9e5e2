"""Rotation of queries and keys, query scaling, head norms, and the write of K/V to pages, in one pass.

A head's neighbours 2j and 2j + 1 are one complex number (replicas.model.layout interleaves the two halves
that published checkpoints rotate against each other), turned by the angle of its position:

    (x_2j, x_2j+1) <- (x_2j cos_j - x_2j+1 sin_j, x_2j sin_j + x_2j+1 cos_j)

RoFormer, arXiv 2104.09864; the angles come from a table, so YaRN (arXiv 2309.00071) costs nothing here.
Queries are multiplied by the scale of their position besides, 1 + beta log(1 + floor(p / original_max))
in Ministral 3. Where the model has head norms (Qwen 3), heads are RMS-normalised before the rotation.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_BLOCK_HEADS = 8


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights of the norms over each query and key head."""

    query: torch.Tensor
    """[head_dim], in the engine's order of dimensions."""
    key: torch.Tensor
    """[head_dim], likewise."""
    eps: float


@dataclass(frozen=True, slots=True)
class Rotation:
    """The rotary embedding's tables by position."""

    phases: torch.Tensor
    """[positions, head_dim] float32, cos and sin of pair j at 2j and 2j + 1."""
    query_scale: torch.Tensor | None
    """[positions] float32; None where queries are not scaled."""


def store_kv(
    qkv: torch.Tensor,
    cache: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    num_heads: int,
    rotation: Rotation | None,
    norms: HeadNorms | None = None,
    scales: torch.Tensor | None = None,
) -> None:
    """Rotates the queries of qkv in place, and writes its keys, rotated, and its values to the cache.

    qkv: [T, heads + 2 kv_heads, head_dim], rows contiguous
    cache: [pages, 2, kv_heads, page_size, head_dim]
    positions: [T] int32
    slots: [T] int32, page * page_size + offset in it; -1 for rows that are padding and stored nowhere
    rotation: None for heads that come rotated and normalised already, so are stored only
    scales: [2, kv_heads] float32, the divisors of keys and values as they are stored; None for 1
    """
    num_rows, num_all_heads, head_dim = qkv.shape
    assert qkv.stride()[1:] == (head_dim, 1)
    assert cache.is_contiguous()
    if not num_rows:
        return
    phases = query_scale = None
    if rotation is not None:
        phases, query_scale = rotation.phases, rotation.query_scale
    _store_kv[(num_rows, triton.cdiv(num_all_heads, _BLOCK_HEADS))](
        qkv,
        cache,
        positions,
        slots,
        phases,
        query_scale,
        None if norms is None else norms.query,
        None if norms is None else norms.key,
        scales,
        qkv.stride(0),
        0.0 if norms is None else norms.eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=cache.shape[2],
        HEAD_DIM=head_dim,
        PAGE_SIZE=cache.shape[3],
        BLOCK_HEADS=_BLOCK_HEADS,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        num_warps=4,
        enable_fp_fusion=True,
    )


@triton.jit
def _store_kv(
    qkv,
    cache,
    positions,
    slots,
    phases,
    query_scale,
    query_norm,
    key_norm,
    scales,
    row_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Handles a few heads of one row, of whatever kinds: queries first, then keys, then values."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    position = tl.load(positions + row)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    dim = tl.arange(0, BLOCK_D)
    is_query = head < NUM_HEADS
    is_turned = head < NUM_HEADS + NUM_KV_HEADS
    is_head = head < NUM_HEADS + 2 * NUM_KV_HEADS
    is_element = is_head[:, None] & (dim < HEAD_DIM)[None, :]
    at = qkv + row.to(tl.int64) * row_stride + head[:, None] * HEAD_DIM + dim[None, :]
    x = tl.load(at, mask=is_element, other=0.0).to(tl.float32)
    if phases is not None:
        turned = x
        if query_norm is not None:
            in_head = dim < HEAD_DIM
            query_weight = tl.load(query_norm + dim, mask=in_head, other=0.0).to(tl.float32)
            key_weight = tl.load(key_norm + dim, mask=in_head, other=0.0).to(tl.float32)
            weight = tl.where(is_query[:, None], query_weight[None, :], key_weight[None, :])
            turned = x * tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None] * weight
        phase = tl.load(phases + position.to(tl.int64) * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
        cos, sin = tl.split(tl.reshape(phase, (BLOCK_D // 2, 2)))
        even, odd = tl.split(tl.reshape(turned, (BLOCK_HEADS, BLOCK_D // 2, 2)))
        new_even = even * cos[None, :] - odd * sin[None, :]
        new_odd = even * sin[None, :] + odd * cos[None, :]
        turned = tl.reshape(tl.join(new_even, new_odd), (BLOCK_HEADS, BLOCK_D))
        if query_scale is not None:
            turned = tl.where(is_query[:, None], turned * tl.load(query_scale + position), turned)
        x = tl.where(is_turned[:, None], turned, x)
        tl.store(at, x.to(qkv.dtype.element_ty), mask=is_element & is_query[:, None])
    # Heads past the queries are numbered as a page's rows are: keys, then values.
    kv_head = head - NUM_HEADS
    is_stored = is_element & (kv_head >= 0)[:, None]
    if scales is not None:
        x = x / tl.load(scales + kv_head, mask=is_head & (kv_head >= 0), other=1.0)[:, None]
    page = (slot // PAGE_SIZE).to(tl.int64)
    cache_row = (page * 2 * NUM_KV_HEADS + kv_head) * PAGE_SIZE + slot % PAGE_SIZE
    to = cache + cache_row[:, None] * HEAD_DIM + dim[None, :]
    if slot >= 0:
        tl.store(to, x.to(cache.dtype.element_ty), mask=is_stored)


def store_kv_reference(
    qkv: torch.Tensor,
    cache: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    num_heads: int,
    rotation: Rotation | None,
    norms: HeadNorms | None = None,
    scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition -> queries [T, heads, head_dim] and the new cache, both float64; nothing is changed."""
    num_kv_heads, page_size = cache.shape[2:4]
    queries, keys, values = qkv.double().split((num_heads, num_kv_heads, num_kv_heads), 1)
    if norms is not None:
        queries, keys = (
            x * (x.square().mean(-1, keepdim=True) + norms.eps).rsqrt() * weight.double()
            for x, weight in ((queries, norms.query), (keys, norms.key))
        )
    if rotation is not None:
        phases = torch.view_as_complex(rotation.phases[positions.long()].double().unflatten(-1, (-1, 2)))
        queries, keys = (
            torch.view_as_real(
                torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * phases[:, None]
            ).flatten(-2)
            for x in (queries, keys)
        )
        if rotation.query_scale is not None:
            queries = queries * rotation.query_scale[positions.long(), None, None]
    stored = cache.double()
    keys_values = torch.stack((keys, values), 1)
    if scales is not None:
        keys_values = keys_values / scales[None, :, :, None]
    real = slots >= 0
    where = slots[real].long()
    stored[where // page_size, :, :, where % page_size] = keys_values[real]
    return queries, stored
