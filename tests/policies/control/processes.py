"""Processes of these tests' own."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[3]


@contextmanager
def start_module(name: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Runs python -m tests.policies.control.<name> from when it says it is running; killed at the end."""
    command = [sys.executable, "-m", f"tests.policies.control.{name}", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        yield process
    finally:
        process.kill()
        process.communicate()
