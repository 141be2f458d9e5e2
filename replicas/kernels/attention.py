"""Attention of a ragged list of segments over paged K/V.

For query i of a segment (position start + i), with v = start + i + 1 keys visible to it if i < num_causal
and start + length, the whole segment, if not:

    output_i = sum_j softmax_j(q_i . k_j / sqrt(head_dim)) v_j    over the first v positions j

computed a block of keys at a time with the online softmax (Milakov and Gimelshein, arXiv 1805.02867;
FlashAttention, arXiv 2205.14135). Keys and values are read through the page table (PagedAttention, arXiv
2309.06180), once for all queries that share a K/V head: a tile's rows are (query, query head of the K/V
head). Where tiles are few, each tile's keys are split among programs, whose parts are then merged by
their log-sum-exps (Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from replicas.kernels.launch import block_shared_bytes, dot_dtype, splits_to_fill

MAX_SPLITS = 32
SEGMENT_FIELDS = tl.constexpr(5)
_MIN_SPLIT_BLOCKS = 2
_BUFFERED_BYTES = 128 << 10
"""Shared memory of a block from which on several blocks of keys and values are on their way at once."""
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class TileShape:
    """The shape of a program's work, and how it is launched."""

    block_m: int
    """Rows of a tile: query tokens times queries per K/V head."""
    block_n: int
    """Keys a step."""
    num_warps: int
    num_stages: int
    num_resident: int
    """Such programs that an SM of sm_90 holds at once, as compiled (benchmarks/gpu/offline/budget.json)."""


TILE_SHAPES = (TileShape(16, 64, 4, 3, 3), TileShape(64, 64, 4, 3, 2), TileShape(128, 64, 8, 3, 1))


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of one shape."""

    shape: TileShape
    index: torch.Tensor
    """[N, 2] int32, each tile's segment and its first query in it; a segment of -1 is padding."""
    num_splits: int
    """The number of programs among which a tile's keys are split."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """The parts of split tiles, float32, until they are merged."""

    partial: torch.Tensor
    """[splits, T, heads, head_dim], each split's output."""
    log_sums: torch.Tensor
    """[splits, T, heads], the log2 of each split's sum of exponentials."""

    @classmethod
    def allocate(
        cls, tiles: Sequence[Tiles], num_rows: int, num_heads: int, head_dim: int, device: torch.device
    ) -> "Scratch":
        num_splits = max((group.num_splits for group in tiles), default=1)
        num_rows = num_rows if num_splits > 1 else 0
        partial = torch.empty(num_splits, num_rows, num_heads, head_dim, dtype=torch.float32, device=device)
        return cls(partial, torch.empty(partial.shape[:3], dtype=torch.float32, device=device))


def num_splits(shape: TileShape, num_tiles: int, num_kv_heads: int, device: torch.device) -> int:
    """The number of splits, a power of two, that keeps the device full of tiles of this shape."""
    return splits_to_fill(num_tiles * num_kv_heads, device, MAX_SPLITS, shape.num_resident)


def tile_shape(num_queries: int, queries_per_kv: int) -> int:
    """The index in TILE_SHAPES of the shape for a segment of so many queries."""
    num_rows = num_queries * queries_per_kv
    fitting = [index for index, shape in enumerate(TILE_SHAPES) if shape.block_m >= num_rows]
    index = fitting[0] if fitting else len(TILE_SHAPES) - 1
    while TILE_SHAPES[index].block_m < queries_per_kv:  # a tile holds one query at least
        index += 1
    return index


def _wide(shape: TileShape) -> TileShape:
    """The shape for float32, which no tensor core multiplies exactly: fewer keys a step and more threads, so
    that it fits the registers, and the 64 to 99 KiB of shared memory that a block of the lesser GPUs may
    have."""
    return replace(shape, block_n=16, num_warps=8 if shape.block_m <= 64 else 16, num_stages=1)


def queries_per_tile(shape: TileShape, queries_per_kv: int) -> int:
    return shape.block_m // queries_per_kv


