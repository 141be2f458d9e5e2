"""Attention of ragged segments over paged keys and values: the signature, and the CPU behind it.

A backend plans a step once (which order to pack the segments in, what to gather, what to mask) and
then runs every layer by the plan. Keys and values of all tokens, causal or not, are stored to their
pages first; then every query reads from the pages positions 0 to its own (causal) or to its segment's
last (bidirectional).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from replicas.engine.batch import Segment
from replicas.model.kv_cache import KvCache

_FREE_PADDING_ROWS = 512


@dataclass(frozen=True, slots=True)
class Group:
    """Segments of alike lengths, padded to one shape: S segments of Q queries over L keys."""

    num_segments: int
    num_queries: int
    num_keys: int
    first_row: int
    """The group's first packed row."""
    num_rows: int
    """The group's packed rows, padding not counted."""
    blocks: torch.Tensor
    """The blocks to gather: KvCache.gather_blocks of the group's page table [S, P]."""
    mask: torch.Tensor | None
    """Added to the scores: [S, 1, Q * heads per kv head, L], or [S, 1, 1, L] if Q is 1; None hides no key."""
    pad: torch.Tensor | None
    """[S * Q], the group's row that fills each padded query; None if no query is padded."""
    unpad: torch.Tensor | None
    """[num_rows], the padded rows that are real; None if no query is padded."""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step's attention, laid out once for all layers."""

    order: tuple[int, ...]
    """Segment indices in the order in which their tokens are packed into rows."""
    positions: torch.Tensor
    """[T] int64, the position of each packed row."""
    store_rows: torch.Tensor
    """KvCache.store_rows of the packed rows."""
    groups: tuple[Group, ...]


