"""Attention of a ragged list of segments over paged K/V.

For query i of a segment (position start + i), with v = start + i + 1 keys visible to it if i < num_causal
and start + length, the whole segment, if not:

    output_i = sum_j softmax_j(q_i . k_j / sqrt(head_dim)) v_j    over the first v positions j

computed a block of keys at a time with the online softmax (Milakov and Gimelshein, arXiv 1805.02867;
FlashAttention, arXiv 2205.14135). Keys and values are read through the page table (PagedAttention, arXiv
2309.06180), once for all queries that share a K/V head: a tile's rows are (query, query head of the K/V
head). Programs follow a list of work made for the step (replicas.kernels.tiling): a tile of many keys is
split among several, and the last of these to end merges their parts by their log-sum-exps (Flash-Decoding,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html; a plan by lengths, as FlashInfer has, arXiv
2501.01005).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from replicas.kernels.launch import block_shared_bytes, dependent_launch, dot_dtype, num_sms, wait_for_earlier

SEGMENT_FIELDS = tl.constexpr(5)
WORK_FIELDS = tl.constexpr(6)
_BUFFERED_BYTES = 128 << 10
"""Shared memory of a block from which on several blocks of keys and values are on their way at once."""
_OPERANDS_BYTES = 227 << 10
"""Shared memory of a block where tensor cores read operands from it (sm_90, sm_100), not from registers."""
_MERGED_ROWS = 64
"""Rows of a split tile's parts that are read at once when they are merged."""
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
class Work:
    """What the programs of one tile shape do."""

    shape: TileShape
    items: torch.Tensor
    """[N, 6] int32, as replicas.kernels.tiling makes them; a segment of -1 is padding."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """The parts of split tiles until they are merged. Steps share it, as they run in turn."""

    partial: torch.Tensor
    """[N, head_dim] float32, each part's output; a slot of an item has a tile's rows for each K/V head."""
    log_sums: torch.Tensor
    """[N] float32, the log2 of each part's sum of exponentials."""
    num_done: torch.Tensor
    """[slots * kv_heads] int32, how many parts of a tile have ended; all 0 between launches."""

    @classmethod
    def allocate(
        cls, num_places: Sequence[int], num_kv_heads: int, head_dim: int, device: torch.device
    ) -> "Scratch":
        """For lists of work made for so many places, by tile shape."""
        num_slots = [2 * places for places in num_places]  # replicas.kernels.tiling
        pairs = zip(num_slots, TILE_SHAPES, strict=True)
        num_rows = num_kv_heads * max(slots * shape.block_m for slots, shape in pairs)
        return cls(
            torch.empty(num_rows, head_dim, dtype=torch.float32, device=device),
            torch.empty(num_rows, dtype=torch.float32, device=device),
            torch.zeros(max(num_slots) * num_kv_heads, dtype=torch.int32, device=device),
        )


