"""Every kernel compiles for sm_90 without a GPU, within an SM's shared memory."""

import os
import subprocess
import sys
from pathlib import Path

_SHARED_BYTES = 227 << 10
_MODULE = Path(__file__).with_name("compile_all.py")


def test_kernels_compile_for_hopper() -> None:
    """In a process of its own, where kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    found = subprocess.run(
        [sys.executable, str(_MODULE)], capture_output=True, text=True, timeout=280, env=environment
    )
    assert found.returncode == 0, found.stderr
    shared = {name: int(size) for name, size in (line.rsplit(" ", 1) for line in found.stdout.splitlines())}
    assert len(shared) == 16, sorted(shared)
    assert max(shared.values()) <= _SHARED_BYTES
