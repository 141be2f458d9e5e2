"""SwiGLU against its definition in float64."""

import pytest
import torch

from replicas.kernels.swiglu import swiglu, swiglu_reference
from tests.replicas.kernels.cases import DTYPES, ON_GPU, assert_close, normal

SHAPES = [(1, 72), (5, 123), (2, 1500), *([(2048, 14336)] if ON_GPU else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = normal(shape[0], 2 * shape[1], dtype=dtype, scale=2.0)
    assert_close(swiglu(gate_up), swiglu_reference(gate_up), dtype)


def test_far_gates() -> None:
    gate_up = torch.tensor([[-1e4, 1e4, 2.0, 2.0]], device=normal(1).device)
    assert swiglu(gate_up).tolist() == [[0.0, 2e4]]


def test_no_rows() -> None:
    assert swiglu(normal(0, 8)).shape == (0, 4)
