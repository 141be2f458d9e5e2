"""The attention kernel against its definition in float64."""

import itertools
from collections.abc import Sequence
from random import Random

import pytest
import torch

from replicas.kernels.attention import (
    TILE_SHAPES,
    queries_per_tile,
    ragged_paged_attention,
    ragged_paged_attention_reference,
)
from tests.replicas.kernels.cases import (
    DEVICE,
    DTYPES,
    ON_GPU,
    assert_close,
    make_scratch,
    make_work,
    normal,
    poison,
    segment_table,
)

Kind = tuple[int, int, int]  # start, length, num_causal

MIXED: list[Kind] = [
    (0, 1, 1), (70, 1, 1), (0, 5, 0), (130, 7, 7), (62, 3, 0), (57, 12, 5), (0, 0, 0), (3, 19, 19),
]  # fmt: skip


def check(
    kinds: Sequence[Kind],
    *,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    num_places: int = 1,
    padding: int = 0,
    num_reserved: int = 0,
    pages: Sequence[int] | None = None,
    seed: int = 0,
) -> None:
    """num_reserved: keys that the work was planned for and that did not come to be"""
    starts, lengths, num_causal = zip(*kinds, strict=True)
    num_keys = [start + length for start, length in zip(starts, lengths, strict=True)]
    num_rows = sum(lengths)
    used = sum(-(-keys // page_size) for keys in num_keys)
    num_pages = used + 3
    if pages is None:
        order = torch.randperm(num_pages - 1, generator=torch.Generator().manual_seed(seed))
        pages = order.tolist()[:used]
    table = torch.tensor(pages, dtype=torch.int32, device=DEVICE)
    cache = normal(num_pages, 2, num_kv_heads, page_size, head_dim, dtype=dtype, seed=seed)
    scales = None
    if cache_dtype is not None:
        cache = cache.to(cache_dtype)
        scales = torch.tensor([[0.5 + k for k in range(num_kv_heads)]] * 2, device=DEVICE)
        scales[1] *= 1.5
    else:
        _poison_unused(cache, pages, num_keys)
    qkv = normal(num_rows, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, seed=seed + 1)
    queries = qkv[:, :num_heads]
    segments = segment_table(starts, lengths, num_causal, page_size)
    planned = [start + num_reserved for start in starts]
    work = make_work(planned, lengths, num_causal, num_heads // num_kv_heads, num_places, padding)
    scratch = make_scratch(num_places, num_kv_heads, head_dim)
    expected = ragged_paged_attention_reference(queries, cache, segments, table, scales)
    for _ in range(2):  # each launch leaves the scratch as the next needs it
        output = poison(num_rows, num_heads, head_dim, dtype=dtype)
        ragged_paged_attention(queries, cache, output, segments, table, work, scratch, scales)
        assert_close(output, expected, dtype)


def _poison_unused(cache: torch.Tensor, pages: Sequence[int], num_keys: Sequence[int]) -> None:
    """NaN wherever no segment's keys are: in an unused page, and in the rest of each last page."""
    page_size = cache.shape[3]
    used = torch.zeros(len(cache), page_size, dtype=torch.bool)
    remaining = iter(pages)
    for keys in num_keys:
        for first in range(0, keys, page_size):
            used[next(remaining), : min(page_size, keys - first)] = True
    cache.permute(0, 3, 1, 2, 4)[~used.to(cache.device)] = torch.nan


@pytest.mark.parametrize(("dtype", "num_places"), [*((dtype, 1) for dtype in DTYPES), (torch.bfloat16, 64)])
def test_mixed_segments(dtype: torch.dtype, num_places: int) -> None:
    check(MIXED, dtype=dtype, num_places=num_places, padding=2)


@pytest.mark.parametrize(
    ("head_dim", "page_size"), [(32, 128), (64, 16), (96, 32), (128, 64), (12, 5), (64, 1)]
)
def test_head_dims_and_page_sizes(head_dim: int, page_size: int) -> None:
    kinds = [(67, 4, 0), (150, 1, 1)]
    check(kinds, num_heads=3, num_kv_heads=1, head_dim=head_dim, page_size=page_size, num_places=64)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (8, 8), (8, 1), (40, 2), (15, 3)])
def test_head_groups(num_heads: int, num_kv_heads: int) -> None:
    kinds = [(9, 1, 1), (66, 2, 0)]
    check(kinds, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=16, page_size=16)


def test_prefill_chunk_of_hundreds() -> None:
    check([(40, 150, 150)], num_heads=2, num_kv_heads=1, head_dim=16, page_size=32)


@pytest.mark.parametrize("num_reserved", [-120, 0, 300])
def test_splits_where_keys_are_more_or_fewer_than_planned(num_reserved: int) -> None:
    """Some splits have no keys at all, some rows see none in a split that others have keys in."""
    kinds = [(121, 1, 1), (126, 5, 5), (250, 2, 0), (700, 1, 1), (130, 90, 3)]
    check(kinds, num_places=64, num_reserved=num_reserved, num_heads=2, num_kv_heads=1, head_dim=16)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("num_places", [3, 20])
def test_one_long_context_among_short_ones(page_size: int, num_places: int) -> None:
    """Steps of one token behind contexts about a page long, and one of thousands, which alone is split."""
    contexts = (1, page_size - 1, page_size, page_size + 1, 3100)
    kinds = [(context - 1, 1, 1) for context in contexts]
    check(kinds, num_places=num_places, page_size=page_size, num_heads=4, num_kv_heads=2, head_dim=16)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "page_size"), [(2, 1, 16), (3, 1, 5), (2, 2, 64)])