def ragged_paged_attention(
    queries: torch.Tensor,
    cache: torch.Tensor,
    output: torch.Tensor,
    segments: torch.Tensor,
    page_table: torch.Tensor,
    tiles: Sequence[Tiles],
    scratch: Scratch,
    scales: torch.Tensor | None = None,
) -> None:
    """Attends queries [T, heads, head_dim] -> output [T, heads, head_dim], contiguous.

    queries: heads ordered (query of a K/V head, K/V head), rows strided
    cache: [pages, 2, kv_heads, page_size, head_dim], keys then values; segments' own K/V is in it already
    segments: [S, 5] int32: first row, start, length, num_causal, first index of its pages in page_table
    page_table: [P] int32, each segment's pages in order; nothing past a segment's last key is read
    tiles: cover each row once; rows that no tile covers are left as they are
    scales: [2, kv_heads] float32, the factors by which stored keys and values are multiplied; None for 1
    """
    num_rows, num_heads, head_dim = queries.shape
    num_kv_heads, page_size = cache.shape[2:4]
    assert queries.stride()[1:] == (head_dim, 1)
    assert output.is_contiguous()
    assert cache.is_contiguous()
    wide = queries.dtype is torch.float32
    has_room = block_shared_bytes(queries.device) >= _BUFFERED_BYTES
    block_d = max(16, triton.next_power_of_2(head_dim))
    for group in tiles:
        if not len(group.index):
            continue
        shape = _wide(group.shape) if wide else group.shape
        _attend[(len(group.index), num_kv_heads, group.num_splits)](
            queries, cache, output, scratch.partial, scratch.log_sums, group.index, segments, page_table,
            scales, queries.stride(0), num_rows, head_dim**-0.5 * _LOG2_E,
            NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, PAGE_SIZE=page_size,
            BLOCK_M=shape.block_m, BLOCK_N=shape.block_n, BLOCK_D=block_d, NUM_SPLITS=group.num_splits,
            MIN_SPLIT_BLOCKS=_MIN_SPLIT_BLOCKS, DOT_DTYPE=dot_dtype(queries.dtype),
            num_warps=shape.num_warps, num_stages=shape.num_stages if has_room else min(2, shape.num_stages),
            enable_fp_fusion=True,
        )  # fmt: skip
        if group.num_splits > 1:
            _merge_splits[(len(group.index), shape.block_m, num_kv_heads)](
                scratch.partial, scratch.log_sums, output, group.index, segments, num_rows,
                NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_M=shape.block_m,
                BLOCK_D=block_d, NUM_SPLITS=group.num_splits, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip


@triton.jit
def _attend(
    queries,
    cache,
    output,
    partial,
    log_sums,
    tiles,
    segments,
    page_table,
    scales,
    query_stride,
    num_rows,
    softmax_scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MIN_SPLIT_BLOCKS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Attends one tile of one K/V head, over one split of its keys."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    IS_WITHIN_PAGE: tl.constexpr = PAGE_SIZE % BLOCK_N == 0
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    segment = tl.load(tiles + 2 * tl.program_id(0))
    if segment < 0:
        return
    first_query = tl.load(tiles + 2 * tl.program_id(0) + 1)
    first_row = tl.load(segments + SEGMENT_FIELDS * segment)
    start = tl.load(segments + SEGMENT_FIELDS * segment + 1)
    length = tl.load(segments + SEGMENT_FIELDS * segment + 2)
    num_causal = tl.load(segments + SEGMENT_FIELDS * segment + 3)

    tile_row = tl.arange(0, BLOCK_M)
    query = first_query + tile_row // GROUP
    head = (tile_row % GROUP) * NUM_KV_HEADS + kv_head
    is_row = (tile_row < BLOCK_Q * GROUP) & (query < length)
    row = (first_row + query).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    is_element = is_row[:, None] & (dim < HEAD_DIM)[None, :]
    q = tl.load(
        queries + row[:, None] * query_stride + head[:, None] * HEAD_DIM + dim[None, :],
        mask=is_element,
        other=0.0,
    ).to(DOT_DTYPE)
    if scales is not None:
        softmax_scale *= tl.load(scales + kv_head)

    total = start + length
    visible = tl.where(is_row, tl.where(query < num_causal, start + query + 1, total), 0)
    # Later queries never see less, so a tile's first and last ones bound what its rows see.
    end_query = tl.minimum(first_query + BLOCK_Q, length)
    max_visible = tl.where(end_query <= num_causal, start + end_query, total)
    least_visible = tl.where(first_query < num_causal, start + first_query + 1, total)
    num_blocks = tl.cdiv(max_visible, BLOCK_N)
    split_blocks = tl.maximum(tl.cdiv(num_blocks, NUM_SPLITS), MIN_SPLIT_BLOCKS)
    first_block = split * split_blocks
    end_block = tl.minimum(first_block + split_blocks, num_blocks)
    full_end = tl.minimum(end_block, least_visible // BLOCK_N)

    table = page_table + tl.load(segments + SEGMENT_FIELDS * segment + 4)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total_weight = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    page = tl.full((), 0, tl.int32)
    if IS_WITHIN_PAGE:
        page = tl.load(table + first_block * BLOCK_N // PAGE_SIZE, mask=first_block < end_block, other=0)
    for block in range(first_block, full_end):
        largest, total_weight, sums, page = _attend_block(
            q, cache, table, block, page, end_block, kv_head, visible, max_visible, softmax_scale,
            largest, total_weight, sums,
            NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D, DOT_DTYPE, IS_WITHIN_PAGE, False,
        )  # fmt: skip
    for block in range(tl.maximum(first_block, full_end), end_block):
        largest, total_weight, sums, page = _attend_block(
            q, cache, table, block, page, end_block, kv_head, visible, max_visible, softmax_scale,
            largest, total_weight, sums,
            NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D, DOT_DTYPE, IS_WITHIN_PAGE, True,
        )  # fmt: skip

    sums = sums / tl.where(total_weight > 0, total_weight, 1.0)[:, None]
    if scales is not None:
        sums *= tl.load(scales + NUM_KV_HEADS + kv_head)
    place = row * NUM_HEADS + head
    if NUM_SPLITS == 1:
        at = output + place[:, None] * HEAD_DIM + dim[None, :]
        tl.store(at, sums.to(output.dtype.element_ty), mask=is_element)
    else:
        place += split.to(tl.int64) * num_rows * NUM_HEADS
        tl.store(log_sums + place, largest + tl.log2(total_weight), mask=is_row)
        if first_block < end_block:
            tl.store(partial + place[:, None] * HEAD_DIM + dim[None, :], sums, mask=is_element)


@triton.jit
def _attend_block(
    q,
    cache,
    table,
    block,
    page,
    end_block,
    kv_head,
    visible,
    max_visible,
    softmax_scale,
    largest,
    total_weight,
    sums,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    IS_WITHIN_PAGE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Takes one more block of keys into the running maximum, total weight and weighted sum of values.

    A block within a page has its number handed on from the block before: so the loads of keys and values
    depend on no load of their own turn, and the compiler can begin them turns ahead.
    """
    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    is_element = (dim < HEAD_DIM)[None, :]
    if MASKED:
        is_element = is_element & (key < max_visible)[:, None]
    if IS_WITHIN_PAGE:
        first_row = (page.to(tl.int64) * 2 * NUM_KV_HEADS + kv_head) * PAGE_SIZE
        key_row = first_row + block * BLOCK_N % PAGE_SIZE + tl.arange(0, BLOCK_N)
        page = tl.load(table + tl.minimum(block + 1, end_block - 1) * BLOCK_N // PAGE_SIZE)
    else:
        if MASKED:
            pages = tl.load(table + key // PAGE_SIZE, mask=key < max_visible, other=0)
        else:
            pages = tl.load(table + key // PAGE_SIZE)
        key_row = (pages.to(tl.int64) * 2 * NUM_KV_HEADS + kv_head) * PAGE_SIZE + key % PAGE_SIZE
    at = cache + key_row[:, None] * HEAD_DIM + dim[None, :]
    if MASKED or HEAD_DIM != BLOCK_D:
        k = tl.load(at, mask=is_element, other=0.0).to(DOT_DTYPE)
        v = tl.load(at + NUM_KV_HEADS * PAGE_SIZE * HEAD_DIM, mask=is_element, other=0.0).to(DOT_DTYPE)
    else:
        k = tl.load(at).to(DOT_DTYPE)
        v = tl.load(at + NUM_KV_HEADS * PAGE_SIZE * HEAD_DIM).to(DOT_DTYPE)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * softmax_scale
    if MASKED:
        scores = tl.where(key[None, :] < visible[:, None], scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    # A row that sees none of the keys so far has no maximum to subtract.
    offset = tl.where(new_largest == float("-inf"), 0.0, new_largest) if MASKED else new_largest
    decay = tl.exp2(largest - offset)
    weights = tl.exp2(scores - offset[:, None])
    total_weight = total_weight * decay + tl.sum(weights, 1)
    sums = sums * decay[:, None]
    sums = tl.dot(weights.to(DOT_DTYPE), v, sums, input_precision="ieee")
    return new_largest, total_weight, sums, page


@triton.jit
def _merge_splits(
    partial,
    log_sums,
    output,
    tiles,
    segments,
    num_rows,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    """Merges a tile's row: output = sum_s 2^(l_s - l) partial_s, with l the log2 of the sum of the 2^l_s."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    tile_row = tl.program_id(1)
    segment = tl.load(tiles + 2 * tl.program_id(0))
    if (segment < 0) | (tile_row >= BLOCK_M // GROUP * GROUP):
        return
    query = tl.load(tiles + 2 * tl.program_id(0) + 1) + tile_row // GROUP
    if query >= tl.load(segments + SEGMENT_FIELDS * segment + 2):
        return
    row = (tl.load(segments + SEGMENT_FIELDS * segment) + query).to(tl.int64)
    head = (tile_row % GROUP) * NUM_KV_HEADS + tl.program_id(2)
    split = tl.arange(0, NUM_SPLITS)
    dim = tl.arange(0, BLOCK_D)
    place = (split.to(tl.int64) * num_rows + row) * NUM_HEADS + head
    log_sum = tl.load(log_sums + place)
    weight = tl.exp2(log_sum - tl.max(log_sum, 0))
    part = tl.load(
        partial + place[:, None] * HEAD_DIM + dim[None, :],
        mask=(log_sum > float("-inf"))[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    merged = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    at = output + (row * NUM_HEADS + head) * HEAD_DIM + dim
    tl.store(at, merged.to(output.dtype.element_ty), mask=dim < HEAD_DIM)


def ragged_paged_attention_reference(
    queries: torch.Tensor,
    cache: torch.Tensor,
    segments: torch.Tensor,
    page_table: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same by its definition, a segment at a time -> [T, heads, head_dim] float64."""
    num_kv_heads, page_size, head_dim = cache.shape[2:]
    output = torch.full(queries.shape, torch.nan, dtype=torch.float64, device=queries.device)
    for first, start, length, num_causal, first_page in segments.tolist():
        total = start + length
        pages = page_table[first_page : first_page - (-total // page_size)].long()
        keys_values = cache[pages].double().permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)
        keys, values = keys_values[:, :, :total]
        if scales is not None:
            keys, values = keys * scales[0, :, None, None], values * scales[1, :, None, None]
        rows = queries[first : first + length].double().unflatten(1, (-1, num_kv_heads))
        scores = torch.einsum("qgkd,knd->qgkn", rows, keys) * head_dim**-0.5
        query = torch.arange(length)
        visible = torch.where(query < num_causal, start + query + 1, total)
        hidden = torch.arange(total) >= visible[:, None]
        scores.masked_fill_(hidden[:, None, None].to(scores.device), -torch.inf)
        attended = torch.einsum("qgkn,knd->qgkd", scores.softmax(-1), values)
        output[first : first + length] = attended.flatten(1, 2)
    return output
