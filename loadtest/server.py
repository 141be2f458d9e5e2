"""A Triad of the load test's own: started as `make serve` does, on loopback, and ended for certain."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEYS_VARIABLE = "TRIAD_API_KEYS"
START_TIMEOUT_S = 280.0
STOP_TIMEOUT_S = 30.0


@contextmanager
def own_server(policy: str, log: Path, replicas: int = 1) -> Iterator[str]:
    """Runs a server; yields its URL once it is ready. Raises RuntimeError with its log's end if it never
    is."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    # Ray's sockets lie below it, and a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp", ignore_cleanup_errors=True) as folder:
        # On loopback and for this load alone: the keys of whoever runs it are not asked for.
        env = {name: value for name, value in os.environ.items() if name != KEYS_VARIABLE} | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PORT": str(port),
            "POLICY": policy,
            "REPLICAS": str(replicas),
            "RAY_TMPDIR": folder,
        }
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["bash", "cluster/serve.sh"],
                cwd=ROOT,
                env=env,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait_until_ready(process, url, log)
            yield url
        finally:
            _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not _answers(f"{url}/readyz"):
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(
                f"the server did not start; its log:\n{log.read_text(errors='replace')[-3000:]}"
            )
        time.sleep(0.3)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stops the server as by Ctrl-C, which a terminal sends to the whole group; then harder, the group being
    ours alone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            continue


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
