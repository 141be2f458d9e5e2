"""The machine, commit and day that a measured row belongs to."""

import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from replicas.machine import usable_cores

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Provenance:
    """A row's machine, code and day."""

    processor: str
    cores: float
    """The cores that this process may use."""
    avx512: bool
    commit: str
    """The short hash, with `+` where tracked files differ from it; empty outside a repository."""
    date: str
    """As YYYY-MM-DD, UTC."""

    @classmethod
    def now(cls) -> Self:
        name, flags = _processor(Path("/proc/cpuinfo"))
        date = datetime.now(UTC).date().isoformat()
        return cls(name, usable_cores(), "avx512f" in flags, _commit(), date)


def _processor(cpuinfo: Path) -> tuple[str, frozenset[str]]:
    """The processor's name and its flags; none of them where the kernel has no such file."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return found.get("model name", platform.machine()), frozenset(found.get("flags", "").split())


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    hash_ = git("rev-parse", "--short", "HEAD")
    return hash_ + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