class Attention(Protocol):
    """One device's attention over one KvCache."""

    def plan(self, segments: Sequence[Segment]) -> AttentionPlan:
        """The plan that all layers of one step share."""
        ...

    def __call__(
        self, layer: int, queries: torch.Tensor, keys_values: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor:
        """Stores the keys and values to their pages, then attends -> [T, heads * head_dim].

        queries: [T, heads, head_dim], heads ordered (query of a kv head, kv head)
        keys_values: [T, 2 * kv_heads, head_dim], keys first
        """
        ...


class CpuAttention:
    """Gathers pages and runs one padded product a group; no loop over sequences inside a layer."""

    def __init__(self, cache: KvCache, num_heads: int):
        self._cache = cache
        self._num_heads = num_heads
        self._queries_per_kv = num_heads // cache.num_kv_heads

    def plan(self, segments: Sequence[Segment]) -> AttentionPlan:
        page_size = self._cache.page_size
        lengths = [len(segment.token_ids) for segment in segments]
        num_keys = [segment.start + length for segment, length in zip(segments, lengths, strict=True)]
        members = _group(lengths, num_keys)
        order = tuple(chain.from_iterable(members))
        packed_lengths = np.array([lengths[index] for index in order])
        starts = np.array([segments[index].start for index in order])
        ends = packed_lengths.cumsum()
        segment_of_row = np.repeat(np.arange(len(order)), packed_lengths)
        positions = np.arange(ends[-1]) - (ends - packed_lengths - starts)[segment_of_row]

        num_pages = [-(-num_keys[index] // page_size) for index in order]
        table = np.zeros((len(order), max(num_pages)), dtype=np.int64)
        for row, index in enumerate(order):
            table[row, : num_pages[row]] = segments[index].pages[: num_pages[row]]
        row_pages = torch.from_numpy(table[segment_of_row, positions // page_size])
        store_rows = self._cache.store_rows(row_pages, torch.from_numpy(positions % page_size))

        groups = []
        first = first_row = 0
        for indices in members:
            part = slice(first, first + len(indices))
            num_causal = np.array([segments[index].num_causal for index in indices])
            group = self._plan_group(first_row, starts[part], packed_lengths[part], num_causal, table[part])
            groups.append(group)
            first, first_row = part.stop, first_row + group.num_rows
        return AttentionPlan(order, torch.from_numpy(positions), store_rows, tuple(groups))

    def _plan_group(
        self,
        first_row: int,
        starts: np.ndarray,
        lengths: np.ndarray,
        num_causal: np.ndarray,
        table: np.ndarray,
    ) -> Group:
        """The group of S segments whose rows begin at first_row.

        starts, lengths, num_causal: [S]; table: [S, pages]
        """
        num_segments, num_queries, num_rows = len(lengths), int(lengths.max()), int(lengths.sum())
        totals = starts + lengths
        num_keys = int(totals.max())
        table = table[:, : -(-num_keys // self._cache.page_size)]
        # A padded query repeats its segment's last one, so its scores are finite; its output is dropped.
        query = np.minimum(np.arange(num_queries), lengths[:, None] - 1)
        pad = unpad = None
        if num_rows < num_segments * num_queries:
            first = lengths.cumsum() - lengths
            pad = torch.from_numpy((first[:, None] + query).ravel())
            real = np.arange(num_queries) < lengths[:, None]
            unpad = torch.from_numpy(np.flatnonzero(real))
        visible = np.where(query < num_causal[:, None], starts[:, None] + query + 1, totals[:, None])
        return Group(
            num_segments=num_segments,
            num_queries=num_queries,
            num_keys=num_keys,
            first_row=first_row,
            num_rows=num_rows,
            blocks=self._cache.gather_blocks(torch.from_numpy(table)),
            mask=self._mask(visible, num_keys),
            pad=pad,
            unpad=unpad,
        )

    def _mask(self, visible: np.ndarray, num_keys: int) -> torch.Tensor | None:
        """Hides from each query the keys past its first `visible` [S, Q]; None if none is hidden."""
        if visible.min() == num_keys:
            return None
        if visible.shape[1] > 1:
            visible = visible.repeat(self._queries_per_kv, axis=1)
        hidden = torch.arange(num_keys) >= torch.from_numpy(visible)[:, None, :, None]
        dtype = self._cache.layers[0].dtype
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))

    def __call__(
        self, layer: int, queries: torch.Tensor, keys_values: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor:
        self._cache.store(layer, keys_values, plan.store_rows)
        outputs = [self._run_group(layer, queries, group) for group in plan.groups]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _run_group(self, layer: int, queries: torch.Tensor, group: Group) -> torch.Tensor:
        """Attends one group's rows of queries [T, heads, head_dim] -> [num_rows, heads * head_dim]."""
        cache = self._cache
        rows = queries[group.first_row : group.first_row + group.num_rows]
        if group.pad is not None:
            rows = rows.index_select(0, group.pad)
        # All queries that share a kv head become rows of one product.
        shape = (group.num_segments, -1, cache.num_kv_heads, cache.head_dim)
        folded = rows.reshape(shape).transpose(1, 2)
        keys, values = cache.gather(layer, group.blocks, group.num_segments)[..., : group.num_keys, :]
        output = F.scaled_dot_product_attention(folded, keys, values, attn_mask=group.mask)
        output = output.transpose(1, 2).reshape(-1, self._num_heads * cache.head_dim)
        return output if group.unpad is None else output.index_select(0, group.unpad)


def _group(lengths: Sequence[int], num_keys: Sequence[int]) -> list[list[int]]:
    """Segment indices by group: alike in queries, then in keys, so that padding stays bounded.

    Lengths within a group are in one bucket (1; 2 to 8; 9 to 32; 33 to 64; then powers of two).
    Padded keys are at most half of the real ones, or few enough to cost less than another group.
    """
    by_bucket: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_bucket.setdefault(_bucket(length), []).append(index)
    groups = []
    for bucket in sorted(by_bucket):
        indices = sorted(by_bucket[bucket], key=lambda index: -num_keys[index])
        current: list[int] = []
        real = padding = 0
        for index in indices:
            gap = num_keys[current[0]] - num_keys[index] if current else 0
            if current and padding + gap > max(_FREE_PADDING_ROWS, real // 2):
                groups.append(current)
                current, real, padding, gap = [], 0, 0, 0
            current.append(index)
            real += num_keys[index]
            padding += gap
        groups.append(current)
    return groups


def _bucket(length: int) -> int:
    if length == 1:
        return 0
    for bound in (8, 32, 64):
        if length <= bound:
            return bound
    return 1 << (length - 1).bit_length()
