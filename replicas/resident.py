"""Memory that this process holds and may not need again, given back to the system.

On Linux; elsewhere all of it stays, and with a C library that is not glibc the heap does.
"""

import ctypes
import mmap
import re
import sys
from pathlib import Path

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+ +(/.*)")


def forget(address: int, num_bytes: int) -> None:
    """Gives back the whole pages within a range of private anonymous memory, which reads as zeros from then
    on."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and first < end:
        _drop(first, end)


def forget_code(folder: Path) -> None:
    """Lets go of the code of a folder's libraries, none of which may be unloaded meanwhile.

    An import runs much of a library once. What is called again is mapped again, mostly from the page cache.
    """
    if sys.platform != "linux":
        return
    for line in Path("/proc/self/maps").read_text().splitlines():
        found = _MAPPING.fullmatch(line)
        # Data that the linker has filled in would be lost; code never is written.
        if found and found[3] == "r-xp" and Path(found[4]).parent == folder:
            _drop(int(found[1], 16), int(found[2], 16))


def trim_heap() -> None:
    """Gives back what has been freed between memory in use."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(ctypes.c_size_t(0))


def _drop(first: int, end: int) -> None:
    call = ctypes.CDLL(None, use_errno=True).madvise
    if call(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED) != 0:
        raise OSError(ctypes.get_errno(), "madvise")
