"""Norm, projection, rotation and the write to pages in one pass, against their definitions in float64."""

import pytest
import torch

from replicas.kernels.normed_product import MAX_ROWS, Norm
from replicas.kernels.project_qkv import project_qkv, project_qkv_reference
from tests.replicas.kernels.cases import DEVICE, DTYPES, ON_GPU, TOLERANCES, normal
from tests.replicas.kernels.test_store_kv import NUM_POSITIONS, rotation


def check(
    num_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    size: int,
    dtype: torch.dtype,
    *,
    page_size: int = 8,
    biased: bool = False,
    scaled: bool = True,
    fp8: bool = False,
) -> None:
    x = normal(num_rows, size, dtype=dtype, scale=3.0)
    norm = Norm(normal(size, dtype=dtype, seed=1), 1e-5)
    num_columns = (num_heads + 2 * num_kv_heads) * head_dim
    weight = normal(num_columns, size, dtype=dtype, seed=2, scale=size**-0.5)
    bias = normal(num_columns, dtype=dtype, seed=3) if biased else None
    num_pages = num_rows // page_size + 3
    cache = normal(num_pages, 2, num_kv_heads, page_size, head_dim, dtype=dtype, seed=4)
    scales = None
    if fp8:
        cache = cache.to(torch.float8_e4m3fn)
        scales = 2.0 ** torch.arange(-1, 2 * num_kv_heads - 1, device=DEVICE).view(2, num_kv_heads)
    positions = torch.randint(0, NUM_POSITIONS, (num_rows,), device=DEVICE).int()
    slots = torch.randperm(num_pages * page_size, device=DEVICE)[:num_rows].int()
    slots[1::3] = -1
    given = (x, norm, weight, bias, cache, positions, slots, rotation(head_dim, scaled=scaled), scales)
    expected, stored = project_qkv_reference(*given)
    queries = project_qkv(*given)
    tolerance = 4 * TOLERANCES[dtype]
    torch.testing.assert_close(queries.double(), expected, atol=tolerance, rtol=tolerance)
    if fp8:
        tolerance = 0.13
    torch.testing.assert_close(cache.double(), stored, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_projects_rotates_and_stores(dtype: torch.dtype) -> None:
    check(7, 6, 2, 32, 200, dtype)


@pytest.mark.parametrize("num_rows", [1, 16, 17, 33, MAX_ROWS])
def test_numbers_of_rows(num_rows: int) -> None:
    check(num_rows, 3, 1, 16, 64, torch.float32, page_size=5, scaled=False)


@pytest.mark.parametrize(("head_dim", "size"), [(12, 33), (20, 7), (128, 300)])
def test_heads_and_sizes_that_are_no_powers_of_two(head_dim: int, size: int) -> None:
    check(3, 3, 1, head_dim, size, torch.float32, biased=True)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter rounds to fp8 without the carry")
def test_fp8_pages() -> None:
    check(6, 4, 2, 16, 64, torch.bfloat16, fp8=True)


def test_no_rows() -> None:
    check(0, 4, 2, 16, 64, torch.float32)


@pytest.mark.skipif(not ON_GPU, reason="full shapes need a GPU")
@pytest.mark.parametrize("num_rows", [1, 16, 32, MAX_ROWS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_full_shapes(dtype: torch.dtype, num_rows: int) -> None:
    check(num_rows, 32, 8, 128, 4096, dtype, page_size=64)