def test_borders_of_the_causal_part(num_heads: int, num_kv_heads: int, page_size: int) -> None:
    """Within a tile, at its ends, and between two."""
    per_tile = queries_per_tile(TILE_SHAPES[-1], num_heads // num_kv_heads)
    length = per_tile + 20
    borders = (1, 30, per_tile - 1, per_tile, per_tile + 1, length - 1)
    kinds = [(start, length, border) for start, border in zip((0, 71, 0, 33, 0, 100), borders, strict=True)]
    check(kinds, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=16, page_size=page_size)


@pytest.mark.parametrize("seed", range(6))
def test_random_kinds(seed: int) -> None:
    """Wholly causal, wholly bidirectional and both, in one batch."""
    random = Random(seed)
    kinds: list[Kind] = []
    for _ in range(8):
        length = random.choice([1, 2, 7, 16, 33, 64])
        kinds.append((random.randrange(200), length, random.choice([0, length, random.randrange(length)])))
    num_kv_heads, group = random.choice([1, 2]), random.choice([1, 3, 4])
    check(
        kinds,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=16,
        page_size=random.choice([1, 5, 16, 64]),
        num_places=random.choice([1, 4, 64]),
        padding=1,
        seed=seed,
    )


def test_the_reference_of_a_commit_and_a_block_is_that_of_two_segments() -> None:
    start, border, length = 9, 6, 11
    cache, queries = normal(2, 2, 1, 16, 16), normal(length, 3, 16, seed=1)
    table = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    both = segment_table([start], [length], [border], 16)
    apart = torch.tensor([[0, start, border, border, 0], [border, start + border, length - border, 0, 0]])
    found, expected = (
        ragged_paged_attention_reference(queries, cache, segments, table) for segments in (both, apart)
    )
    torch.testing.assert_close(found, expected)


def test_large_scores_do_not_overflow() -> None:
    starts, lengths = [140], [3]
    table = torch.arange(9, dtype=torch.int32, device=DEVICE)
    cache = normal(9, 2, 1, 16, 16, scale=60.0)
    queries = normal(3, 2, 16, scale=60.0, seed=1)
    segments = segment_table(starts, lengths, lengths, 16)
    work = make_work(starts, lengths, lengths, 2, 64)
    output = poison(3, 2, 16)
    ragged_paged_attention(queries, cache, output, segments, table, work, make_scratch(64, 1, 16))
    expected = ragged_paged_attention_reference(queries, cache, segments, table)
    torch.testing.assert_close(output.double(), expected, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("order", ["falling", "shared", "far"])
def test_adversarial_page_tables(order: str) -> None:
    kinds = [(33, 4, 0), (50, 1, 1)]
    pages = {"falling": [6, 5, 4, 3, 2, 1, 0], "shared": [2, 4, 1, 2, 4, 0, 3], "far": [0, 6, 1, 5, 2, 4, 3]}
    check(kinds, pages=pages[order], head_dim=16)


def test_rows_of_no_tile_are_left_alone() -> None:
    """A CUDA graph has rows beyond those in use."""
    lengths = [2]
    table, cache = torch.tensor([1], dtype=torch.int32, device=DEVICE), normal(2, 2, 1, 16, 16)
    queries, segments = normal(4, 1, 16), segment_table([8], lengths, lengths, 16)
    output = poison(4, 1, 16)
    work = make_work([8], lengths, lengths, 1, 1, padding=3)
    ragged_paged_attention(queries, cache, output, segments, table, work, make_scratch(1, 1, 16))
    assert output[:2].isfinite().all()
    assert output[2:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_cache_with_scales(dtype: torch.dtype) -> None:
    check(MIXED[3:6], dtype=dtype, cache_dtype=torch.float8_e4m3fn, num_places=64)


@pytest.mark.skipif(not ON_GPU, reason="full shapes need a GPU")
@pytest.mark.parametrize(
    ("dtype", "head_dim", "page_size"),
    list(itertools.product((torch.float16, torch.bfloat16), (64, 96, 128), (16, 64, 128))),
)
def test_full_shapes(dtype: torch.dtype, head_dim: int, page_size: int) -> None:
    kinds: list[Kind] = [
        (4096, 1, 1),
        (16384, 1, 1),
        (800, 32, 0),
        (803, 32, 32),
        (1000, 511, 511),
        (600, 64, 32),
        (2, 300, 150),
    ]
    for num_places in (1, 64):
        shape = {"num_heads": 32, "num_kv_heads": 8, "head_dim": head_dim, "page_size": page_size}
        check(kinds, dtype=dtype, num_places=num_places, **shape)
