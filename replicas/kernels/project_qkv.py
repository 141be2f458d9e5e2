"""Queries, keys and values of a few rows in one pass: norm, projection, rotation, and the write to pages.

What rms_norm, a product and store_kv do one after the other (replicas.kernels.store_kv has the formulas),
without head norms. Rounded is only what is stored.
"""

import torch
import triton
import triton.language as tl

from replicas.kernels.launch import dependent_launch, dot_dtype, prefetch_weights, wait_for_earlier
from replicas.kernels.normed_product import Norm, block_of, decoded, normed_product
from replicas.kernels.rms_norm import rms_norm_reference
from replicas.kernels.store_kv import Rotation, store_kv_reference


def project_qkv(
    x: torch.Tensor,
    norm: Norm,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cache: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    rotation: Rotation,
    scales: torch.Tensor | None = None,
    weight_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Projects x [T, hidden], at most MAX_ROWS rows; writes keys and values to the cache -> queries, rotated,
    [T, heads, head_dim].

    weight: [(heads + 2 kv_heads) * head_dim, hidden]; bias: likewise without hidden
    weight_scales: [(heads + 2 kv_heads) * head_dim] float32 where the weights are codes
    (replicas.kernels.normed_product)
    cache, positions, slots, scales: as of replicas.kernels.store_kv
    """
    num_rows, size = x.shape
    num_kv_heads, page_size, head_dim = cache.shape[2:]
    num_heads = len(weight) // head_dim - 2 * num_kv_heads
    assert x.is_contiguous()
    assert weight.is_contiguous()
    assert cache.is_contiguous()
    queries = x.new_empty(num_rows, num_heads, head_dim)
    if not num_rows:
        return queries
    block = block_of(num_rows, weight, x.dtype)
    _project_qkv[(triton.cdiv(len(weight), block.columns),)](
        x, norm.weight, weight, weight_scales, bias, queries, cache, positions, slots, rotation.phases,
        rotation.query_scale, scales, num_rows, norm.eps,
        SIZE=size, NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, PAGE_SIZE=page_size,
        BLOCK_M=block.rows, BLOCK_COLUMNS=block.columns, BLOCK_INNER=block.inner,
        DOT_DTYPE=dot_dtype(x.dtype),
        num_warps=block.num_warps, num_stages=block.num_stages, enable_fp_fusion=True,
        **dependent_launch(x.device),
    )  # fmt: skip
    return queries


@triton.jit(do_not_specialize=["num_rows"])
def _project_qkv(
    x,
    norm,
    weight,
    weight_scales,
    bias,
    queries,
    cache,
    positions,
    slots,
    phases,
    query_scale,
    scales,
    num_rows,
    eps,
    SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Projects all rows to some columns, of whatever heads; neighbours, which are turned together, are in
    one program."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    NUM_COLUMNS: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    if DEPENDENT:
        prefetch_weights(weight, column, NUM_COLUMNS, SIZE, BLOCK_COLUMNS)
    wait_for_earlier(DEPENDENT)
    is_column = column < NUM_COLUMNS
    row = tl.arange(0, BLOCK_M)
    is_row = row < num_rows
    y = normed_product(
        x, norm, weight, weight_scales, eps, row, is_row, column, is_column,
        SIZE, BLOCK_M, BLOCK_COLUMNS, BLOCK_INNER, DOT_DTYPE,
    )  # fmt: skip
    if bias is not None:
        y += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    head, dim = column // HEAD_DIM, column % HEAD_DIM
    is_query = head < NUM_HEADS
    is_element = is_row[:, None] & is_column[None, :]
    position = tl.load(positions + row, mask=is_row, other=0).to(tl.int64)
    slot = tl.load(slots + row, mask=is_row, other=-1)
    phase = tl.load(phases + position[:, None] * HEAD_DIM + dim[None, :])
    cos, sin = tl.split(tl.reshape(phase, (BLOCK_M, BLOCK_COLUMNS // 2, 2)))
    even, odd = tl.split(tl.reshape(y, (BLOCK_M, BLOCK_COLUMNS // 2, 2)))
    turned = tl.reshape(
        tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK_M, BLOCK_COLUMNS)
    )  # fmt: skip
    if query_scale is not None:
        scale = tl.load(query_scale + position)
        turned = tl.where(is_query[None, :], turned * scale[:, None], turned)
    y = tl.where((head < NUM_HEADS + NUM_KV_HEADS)[None, :], turned, y)
    at = queries + row[:, None] * (NUM_HEADS * HEAD_DIM) + column[None, :]
    tl.store(at, y.to(queries.dtype.element_ty), mask=is_element & is_query[None, :])
    # Heads past the queries are numbered as a page's rows are: keys, then values.
    kv_head = head - NUM_HEADS
    is_stored = is_column & (kv_head >= 0)
    if scales is not None:
        y = y / tl.load(scales + kv_head, mask=is_stored, other=1.0)[None, :]
    page = (slot // PAGE_SIZE).to(tl.int64)
    cache_row = (page[:, None] * 2 * NUM_KV_HEADS + kv_head[None, :]) * PAGE_SIZE
    to = cache + (cache_row + (slot % PAGE_SIZE)[:, None]) * HEAD_DIM + dim[None, :]
    tl.store(to, y.to(cache.dtype.element_ty), mask=is_stored[None, :] & (slot >= 0)[:, None])


def project_qkv_reference(
    x: torch.Tensor,
    norm: Norm,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cache: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    rotation: Rotation,
    scales: torch.Tensor | None = None,
    weight_scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition -> queries [T, heads, head_dim] and the new cache, both float64; nothing is changed."""
    normed, _ = rms_norm_reference(x, norm.weight, norm.eps)
    y = normed @ decoded(weight, weight_scales).double().t()
    if bias is not None:
        y = y + bias.double()
    num_kv_heads, _, head_dim = cache.shape[2:]
    qkv = y.unflatten(1, (-1, head_dim))
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    return store_kv_reference(qkv, cache, positions, slots, num_heads, rotation, None, scales)
