"""A whole Triad in processes of its own, started as an operator would, and ended for certain."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from cluster.serve_file import serve_file

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 280.0
STOP_TIMEOUT_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """`serve run <file>` with the given ClusterConfig keys, on a port and in a folder of its own."""

    def __init__(self, *arguments: str):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        # Ray's sockets lie below it, and a socket's path must be short.
        self._folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
        self._log = self._folder / "log"
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._http = httpx.Client(base_url=self.url, timeout=30.0)

    def __enter__(self) -> Self:
        file = self._folder / "serve.yaml"
        file.write_text(serve_file([f"port={self.port}", *self._arguments]))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [Path(sys.executable).with_name("serve"), "run", str(file)],
                cwd=ROOT,
                # Ray gives its workers a low priority, which on a busy machine is none at all.
                env=os.environ | {"RAY_TMPDIR": str(self._folder), "RAY_worker_niceness": "0"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def pids(self, name: str) -> list[int]:
        """Processes of this server whose command line contains `name`."""
        return [pid for pid in self._descendants() if name in _command(pid)]

    def log_tail(self, num_chars: int = 5000) -> str:
        return self._log.read_text(errors="replace")[-num_chars:]

    def stop(self) -> None:
        """As by Ctrl-C; what is left after a while is killed, by its id."""
        assert self._process is not None
        self._http.close()
        ours = self._descendants()
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pid, started in ours.items():
            if _started(pid) == started:
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline_s:
                what = "ended" if ended else f"was not ready within {START_TIMEOUT_S:g} s"
                raise AssertionError(f"the server {what}; its log:\n{self.log_tail()}")
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        try:
            return self._http.get("/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    def _descendants(self) -> dict[int, str]:
        """Process ids below the server's, with their start times, which tell a reused id."""
        assert self._process is not None
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                fields = _stat(int(entry.name))
                if fields is not None:
                    parents[int(entry.name)] = int(fields[1])
        found = {self._process.pid}
        while True:
            more = {pid for pid, parent in parents.items() if parent in found} - found
            if not more:
                break
            found |= more
        return {pid: started for pid in found if (started := _started(pid)) is not None}


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat after the command's name; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _started(pid: int) -> str | None:
    fields = _stat(pid)
    return None if fields is None else fields[19]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
