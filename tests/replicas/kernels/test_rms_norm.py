"""RMSNorm, with and without a residual, against its definition in float64."""

import pytest
import torch

from replicas.kernels.rms_norm import rms_norm, rms_norm_reference
from tests.replicas.kernels.cases import DTYPES, ON_GPU, assert_close, normal

SHAPES = [(1, 40), (5, 123), (3, 1024), *([(2048, 4096), (33, 5120)] if ON_GPU else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, with_residual: bool) -> None:
    x, weight = normal(*shape, dtype=dtype, scale=3.0), normal(shape[1], dtype=dtype, seed=1)
    residual = normal(*shape, dtype=dtype, seed=2) if with_residual else None
    expected, total = rms_norm_reference(x, weight, 1e-5, residual)
    before = x.clone()
    y = rms_norm(x, weight, 1e-5, residual)
    assert x.equal(before)
    # The row is rounded to the dtype once before the weight and once after, so twice the tolerance.
    assert_close(y / 2, expected / 2, dtype)
    if residual is not None:
        assert_close(residual, total, dtype)


def test_eps_keeps_a_row_of_zeros_finite() -> None:
    assert rms_norm(normal(2, 16) * 0, normal(16), 1e-6).eq(0).all()


def test_no_rows() -> None:
    assert rms_norm(normal(0, 16), normal(16), 1e-6).shape == (0, 16)
