"""Kernels run in Triton's interpreter where there is no GPU; that must be said before they are imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Takes back the threads that a runner of the test before has set, for the whole process: on more than
    one, tiny models wait for each other's threads most of the time."""
    torch.set_num_threads(1)