def num_places(num_kv_heads: int, device: torch.device) -> tuple[int, ...]:
    """For each tile shape, the number of tiles that the device works on at once, all their K/V heads."""
    return tuple(max(1, shape.num_resident * num_sms(device) // num_kv_heads) for shape in TILE_SHAPES)


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


def _fitting(shape: TileShape, shared_bytes: int) -> TileShape:
    """The shape, with half the keys a step for many rows where operands are in registers, which spill."""
    is_narrow = shape.block_m >= 64 and 0 < shared_bytes < _OPERANDS_BYTES
    return replace(shape, block_n=32) if is_narrow else shape


def queries_per_tile(shape: TileShape, queries_per_kv: int) -> int:
    return shape.block_m // queries_per_kv


def ragged_paged_attention(
    queries: torch.Tensor,
    cache: torch.Tensor,
    output: torch.Tensor,
    segments: torch.Tensor,
    page_table: torch.Tensor,
    work: Sequence[Work],
    scratch: Scratch,
    scales: torch.Tensor | None = None,
) -> None:
    """Attends queries [T, heads, head_dim] -> output [T, heads, head_dim], contiguous.

    queries: heads ordered (query of a K/V head, K/V head), rows strided
    cache: [pages, 2, kv_heads, page_size, head_dim], keys then values; segments' own K/V is in it already
    segments: [S, 5] int32: first row, start, length, num_causal, first index of its pages in page_table
    page_table: [P] int32, each segment's pages in order; nothing past a segment's last key is read
    work: covers each row once; rows that it does not cover are left as they are
    scales: [2, kv_heads] float32, the factors by which stored keys and values are multiplied; None for 1
    """
    num_heads, head_dim = queries.shape[1:]
    num_kv_heads, page_size = cache.shape[2:4]
    assert queries.stride()[1:] == (head_dim, 1)
    assert output.is_contiguous()
    assert cache.is_contiguous()
    wide = queries.dtype is torch.float32
    shared_bytes = block_shared_bytes(queries.device)
    has_room = shared_bytes >= _BUFFERED_BYTES
    block_d = max(16, triton.next_power_of_2(head_dim))
    for group in work:
        if not len(group.items):
            continue
        shape = _wide(group.shape) if wide else _fitting(group.shape, shared_bytes)
        _attend[(num_kv_heads, len(group.items))](
            queries, cache, output, scratch.partial, scratch.log_sums, scratch.num_done, group.items,
            segments, page_table, scales, queries.stride(0), head_dim**-0.5 * _LOG2_E,
            NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, PAGE_SIZE=page_size,
            BLOCK_M=shape.block_m, BLOCK_N=shape.block_n, BLOCK_D=block_d,
            PARTS_AT_ONCE=max(1, _MERGED_ROWS // shape.block_m), DOT_DTYPE=dot_dtype(queries.dtype),
            num_warps=shape.num_warps, num_stages=shape.num_stages if has_room else min(2, shape.num_stages),
            enable_fp_fusion=True, **dependent_launch(queries.device),
        )  # fmt: skip


@triton.jit
def _attend(
    queries,
    cache,
    output,
    partial,
    log_sums,
    num_done,
    work,
    segments,
    page_table,
    scales,
    query_stride,
    softmax_scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS_AT_ONCE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Attends one tile of one K/V head, over all of its keys or one split of them."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    IS_WITHIN_PAGE: tl.constexpr = PAGE_SIZE % BLOCK_N == 0
    wait_for_earlier(DEPENDENT)
    kv_head = tl.program_id(0)
    item = work + WORK_FIELDS * tl.program_id(1)
    segment = tl.load(item)
    if segment < 0:
        return
    first_query = tl.load(item + 1)
    split = tl.load(item + 2)
    num_splits = tl.load(item + 3)
    split_keys = tl.load(item + 4)
    first_slot = tl.load(item + 5)
    first_row = tl.load(segments + SEGMENT_FIELDS * segment)
    start = tl.load(segments + SEGMENT_FIELDS * segment + 1)
    length = tl.load(segments + SEGMENT_FIELDS * segment + 2)
    if first_query >= length:
        return
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
    # The list was made for as many keys as the segment might come to have: the last split takes the rest.
    first_block = tl.cdiv(split * split_keys, BLOCK_N)
    end_block = tl.minimum(tl.cdiv((split + 1) * split_keys, BLOCK_N), num_blocks)
    end_block = tl.where(split == num_splits - 1, num_blocks, end_block)
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
    to = output + (row * NUM_HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
    if num_splits == 1:
        tl.store(to, sums.to(output.dtype.element_ty), mask=is_element)
    else:
        own_row = ((first_slot + split) * NUM_KV_HEADS + kv_head) * BLOCK_M + tile_row
        tl.store(log_sums + own_row, largest + tl.log2(total_weight), mask=is_row)
        tl.store(partial + own_row[:, None] * HEAD_DIM + dim[None, :], sums, mask=is_element)
        tl.debug_barrier()  # all threads have stored before one of them says so
        counter = num_done + first_slot * NUM_KV_HEADS + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel") == num_splits - 1:
            tl.store(counter, 0)
            merged = _merge(
                partial, log_sums, (first_slot * NUM_KV_HEADS + kv_head) * BLOCK_M, num_splits, is_row,
                is_element, NUM_KV_HEADS * BLOCK_M, HEAD_DIM, BLOCK_M, BLOCK_D, PARTS_AT_ONCE,
            )  # fmt: skip
            tl.store(to, merged.to(output.dtype.element_ty), mask=is_element)


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
def _merge(
    partial,
    log_sums,
    first_row,
    num_splits,
    is_row,
    is_element,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS_AT_ONCE: tl.constexpr,
):
    """Merges a tile's parts, in their order: sum_s 2^(l_s - l) partial_s, with l the log2 of the sum of the
    2^l_s -> [BLOCK_M, BLOCK_D]."""
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total_weight = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tile_row = first_row + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    for first in range(0, num_splits, PARTS_AT_ONCE):
        for step in tl.static_range(PARTS_AT_ONCE):
            split = first + step
            row = tile_row + split * STRIDE
            is_part = split < num_splits
            log_sum = tl.load(
                log_sums + row, mask=is_row & is_part, other=float("-inf"), cache_modifier=".cg"
            )
            part = tl.load(
                partial + row[:, None] * HEAD_DIM + dim[None, :],
                mask=is_element & is_part,
                other=0.0,
                cache_modifier=".cg",
            )
            new_largest = tl.maximum(largest, log_sum)
            offset = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            decay = tl.exp2(largest - offset)
            weight = tl.exp2(log_sum - offset)
            total_weight = total_weight * decay + weight
            sums = sums * decay[:, None] + part * weight[:, None]
            largest = new_largest
    return sums / tl.where(total_weight > 0, total_weight, 1.0)[:, None]


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
