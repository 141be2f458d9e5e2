"""Cores and memory of a container, by made-up files of control groups of both versions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from replicas.machine import available_bytes, default_num_threads, usable_cores

GIB = 1 << 30
NO_LIMIT = (1 << 63) - 4096
"""What version 1 says where there is none."""
Files = dict[str, object]


def make(root: Path, files: Files) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


@pytest.fixture
def on_64_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))


V2 = "0::/"
V1 = "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/"


@pytest.mark.usefixtures("on_64_cores")
@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 64.0),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "max 100000"}, 64.0),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "nonsense"}, 64.0),
        # A group's own quota and those above it: the least holds.
        (
            {
                "proc/self/cgroup": "0::/pods/a",
                "sys/fs/cgroup/pods/cpu.max": "300000 100000",
                "sys/fs/cgroup/pods/a/cpu.max": "max 100000",
            },
            3.0,
        ),
        (
            {
                "proc/self/cgroup": "0::/pods/a",
                "sys/fs/cgroup/pods/cpu.max": "300000 100000",
                "sys/fs/cgroup/pods/a/cpu.max": "150000 100000",
            },
            1.5,
        ),
        # The host's path in a container, where the mount is the group itself.
        ({"proc/self/cgroup": "0::/../elsewhere", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4.0),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": 250000,
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": 50000,
            },
            5.0,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": 100000,
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": 100000,
            },
            1.0,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1,
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
            },
            64.0,
        ),
    ],
)
def test_cores_are_those_that_quotas_leave(tmp_path: Path, files: Files, cores: float) -> None:
    assert usable_cores(make(tmp_path, files)) == cores


@pytest.mark.usefixtures("on_64_cores")
@pytest.mark.parametrize(
    ("quota_us", "num_sharing", "num_threads"),
    [(800000, 1, 8), (800000, 3, 2), (800000, 16, 1), (50000, 1, 1)],
)
def test_processes_share_them(tmp_path: Path, quota_us: int, num_sharing: int, num_threads: int) -> None:
    root = make(tmp_path, {"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": f"{quota_us} 100000"})
    assert default_num_threads(num_sharing, root) == num_threads


def test_a_process_kept_to_one_core_has_one_thread() -> None:
    program = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from replicas.machine import default_num_threads; print(default_num_threads(1))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "1"


MEMINFO = "MemTotal: 99 kB\nMemAvailable: 8388608 kB"


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, 8 * GIB),
        ({"sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": 1 * GIB}, 8 * GIB),
        ({"sys/fs/cgroup/memory.max": 4 * GIB, "sys/fs/cgroup/memory.current": 1 * GIB}, 3 * GIB),
        # Weights that were read once are in the page cache, and go when the memory is wanted.
        (
            {
                "sys/fs/cgroup/memory.max": 4 * GIB,
                "sys/fs/cgroup/memory.current": 4 * GIB,
                "sys/fs/cgroup/memory.stat": f"anon {GIB}\nfile {3 * GIB}\ninactive_file {2 * GIB}",
            },
            2 * GIB,
        ),
        ({"sys/fs/cgroup/memory.max": 4 * GIB, "sys/fs/cgroup/memory.current": 5 * GIB}, 0),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT,
                "sys/fs/cgroup/memory/memory.usage_in_bytes": 7 * GIB,
                "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": 4 * GIB,
                "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": 3 * GIB,
                "sys/fs/cgroup/memory/docker/abc/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}",
            },
            2 * GIB,
        ),
    ],
)
def test_memory_is_what_the_control_groups_leave(tmp_path: Path, files: Files, left: int) -> None:
    assert available_bytes(make(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": V2} | files)) == left


def test_this_machine_can_be_read() -> None:
    assert 0 < usable_cores() <= (os.cpu_count() or 1)
    assert 0 < available_bytes() < 1 << 50
