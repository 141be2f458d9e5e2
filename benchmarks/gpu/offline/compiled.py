"""A kernel compiled for a GPU, and what its code says of itself."""

import contextlib
import io
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import triton
from triton.compiler import ASTSource

from benchmarks.gpu.offline.devices import Device
from benchmarks.gpu.offline.trace import Variant

_WAIT = "griddepcontrol.wait"
_NOT_BEFORE = re.compile(
    r"^\s*(?:@!?%p\d+\s+)?((?:ld(?!\.param|\.shared)|st(?!\.shared)|atom|red|cp|bra|brx|ret|exit|call)\b[.\w:]*)",
    re.MULTILINE,
)
"""Instructions of PTX that read or write memory that others see, or may lead past the wait."""
_TENSOR_CORES = {"wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma", "mma": r"\bmma\.sync"}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one variant takes of one device; zeros where it does not compile."""

    label: str
    error: str = ""
    """The reason why it does not compile."""
    registers: int = 0
    """A thread's."""
    spilled_bytes: int = 0
    """A thread's stores of registers to memory; on AMD the registers themselves, times 4."""
    shared_bytes: int = 0
    """A block's."""
    num_resident: int = 0
    """Blocks that an SM holds."""
    tensor_cores: str = ""
    """The kind of instruction that multiplies; empty for none."""
    is_dependent: bool = False
    """True if it may begin before the kernel before it has ended."""
    unordered: str = ""
    """What keeps that from being safe."""


def compile_variant(variant: Variant, device: Device) -> Compiled:
    """Compiles it anew: of a kernel from Triton's cache the assembler's log is gone."""
    source = ASTSource(variant.function, variant.signature, variant.constants, variant.attributes)
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            made = triton.compile(source, target=device.target, options=dict(variant.options))
    except Exception as error:  # whatever a backend raises is what there is to say
        return Compiled(variant.label, error=_last_line(error))
    metadata = made.metadata
    if device.target.backend == "cuda":
        text = log.getvalue()
        registers, spilled = (
            _number(r"Used (\d+) registers", text),
            _number(r"(\d+) bytes spill stores", text),
        )
        kinds = [name for name, pattern in _TENSOR_CORES.items() if re.search(pattern, made.asm["ptx"])]
    else:
        text = made.asm["amdgcn"]
        registers, spilled = (
            _number(r"\.vgpr_count:\s+(\d+)", text),
            4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text),
        )
        kinds = ["mfma"] if re.search(r"\bv_mfma_", text) else []
    shared = int(metadata.shared)
    is_dependent = bool(variant.options.get("launch_pdl"))
    tensor_memory = int(getattr(metadata, "tmem_size", 0) or 0)
    return Compiled(
        label=variant.label,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=shared,
        num_resident=device.num_resident(registers, shared, metadata.num_warps, tensor_memory),
        tensor_cores="+".join(kinds),
        is_dependent=is_dependent,
        unordered=disorder(made.asm.get("ptx", ""), is_dependent),
    )


def disorder(ptx: str, is_dependent: bool) -> str:
    """What is wrong with where a kernel waits for those before it (replicas.kernels.launch); empty for
    nothing.

    Launched as a dependent, each thread of it must wait, and before that neither read nor write what others
    see: so up to the wait there is no branch, and no access but to its arguments and to what is its own.
    """
    num_waits = ptx.count(_WAIT)
    if num_waits != is_dependent:
        return f"waits {num_waits} times for the kernel before it, not {int(is_dependent)}"
    before = ptx[ptx.find("{", ptx.find(".entry")) : ptx.find(_WAIT)] if is_dependent else ""
    found = _NOT_BEFORE.search(before)
    return f"{found[1]} before it waits" if found else ""


def one_of_each(variants: list[Variant]) -> list[Variant]:
    """Of the variants that are alike the one of the most parts, its pointers the most aligned."""
    chosen: dict[str, Variant] = {}
    for variant in sorted(variants, key=lambda item: (item.name, -item.num_splits, item.num_unaligned)):
        chosen.setdefault(variant.key, variant)
    return list(chosen.values())


def excess(found: Compiled, device: Device, budget: dict[str, Any] | None) -> list[str]:
    """What is wrong with it: does not compile, can't be launched, or takes more than its budget.

    budget: {"registers", "spilled_bytes", "shared_bytes": at most, "num_resident": at least, "tensor_cores",
    "is_dependent"}
    """
    name = f"{device.name}: {found.label}"
    if found.error:
        return [f"{name} does not compile: {found.error}"]
    if not found.num_resident:
        return [f"{name} takes {found.shared_bytes} B of shared memory of {device.block_shared_bytes}"]
    if found.unordered:
        return [f"{name}: {found.unordered}"]
    if budget is None:
        return [f"{name} has no budget: --write-budget"]
    wrong = [
        f"{name}: {what} {getattr(found, what)}, at most {budget[what]}"
        for what in ("registers", "spilled_bytes", "shared_bytes")
        if getattr(found, what) > budget[what]
    ]
    if found.num_resident < budget["num_resident"]:
        wrong.append(f"{name}: {found.num_resident} blocks an SM, at least {budget['num_resident']}")
    if found.tensor_cores != budget["tensor_cores"]:
        wrong.append(f"{name}: multiplies by {found.tensor_cores!r}, not {budget['tensor_cores']!r}")
    if found.is_dependent != budget["is_dependent"]:
        wrong.append(f"{name}: launched as a dependent: {found.is_dependent}, not {budget['is_dependent']}")
    return wrong


def budget_of(found: list[Compiled]) -> dict[str, dict[str, Any]]:
    """The budget, by label, that these just keep."""
    budget: dict[str, dict[str, Any]] = {}
    for label in sorted({item.label for item in found}):
        same = [item for item in found if item.label == label and not item.error]
        if same:
            kinds = Counter(item.tensor_cores for item in same)
            budget[label] = {
                "registers": max(item.registers for item in same),
                "spilled_bytes": max(item.spilled_bytes for item in same),
                "shared_bytes": max(item.shared_bytes for item in same),
                "num_resident": min(item.num_resident for item in same),
                "tensor_cores": kinds.most_common(1)[0][0],
                "is_dependent": all(item.is_dependent for item in same),
            }
    return budget


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _last_line(error: Exception) -> str:
    cause = error.__cause__
    text = str(cause if cause is not None and str(cause).strip() else error).strip()
    return f"{type(error).__name__}: {text.splitlines()[-1][:200] if text else ''}"
