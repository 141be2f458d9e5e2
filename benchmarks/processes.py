"""Servers as processes of their own, with the CPU time each of their processes takes."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parent.parent
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
STOP_TIMEOUT_S = 60.0


class ServerProcess:
    """A command that serves HTTP on a port of loopback, and what it started; a context manager.

    ready_path: answers 200 once it serves. Its output goes to `log`.
    """

    def __init__(self, command: list[str], port: int, ready_path: str, env: dict[str, str]):
        self.port = port
        self._ready_url = f"http://127.0.0.1:{port}{ready_path}"
        self.log = Path(tempfile.mkstemp(suffix=".log")[1])
        self._command = command
        self._env = os.environ | env

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
        self.signal(signal.SIGCONT)
        ours = descendants(self._process.pid)
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pid, began in ours.items():
            if began_at(pid) == began:
                os.kill(pid, signal.SIGKILL)

    def wait_until_ready(self, timeout_s: float = 300.0) -> None:
        """Raises RuntimeError with the log's end when it ends or is not ready in time."""
        deadline_s = time.monotonic() + timeout_s
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"not serving; its log:\n{self.log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.5)

    def signal(self, number: int) -> None:
        for pid in descendants(self._process.pid):
            os.kill(pid, number)

    def cpu_s(self) -> Counter[str]:
        """CPU seconds so far, by name of process."""
        spent: Counter[str] = Counter()
        for pid in descendants(self._process.pid):
            fields = _stat(pid)
            if fields is not None:
                spent[_name(pid)] += (int(fields[11]) + int(fields[12])) / TICKS_PER_S
        return spent

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self._ready_url, timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def triad(checkpoint: str, port: int, *arguments: str) -> ServerProcess:
    """`serve run` with a replica of the checkpoint; arguments: further key=value of ClusterConfig."""
    from cluster.serve_file import serve_file

    file = Path(tempfile.mkstemp(suffix=".yaml")[1])
    file.write_text(serve_file([f"port={port}", f"model={checkpoint}", *arguments]))
    # Ray's sockets lie below it, and a socket's path must be short.
    env = {"RAY_TMPDIR": tempfile.mkdtemp(prefix="t", dir="/tmp"), "RAY_worker_niceness": "0"}
    return ServerProcess(
        [str(Path(sys.executable).with_name("serve")), "run", str(file)], port, "/readyz", env
    )


def vllm(executable: str, checkpoint: str, port: int, model: str) -> ServerProcess:
    command = [executable, "serve", checkpoint, "--served-model-name", model, "--dtype", "bfloat16"]
    command += ["--max-model-len", "2048", "--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", "64"]
    env = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return ServerProcess(command, port, "/health", env)


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


def _name(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "gone"
    first = command[0].decode(errors="replace")
    # A Serve actor names itself: ray::ServeReplica:<app>:<deployment>
    if first.startswith("ray::"):
        return first.split()[0]
    names = [part.decode(errors="replace").rpartition("/")[2] for part in command[:2]]
    return " ".join(names) if names[0].startswith("python") else names[0]
