"""Norm, both projections and the gate in one pass, against their definitions in float64."""

import pytest
import torch

from replicas.kernels.normed_product import MAX_ROWS, Norm
from replicas.kernels.project_gated import project_gated, project_gated_reference
from tests.replicas.kernels.cases import DTYPES, ON_GPU, TOLERANCES, normal


def check(num_rows: int, size: int, width: int, dtype: torch.dtype) -> None:
    x = normal(num_rows, size, dtype=dtype, scale=3.0)
    norm = Norm(normal(size, dtype=dtype, seed=1), 1e-5)
    weight = normal(2 * width, size, dtype=dtype, seed=2, scale=size**-0.5)
    found = project_gated(x, norm, weight)
    assert found.shape == (num_rows, width)
    tolerance = 4 * TOLERANCES[dtype]
    torch.testing.assert_close(
        found.double(), project_gated_reference(x, norm, weight), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_projects_and_gates(dtype: torch.dtype) -> None:
    check(7, 200, 100, dtype)


@pytest.mark.parametrize(
    ("num_rows", "size", "width"), [(1, 64, 96), (16, 33, 5), (33, 128, 64), (64, 40, 17)]
)
def test_odd_shapes(num_rows: int, size: int, width: int) -> None:
    check(num_rows, size, width, torch.float32)


def test_no_rows() -> None:
    check(0, 64, 32, torch.float32)


@pytest.mark.skipif(not ON_GPU, reason="full shapes need a GPU")
@pytest.mark.parametrize("num_rows", [1, 16, 32, MAX_ROWS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_full_shapes(dtype: torch.dtype, num_rows: int) -> None:
    check(num_rows, 4096, 14336, dtype)
