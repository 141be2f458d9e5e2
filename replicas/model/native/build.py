"""Compiles the native forward once, and loads it: `python -m replicas.model.native.build`.

The library speaks plain C and includes no header of torch or Python, so that it builds in seconds and
depends on neither's version.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-std=c++20", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT_S = 300.0


class NativeUnavailable(Exception):
    """The native forward can't be built here; the message says why and what to change."""


@cache
def load_library() -> ctypes.CDLL:
    """The native library, compiled if this machine has not got it yet. Raises NativeUnavailable."""
    compiler = _compiler()
    path = _cache_folder() / f"forward-{_fingerprint(compiler)}.so"
    if not path.is_file():
        _compile(compiler, path)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path} can't be loaded ({error}); delete it to build it again") from error
    library.triad_open.restype = ctypes.c_void_p
    library.triad_page_bytes.restype = ctypes.c_int64
    library.triad_team_size.restype = ctypes.c_int64
    return library


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else _COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    looked_for = f"CXX={wanted}" if wanted else ", ".join(_COMPILERS)
    raise NativeUnavailable(f"no C++ compiler found ({looked_for}); install g++ or clang, or set CXX")


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "triad"


def _fingerprint(compiler: str) -> str:
    """A hash of all that the library depends on: sources, flags, compiler, and the processor's features."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.glob("*.h")) + sorted(SOURCES.glob("*.cpp")):
        digest.update(source.read_bytes())
    digest.update(" ".join(_FLAGS).encode())
    digest.update(_run(compiler, "--version").encode())
    digest.update(_processor().encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    features = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join(dict.fromkeys(features))


def _compile(compiler: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            _run(compiler, *_FLAGS, str(SOURCES / "forward.cpp"), "-o", str(made))
            made.replace(path)  # at once, so that no other process loads half of it
    except OSError as error:
        raise NativeUnavailable(f"can't write to {path.parent} ({error}); set XDG_CACHE_HOME") from error


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise NativeUnavailable(f"{command[0]} took more than {_TIMEOUT_S:g} s") from error
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-20:])
        raise NativeUnavailable(f"{' '.join(command)} failed:\n{last}")
    return done.stdout


def main() -> None:
    try:
        load_library()
    except NativeUnavailable as error:
        print(
            f"no native forward, so the CPU path is torch's, several times slower: {error}", file=sys.stderr
        )


if __name__ == "__main__":
    main()
