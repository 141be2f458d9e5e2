"""Products with weights in 8 bits, against their definitions in float64."""

import pytest
import torch

from replicas.kernels.normed_product import CODES, Norm, decoded, encoded
from replicas.kernels.project import project, project_reference
from replicas.kernels.project_gated import project_gated, project_gated_reference
from replicas.kernels.project_qkv import project_qkv, project_qkv_reference
from replicas.kernels.store_kv import Rotation
from tests.replicas.kernels.cases import DEVICE, DTYPES, ON_GPU, TOLERANCES, normal


def codes(num_columns: int, size: int, seed: int = 2, kind: str = "fp8") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of very different sizes, so that each needs its own scale."""
    sizes = 10 ** torch.linspace(-2, 0, num_columns, device=DEVICE)
    weight = normal(num_columns, size, seed=seed, scale=size**-0.5) * sizes[:, None]
    return encoded(weight, CODES[kind])


def check(
    num_rows: int,
    size: int,
    num_columns: int,
    dtype: torch.dtype,
    *,
    kind: str = "fp8",
    biased: bool = False,
) -> None:
    x = normal(num_rows, size, dtype=dtype)
    weight, scales = codes(num_columns, size, kind=kind)
    bias = normal(num_columns, dtype=dtype, seed=3) if biased else None
    before = normal(num_rows, num_columns, dtype=dtype, seed=4)
    expected = project_reference(x, weight, scales, bias)
    tolerance = 4 * TOLERANCES[dtype]
    into, residual = before.clone(), before.clone()
    for found, wanted in (
        (project(x, weight, scales, bias), expected),
        (project(x, weight, scales, bias, out=into), expected),
        (project(x, weight, scales, bias, add_to=residual), expected + before.double()),
    ):
        torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 16])
def test_projects_by_weights_that_are_no_codes(dtype: torch.dtype, num_rows: int) -> None:
    x, weight = normal(num_rows, 300, dtype=dtype), normal(70, 300, dtype=dtype, seed=1, scale=300**-0.5)
    residual = normal(num_rows, 70, dtype=dtype, seed=2)
    expected = residual.double() + project_reference(x, weight, None)
    found = project(x, weight, None, add_to=residual)
    tolerance = 4 * TOLERANCES[dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [7, 70])
@pytest.mark.parametrize("kind", list(CODES))
def test_projects(dtype: torch.dtype, num_rows: int, kind: str) -> None:
    check(num_rows, 300, 80, dtype, kind=kind)


@pytest.mark.parametrize(("num_rows", "size", "num_columns"), [(1, 33, 5), (64, 40, 17), (129, 40, 33)])
@pytest.mark.parametrize("kind", list(CODES))
def test_odd_shapes(num_rows: int, size: int, num_columns: int, kind: str) -> None:
    check(num_rows, size, num_columns, torch.float32, kind=kind, biased=True)


def test_no_rows() -> None:
    check(0, 64, 32, torch.float32)


@pytest.mark.parametrize("kind", list(CODES))
def test_codes_are_near_the_weights_whatever_their_size(kind: str) -> None:
    weight = normal(40, 64) * 10 ** torch.linspace(-6, 3, 40, device=DEVICE)[:, None]
    weight[7] = 0.0
    found = decoded(*encoded(weight, CODES[kind]))
    largest = weight.abs().amax(1, keepdim=True)
    most = weight.abs() / 16 + largest / 448 if kind == "fp8" else largest / 253
    assert ((found - weight).abs() <= most).all()
    assert (found[7] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(CODES))
def test_the_fused_products_decode_too(dtype: torch.dtype, kind: str) -> None:
    size, width, num_heads, num_kv_heads, head_dim, page_size = 72, 40, 4, 2, 16, 8
    x, norm = normal(6, size, dtype=dtype, scale=3.0), Norm(normal(size, dtype=dtype, seed=1), 1e-5)
    tolerance = 4 * TOLERANCES[dtype]
    weight, scales = codes(2 * width, size, kind=kind)
    found = project_gated(x, norm, weight, scales)
    expected = project_gated_reference(x, norm, weight, scales)
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)

    weight, scales = codes((num_heads + 2 * num_kv_heads) * head_dim, size, seed=5, kind=kind)
    cache = torch.zeros(2, 2, num_kv_heads, page_size, head_dim, dtype=dtype, device=DEVICE)
    positions = torch.arange(6, dtype=torch.int32, device=DEVICE)
    angles = torch.arange(6 * head_dim // 2, device=DEVICE).view(6, -1) / 7
    phases = torch.stack((angles.cos(), angles.sin()), -1).flatten(1).contiguous()
    rest = (positions, positions, Rotation(phases, None))
    queries, stored = project_qkv_reference(x, norm, weight, None, cache, *rest, None, scales)
    found = project_qkv(x, norm, weight, None, cache, *rest, None, scales)
    torch.testing.assert_close(found.double(), queries, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(cache.double(), stored, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(not ON_GPU, reason="full shapes need a GPU")
@pytest.mark.parametrize("num_rows", [1, 16, 32, 64, 300])
@pytest.mark.parametrize("kind", list(CODES))
def test_full_shapes(num_rows: int, kind: str) -> None:
    check(num_rows, 4096, 14336, torch.bfloat16, kind=kind)
