"""The cores and the memory of its machine that this process may use.

A container's share is in its control group, version 1 or 2, and in those above it as far as they can be seen;
the kernel's numbers for the whole machine do not tell of it. root: '/', or where a test has its files.
"""

import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
UNKNOWN = 1 << 62


def default_num_threads(num_sharing: int, root: Path = ROOT) -> int:
    """Threads for each of num_sharing processes that share the cores, at least 1: more threads than cores
    cost far more than idle cores."""
    return max(1, int(usable_cores(root) / num_sharing))


def usable_cores(root: Path = ROOT) -> float:
    """The cores that this process may run on, or the part of them that its control groups' quotas leave."""
    has_affinity = hasattr(os, "sched_getaffinity")  # on Linux
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min([float(cores), *_quotas(root)])


def processor(root: Path = ROOT) -> tuple[str, ...]:
    """The names of the processor and of any NVIDIA GPU, the processor's features, and the usable cores."""
    about = re.findall(r"^(?:model name|flags|Features)\s*:.*$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    gpus = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    models = [line for path in gpus for line in re.findall(r"^Model:.*$", _text(path), re.MULTILINE)]
    return (platform.machine(), *dict.fromkeys(about), *models, f"{usable_cores(root):g} cores")


def available_bytes(root: Path = ROOT) -> int:
    """Memory this process may still take: the machine's free memory, or its control groups' if less.

    What they have read of files and not lately used counts as free: the kernel gives it up for the asking.
    """
    left = [UNKNOWN]
    found = re.search(r"MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"))
    if found:
        left.append(int(found[1]) * 1024)
    for group in _groups("memory", root):
        for limit, usage, reclaimable in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit_bytes, used_bytes = _number(group / limit), _number(group / usage)
            if limit_bytes is None or used_bytes is None:
                continue
            found = re.search(rf"^{reclaimable} (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
            left.append(limit_bytes - used_bytes + (int(found[1]) if found else 0))
    return max(0, min(left))


def _quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time, of each control group that has a quota."""
    for group in _groups("cpu", root):
        match _text(group / "cpu.max").split():
            case [quota, period] if quota.isdigit() and period.isdigit() and int(period):
                yield int(quota) / int(period)
        quota_us, period_us = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota_us and period_us:
            yield quota_us / period_us


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's control group for a controller and of those above it.

    In a container the path that the process is told may be the host's: what of it is not there is left out.
    """
    mounts = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if not names:
            folder = mounts
        elif controller in names.split(","):
            folder = mounts / controller if (mounts / controller).is_dir() else mounts / names
        else:
            continue
        yield folder
        parts = Path(path.lstrip("/")).parts
        for part in parts if ".." not in parts else ():
            folder /= part
            if folder.is_dir():
                yield folder


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none, or none that is a bound ('max', -1)."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
