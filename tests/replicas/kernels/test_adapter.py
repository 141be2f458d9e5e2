"""The adapter on flagged rows against its definition in float64."""

import pytest
import torch

from replicas.kernels.adapter import add_adapter, add_adapter_reference
from tests.replicas.kernels.cases import DEVICE, DTYPES, ON_GPU, assert_close, normal

SHAPES = [
    # rows, in, out, rank, flagged
    (9, 40, 56, 6, [0, 8, 3]),
    (20, 300, 130, 66, [*range(1, 18), -1, -1]),
    (5, 123, 123, 128, []),
    (1, 33, 17, 3, [0]),
    (3, 32, 32, 16, [-1, -1, 2]),
    *([(2048, 4096, 4096, 128, list(range(0, 2048, 3)))] if ON_GPU else []),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape[:4]))
def test_adapter(shape: tuple[int, int, int, int, list[int]], dtype: torch.dtype) -> None:
    num_rows, size_in, size_out, rank, flagged = shape
    x = normal(num_rows, size_in, dtype=dtype)
    y = normal(num_rows, size_out, dtype=dtype, seed=1)
    down = normal(rank, size_in, dtype=dtype, seed=2, scale=size_in**-0.5)
    up = normal(size_out, rank, dtype=dtype, seed=3, scale=rank**-0.5)
    rows = torch.tensor(flagged, dtype=torch.int32, device=DEVICE)
    expected = add_adapter_reference(y, x, down, up, rows)
    before = y.clone()
    add_adapter(y, x, down, up, rows)
    assert_close(y, expected, dtype)
    unflagged = [row for row in range(num_rows) if row not in flagged]
    assert y[unflagged].equal(before[unflagged])
