"""Servers as processes of their own, for benchmarks and tests: started, watched, and ended for certain."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from cluster.environment import free_ports

ROOT = Path(__file__).parent.parent
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
KEYS_VARIABLE = "TRIAD_API_KEYS"

T = TypeVar("T")


class ServerProcess:
    """A command that serves HTTP on a port of loopback, and what it started; a context manager.

    ready_path: answers 200 once it serves. folder: its own, removed at the end; its output goes to
    `log` in it.
    """

    def __init__(
        self,
        command: list[str],
        port: int,
        ready_path: str,
        env: Mapping[str, str],
        folder: Path | None = None,
    ):
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.folder = folder or short_folder()
        self.log = self.folder / "log"
        self._ready_url = self.url + ready_path
        self._command = command
        # Keys that whoever runs it has set for a server of theirs are not asked for here.
        self._env = {name: value for name, value in os.environ.items() if name != KEYS_VARIABLE} | dict(env)

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self._env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not asked to end: nothing of it is kept. Stopped first, so that none starts another meanwhile.
        if self._process.poll() is None:
            self.signal(signal.SIGSTOP)
            self.signal(signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait_until_ready(self, timeout_s: float = 300.0) -> None:
        """Waits until it is ready. Raises RuntimeError with the log's end when it ends or is not ready in
        time."""
        self.wait_for(self._is_ready, timeout_s)

    def wait_for(self, found: Callable[[], T | None], timeout_s: float = 300.0) -> T:
        """Asks until the answer is true, and returns it. Raises as wait_until_ready does."""
        deadline_s = time.monotonic() + timeout_s
        while not (answer := found()):
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"not serving; its log:\n{self.log.read_text(errors='replace')[-5000:]}")
            time.sleep(0.2)
        return answer

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self._process

    def signal(self, number: int) -> None:
        """Sends a signal to all of its processes."""
        for pid in descendants(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def pids(self, name: str) -> list[int]:
        """The ids of its processes whose command line contains `name`, the oldest first."""
        ours = descendants(self._process.pid)
        return sorted((pid for pid in ours if name in command_of(pid)), key=lambda pid: int(ours[pid]))

    def cpu_s(self) -> Counter[str]:
        """CPU seconds so far, by name of process."""
        spent: Counter[str] = Counter()
        for pid in descendants(self._process.pid):
            fields = _stat(pid)
            if fields is not None:
                spent[name_of(pid)] += (int(fields[11]) + int(fields[12])) / TICKS_PER_S  # type: ignore[assignment]
        return spent

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self._ready_url, timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


class Triad(ServerProcess):
    """`serve run` as an operator would; arguments: key=value of ClusterConfig. Entered, it is ready.

    drains: by `python -m cluster.serve` in its place, as `make serve` does
    """

    def __init__(
        self,
        *arguments: str,
        port: int | None = None,
        env: Mapping[str, str] | None = None,
        drains: bool = False,
    ):
        from cluster.environment import serving_environment
        from cluster.serve_file import serve_file

        port = port or free_port()
        folder = short_folder()
        file = folder / "serve.yaml"
        file.write_text(serve_file([f"port={port}", *arguments]))
        serve_run = [str(Path(sys.executable).with_name("serve")), "run"]
        command = [*([sys.executable, "-m", "cluster.serve"] if drains else serve_run), str(file)]
        ray = {"RAY_TMPDIR": str(folder), **serving_environment(folder)}
        super().__init__(command, port, "/readyz", ray | dict(env or {}), folder)

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self


def vllm(executable: str, checkpoint: str, port: int, model: str, cores: str = "auto") -> ServerProcess:
    """cores: those of its forward's threads, as in "0-1"; by itself it leaves one to its other processes."""
    command = [executable, "serve", checkpoint, "--served-model-name", model, "--dtype", "bfloat16"]
    command += ["--max-model-len", "2048", "--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", "64"]
    env = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env["VLLM_CPU_OMP_THREADS_BIND"] = cores
    return ServerProcess(command, port, "/health", env)


def short_folder() -> Path:
    """Makes a folder of a short name: Ray's sockets lie below it, and a socket's path must be short."""
    return Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))


def free_port() -> int:
    return free_ports(1, to_listen_on=True)[0]


def descendants(root: int) -> dict[int, str]:
    """Process ids from root down, with their start times, which tell a reused id."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))) is not None:
            parents[int(entry.name)] = int(fields[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: began for pid in found if (began := began_at(pid)) is not None}


def began_at(pid: int) -> str | None:
    fields = _stat(pid)
    return None if fields is None else fields[19]


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat after the command's name; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def command_of(pid: int) -> str:
    """The command line; empty when the process has gone. A Serve actor writes its own:
    ray::ServeReplica:<app>:<deployment>."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def name_of(pid: int) -> str:
    parts = command_of(pid).split()
    if not parts:
        return "gone"
    if parts[0].startswith("ray::"):
        return parts[0]
    names = [part.rpartition("/")[2] for part in parts[:2]]
    return " ".join(names) if names[0].startswith("python") else names[0]
