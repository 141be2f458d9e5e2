"""Compiles the native forward once, and loads it: `python -m replicas.model.native.build`.

The library speaks plain C and includes no header of torch or Python, so that it builds in seconds and
depends on neither's version. With `--portable` it is compiled beside its sources for each kind of processor
instead, for machines without a compiler, such as the container image.
"""

import argparse
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence, Set
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent
PORTABLE_FOLDER = SOURCES / "portable"
_FLAGS = ("-O3", "-march=native", "-std=c++20", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
PORTABLE = {
    "x86_64": (
        (("-march=x86-64-v4", "-mavx512bf16"), _V4 | {"avx512_bf16"}),
        (("-march=x86-64-v4",), _V4),
        (("-march=x86-64-v3",), _V3),
    ),
    "aarch64": ((("-march=armv8-a",), frozenset[str]()),),
}
"""By machine the kinds of processor, best first: the compiler's flags, and the features that they need as
Linux names them. The levels are those of the x86-64 psABI; the sources use no further extension."""
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT_S = 300.0
CHOOSE_ARGUMENTS = (*(ctypes.c_void_p,) * 2, *(ctypes.c_int64,) * 4, *(ctypes.c_void_p,) * 3)
"""The types of triad_choose's arguments."""


class NativeUnavailable(Exception):
    """The native forward can't be built here; the message says why and what to change."""


@cache
def load_library() -> ctypes.CDLL:
    """The native library: compiled if this machine has not got it yet, without a compiler the portable one.

    Calls let other threads run Python meanwhile. Raises NativeUnavailable.
    """
    try:
        compiler = _compiler()
    except NativeUnavailable:
        found = portable_library(platform.machine(), set(_processor().split()))
        if found is None:
            raise
        path = found
    else:
        path = _cache_folder() / f"forward-{_fingerprint(compiler)}.so"
        if not path.is_file():
            _compile(compiler, path, _FLAGS)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path} can't be loaded ({error}); delete it to build it again") from error
    library.triad_open.restype = ctypes.c_void_p
    library.triad_page_bytes.restype = ctypes.c_int64
    library.triad_team_size.restype = ctypes.c_int64
    library.triad_forward.argtypes = (ctypes.c_void_p,) * 5
    library.triad_choose.argtypes = CHOOSE_ARGUMENTS
    return library


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else _COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    looked_for = f"CXX={wanted}" if wanted else ", ".join(_COMPILERS)
    raise NativeUnavailable(f"no C++ compiler found ({looked_for}); install g++ or clang, or set CXX")


def portable_library(machine: str, features: Set[str]) -> Path | None:
    """The best of the libraries compiled beside the sources that a processor of these features can run."""
    for flags, needed in PORTABLE.get(machine, ()):
        path = _portable_path(flags)
        if needed <= features and path.is_file():
            return path
    return None


def _portable_path(flags: tuple[str, ...]) -> Path:
    kind = "+".join(flag.removeprefix("-march=").removeprefix("-m") for flag in flags)
    return PORTABLE_FOLDER / f"forward-{kind}.so"


def compile_portable() -> list[Path]:
    """Compiles the library for each kind of this machine's processors, beside its sources.

    Raises NativeUnavailable.
    """
    compiler = _compiler()
    common = tuple(flag for flag in _FLAGS if not flag.startswith("-march="))
    made = []
    for flags, _ in PORTABLE.get(platform.machine(), ()):
        _compile(compiler, _portable_path(flags), (*common, *flags))
        made.append(_portable_path(flags))
    return made


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


def _compile(compiler: str, path: Path, flags: tuple[str, ...]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            _run(compiler, *flags, str(SOURCES / "forward.cpp"), "-o", str(made))
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m replicas.model.native.build")
    parser.add_argument(
        "--portable", action="store_true", help="for each kind of processor, beside the sources"
    )
    if parser.parse_args(arguments).portable:
        try:
            made = compile_portable()
        except NativeUnavailable as error:
            sys.exit(str(error))
        print("\n".join(map(str, made)))
        return
    try:
        load_library()
    except NativeUnavailable as error:
        print(
            f"no native forward, so the CPU path is torch's, several times slower: {error}", file=sys.stderr
        )


if __name__ == "__main__":
    main()
