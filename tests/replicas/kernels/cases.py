"""Devices, tolerances and inputs of the kernels' tests: small in the interpreter, full-sized on a GPU."""

from collections.abc import Sequence

import numpy as np
import torch

from replicas.kernels.attention import TILE_SHAPES, WORK_FIELDS, Scratch, Work
from replicas.kernels.tiling import work_of

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def generator(seed: int) -> torch.Generator:
    return torch.Generator(device=DEVICE).manual_seed(seed)


def normal(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0
) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE, generator=generator(seed)) * scale).to(dtype)


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Within the dtype's own tolerance, relative to 1 or to the value."""
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found.double(), expected.double(), atol=tolerance, rtol=tolerance)


def segment_table(
    starts: Sequence[int], lengths: Sequence[int], num_causal: Sequence[int], page_size: int
) -> torch.Tensor:
    """[S, 5] int32, with the segments' pages one after the other."""
    first_row = np.cumsum([0, *lengths])[:-1]
    num_pages = [-(-(start + length) // page_size) for start, length in zip(starts, lengths, strict=True)]
    first_page = np.cumsum([0, *num_pages])[:-1]
    rows = np.stack([first_row, starts, lengths, num_causal, first_page], 1)
    return torch.from_numpy(rows.astype(np.int32)).to(DEVICE)


def make_work(
    starts: Sequence[int],
    lengths: Sequence[int],
    num_causal: Sequence[int],
    queries_per_kv: int,
    num_places: int,
    padding: int = 0,
) -> list[Work]:
    """Split for so many places of each shape: 1 for not at all, many for the shortest splits."""
    places = [num_places] * len(TILE_SHAPES)
    groups = []
    for index, items in work_of(starts, lengths, num_causal, queries_per_kv, places).items():
        padded = np.concatenate([items, np.full((padding, WORK_FIELDS.value), -1, dtype=np.int32)])
        groups.append(Work(TILE_SHAPES[index], torch.from_numpy(padded).to(DEVICE)))
    return groups


def make_scratch(num_places: int, num_kv_heads: int, head_dim: int) -> Scratch:
    scratch = Scratch.allocate([num_places] * len(TILE_SHAPES), num_kv_heads, head_dim, DEVICE)
    scratch.partial.fill_(torch.nan)
    scratch.log_sums.fill_(torch.nan)
    return scratch
