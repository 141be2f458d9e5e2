"""The memory that K/V pages take where nobody has said how much: a share of what the machine has left."""

import torch

from replicas.machine import available_bytes
from replicas.model.checkpoint import CheckpointError

CPU_SHARE = 4
"""One part in this many of a CPU's free memory goes to pages: the rest is other programs' too."""
MIN_CPU_BYTES, MAX_CPU_BYTES = 256 << 20, 4 << 30
RESERVED_FOR_STEPS = 2 << 30
"""Bytes of a GPU left for activations, logits, graphs and libraries."""
_GIB = 1 << 30


def cpu_budget_bytes(weights_bytes: int, num_sharing: int) -> int:
    """The bytes for the pages of one of num_sharing alike processes, before any has loaded its weights."""
    left = available_bytes() // num_sharing - weights_bytes
    return min(max(left // CPU_SHARE, MIN_CPU_BYTES), MAX_CPU_BYTES)


def device_budget_bytes(device: torch.device, share: float) -> int:
    """The bytes of a device that are left for pages, its weights loaded: at least 0.

    share: the part of the device, at most 1, that is this process's
    """
    if device.type != "cuda":
        return MIN_CPU_BYTES
    free, total = torch.cuda.mem_get_info(device)
    return max(0, left_for_pages(free, total, torch.cuda.memory_reserved(device), share))


def left_for_pages(free: int, total: int, taken: int, share: float) -> int:
    """The bytes for pages, of a device's `free` and `total` ones, of which this process has `taken` some;
    below 0 where not even steps have room."""
    return min(free, int(share * total) - taken) - RESERVED_FOR_STEPS


def check_pool(pool_bytes: int, left_bytes: int) -> None:
    """Raises CheckpointError where pages of so many bytes don't fit."""
    if pool_bytes > left_bytes:
        raise CheckpointError(
            f"{pool_bytes / _GIB:.1f} GiB of K/V pages do not fit the device, which has "
            f"{left_bytes / _GIB:.1f} GiB beside the weights and the {RESERVED_FOR_STEPS / _GIB:.0f} GiB for "
            f"its steps: lower kv_cache_mb, or leave it out to take what there is"
        )
