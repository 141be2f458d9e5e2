"""Checks of a machine: what would fail there, and what would be slow."""

import asyncio
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from cluster.welcome import port_problem
from policies.control.store import LoadStore, StoreUnavailable
from replicas.machine import ROOT, UNKNOWN, available_bytes, usable_cores
from replicas.model.native.build import NativeUnavailable, load_library

OLDEST_PYTHON = (3, 11)
PACKAGES = ("ray", "torch", "transformers", "fastapi", "redis", "llguidance")
MIB = 2**20


class State(StrEnum):
    """The outcome of a check: a machine where nothing fails can serve."""

    OK = "ok"
    SLOW = "slow"
    FAILS = "fails"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at, and what was found."""

    name: str
    state: State
    told: str


def run(port: int, redis_url: str | None) -> int:
    """Prints all checks; returns 1 if one fails, else 0."""
    failed = 0
    for check in checks(port, redis_url):
        failed += check.state is State.FAILS
        print(f"{check.state.value:6}{check.name:10}{check.told}", flush=True)
    return int(failed > 0)


def checks(port: int, redis_url: str | None) -> Iterator[Check]:
    yield python(sys.version_info[:3])
    yield packages()
    yield compiler()
    yield cores()
    yield processor()
    yield memory()
    yield gpu()
    if redis_url is not None:
        yield asyncio.run(redis(redis_url))
    problem = port_problem(port)
    yield Check("port", State.FAILS if problem else State.OK, problem or f"{port} is free")


def python(version: tuple[int, ...]) -> Check:
    told = f"{'.'.join(map(str, version))} at {sys.executable}"
    if version < OLDEST_PYTHON:
        return Check("Python", State.FAILS, f"{told}; Triad needs 3.11 or newer")
    return Check("Python", State.OK, told)


def packages() -> Check:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        told = f"{', '.join(missing)} not installed: pip install -c constraints.txt ."
        return Check("packages", State.FAILS, told)
    return Check("packages", State.OK, ", ".join(found))


def compiler() -> Check:
    try:
        load_library()
    except NativeUnavailable as error:
        return Check("compiler", State.SLOW, f"the CPU's forward is torch's, several times slower: {error}")
    return Check("compiler", State.OK, "the native forward is built")


def cores(root: Path = ROOT) -> Check:
    usable, there = usable_cores(root), os.cpu_count() or 1
    told = f"{usable:g} of {there} usable, by affinity and control groups"
    if usable < 2:
        return Check("cores", State.SLOW, f"{told}; replica and ingress share one")
    return Check("cores", State.OK, told)


def processor(root: Path = ROOT, machine: str | None = None) -> Check:
    machine = machine or platform.machine()
    if machine not in ("x86_64", "AMD64"):
        return Check("processor", State.OK, f"{machine}; AVX-512 and AMX are of x86_64")
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return Check("processor", State.OK, f"{machine}; its features can't be read here")
    features = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    wanted = [name for name in ("avx2", "avx512f", "avx512_vnni", "amx_tile") if name in features]
    told = f"{machine} with {', '.join(wanted) or 'none of AVX2, AVX-512, AMX'}"
    if "avx512f" not in features:
        return Check("processor", State.SLOW, f"{told}; blocks gain most from AVX-512, which is not there")
    return Check("processor", State.OK, told)


def memory(root: Path = ROOT) -> Check:
    from replicas.model.kv_budget import MIN_CPU_BYTES

    free, wanted = available_bytes(root), MIN_CPU_BYTES // MIB
    if free >= UNKNOWN:
        return Check("memory", State.OK, "not known here")
    told = (
        f"{free // MIB} MiB free, of which a replica's K/V takes a quarter, {wanted} at least (kv_cache_mb)"
    )
    if free < 2 * wanted * MIB:
        return Check("memory", State.FAILS, f"{told}, beside weights, Ray and the ingress; lower kv_cache_mb")
    return Check("memory", State.OK, told)


def gpu() -> Check:
    import torch

    driver = _driver()
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        told = (
            f"{torch.cuda.device_count()} of {found.name}, {found.total_memory // MIB} MiB, driver {driver}"
        )
        return Check("GPU", State.OK, told)
    if driver is not None:
        return Check("GPU", State.SLOW, f"driver {driver}, but torch {torch.__version__} sees no CUDA device")
    return Check("GPU", State.OK, "none; the CPU serves")


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


async def redis(url: str) -> Check:
    try:
        store = LoadStore(url)
    except ValueError as error:
        return Check("Redis", State.FAILS, str(error))
    try:
        await store.read_view()
    except StoreUnavailable as error:
        return Check("Redis", State.FAILS, str(error))
    finally:
        await store.close()
    return Check("Redis", State.OK, "answers, and takes what Triad writes")
