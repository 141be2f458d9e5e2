"""A neighbour: a process that keeps one core busy for a while and ends by itself."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_BUSY = "import sys, time\nend = time.monotonic() + float(sys.argv[1])\nwhile time.monotonic() < end: pass"


@contextmanager
def neighbour(busy_s: float) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is busy for so many seconds from now on, or until the context is left."""
    process = subprocess.Popen([sys.executable, "-S", "-c", _BUSY, str(busy_s)])
    try:
        yield process
    finally:
        process.kill()
        process.wait()
