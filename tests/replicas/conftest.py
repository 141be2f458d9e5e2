"""Kernels run in Triton's interpreter where there is no GPU; that must be said before they are imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
