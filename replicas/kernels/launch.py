"""Helpers that launchers share: the interpreter's limits, block sizes, how many programs fill a device."""

from functools import cache

import torch
import triton
import triton.language as tl

_INTERPRETED_SMS = 1


def is_interpreted() -> bool:
    """True if kernels run in Python on CPU tensors (TRITON_INTERPRET=1 when they were first imported)."""
    return bool(triton.knobs.runtime.interpret)


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which tl.dot multiplies tensors of dtype; sums are float32 always.

    The interpreter holds bfloat16 as bare 16-bit integers and would multiply those.
    """
    if dtype is torch.bfloat16:
        return tl.float32 if is_interpreted() else tl.bfloat16
    return tl.float16 if dtype is torch.float16 else tl.float32


@cache
def num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def block_shared_bytes(device: torch.device) -> int:
    """The shared memory that a block may have."""
    if device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def splits_to_fill(num_programs: int, device: torch.device, max_splits: int) -> int:
    """The number of parts, a power of two up to `max_splits`, into which to split each program's work: for
    two programs a streaming multiprocessor."""
    wanted = 2 * num_sms(device) // max(num_programs, 1)
    return min(max_splits, 1 << max(wanted, 1).bit_length() - 1)
