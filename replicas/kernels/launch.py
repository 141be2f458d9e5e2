"""Helpers that launchers share: the interpreter's limits, block sizes, how many programs fill a device."""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

_INTERPRETED_SMS = 1
_DEPENDENT_SINCE = (9, 0)
"""The first compute capability with programmatic dependent launch."""
_LINE_BYTES = tl.constexpr(128)
_PREFETCHED_BYTES = tl.constexpr(64 << 10)
"""Of the weights of one program. All programs of a launch that a device holds ask for some 10 MB, what an
H200 reads in 2 us, and a fifth of its L2 cache."""


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
    """The shared memory that a block may have; 0 where there is no GPU."""
    if device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def splits_to_fill(num_programs: int, device: torch.device, max_splits: int) -> int:
    """The number of parts, a power of two up to `max_splits`, into which to split each program's work: for
    two programs a streaming multiprocessor."""
    wanted = 2 * num_sms(device) // max(num_programs, 1)
    return min(max_splits, 1 << max(wanted, 1).bit_length() - 1)


@cache
def has_dependent_launch(device: torch.device) -> bool:
    """True if a kernel can begin there before the one before it has ended."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= _DEPENDENT_SINCE


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Launch options of kernels that begin with `wait_for_earlier`; what `DEPENDENT` is to them."""
    is_dependent = has_dependent_launch(device)
    return {"DEPENDENT": True, "launch_pdl": True} if is_dependent else {"DEPENDENT": False}


@triton.jit
def wait_for_earlier(DEPENDENT: tl.constexpr):
    """Waits until all earlier kernels have ended and what they wrote can be seen.

    A kernel launched as a dependent (programmatic dependent launch) may begin while the one before it runs,
    once all programs of that have passed this point. So every program of it, whatever else it does, comes
    here first, before it reads or writes any memory: then by induction no two kernels ever work at once.
    Weights alone may be asked for before (`prefetch_weights`).
    """
    if DEPENDENT:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def prefetch_weights(
    weight, column, NUM_COLUMNS: tl.constexpr, SIZE: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Has the first of the weights [NUM_COLUMNS, SIZE] of some columns brought to the L2 cache, where all
    of a device see the same; nothing is read by it."""
    STEP: tl.constexpr = _LINE_BYTES // (weight.dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = _PREFETCHED_BYTES // (BLOCK_COLUMNS * _LINE_BYTES)
    row = tl.minimum(column, NUM_COLUMNS - 1).to(tl.int64)
    inner = tl.minimum(tl.arange(0, LINES) * STEP, SIZE - 1)
    at = weight + row[:, None] * SIZE + inner[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
