"""A function called in a process of its own, where a call that does not end, or eats memory, can be ended.

Nothing ends a thread. The kernel keeps the limits, so a call ends whatever code it is in, and the process
with it; the next call starts another. It takes no share in the parent's threads, locks or signals, and ends
when the parent does: between calls as its end of the pipe closes, within one by its own limits.

Its calls have half the stack of a thread of the parent, so that what recurses too deeply for the parent has
ended a call first.
"""

import os
import pkgutil
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any

_FROM_OUTSIDE = (signal.SIGTERM, signal.SIGKILL, signal.SIGHUP)
"""Signals that say nothing of a call."""
MIN_STACK_BYTES = 2 * 2**20
"""The stack that glibc gives a thread where the stack's limit is none."""


@dataclass(frozen=True, slots=True)
class CallLimits:
    """The limits of a bounded process's calls."""

    cpu_s: float = 2.0
    """CPU time of one call."""
    memory_bytes: int = 256 * 2**20
    """The memory that a call may take beyond what the process had before."""
    wall_s: float = 7.0
    """The time that a caller waits for an answer."""
    start_s: float = 60.0
    """The time that a caller waits for a process to be ready."""


class CallExceeded(Exception):
    """A call was ended by a limit, or ended its process in another way. It would do so again."""


class CallTimeout(Exception):
    """No answer within wall_s, of which the process may have had too small a share, or it was killed."""


class ProcessClosed(Exception):
    """The process is closed, and so takes no calls."""


class BoundedProcess:
    """A process for one call at a time, from any thread, started by start() or the first; close() also within
    one.

    target: "module:name" of a function that is called in the process with setup, outside of the limits, and
    returns the function whose calls these are. setup, arguments, results and what it raises are pickled.
    """

    def __init__(self, target: str, setup: Any, limits: CallLimits):
        self._target = target
        self._setup = setup
        self._limits = limits
        self._lock = threading.Lock()  # of the two below
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False
        self._connection: Connection | None = None

    def call(self, argument: Any) -> Any:
        """Calls the function. Raises what it raises, CallExceeded, CallTimeout or ProcessClosed."""
        self.start()
        return self._answer(argument, self._limits.wall_s)

    def start(self) -> None:
        """Starts the process, so that the next call need not wait for it; raises as a call does."""
        if self._connection is None:
            self._start()

    def close(self) -> None:
        """Ends the process, and a call under way with ProcessClosed."""
        with self._lock:
            self._is_closed = True
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    def _start(self) -> None:
        mine, its = Pipe()
        with its:
            with self._lock:
                if self._is_closed:
                    mine.close()
                    raise ProcessClosed
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", __name__, str(its.fileno()), self._target],
                    env=os.environ
                    | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                    pass_fds=(its.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            self._connection = mine
        self._answer((self._setup, self._limits), self._limits.start_s)

    def _answer(self, message: Any, wait_s: float) -> Any:
        connection = self._connection
        assert connection is not None
        try:
            connection.send(message)
            if not connection.poll(wait_s):
                raise CallTimeout
            has_raised, result = connection.recv()
        except CallTimeout:
            self._end(wait_s=0.0)
            raise
        except (EOFError, OSError):
            status = self._end(wait_s=1.0)  # which it has most likely come to by itself
            if self._is_closed:
                raise ProcessClosed from None
            if -status in _FROM_OUTSIDE:
                raise CallTimeout from None
            raise CallExceeded(f"the process ended with status {status}") from None
        if has_raised:
            raise result
        return result

    def _end(self, wait_s: float) -> int:
        """Waits for the process and returns its exit status; kills it if it has none by then."""
        assert self._connection is not None
        assert self._process is not None
        self._connection.close()
        self._connection = None
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(wait_s)
        self._process.kill()
        return self._process.wait()


def _main(connection: Connection, target: str) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the parent decides
    for timer in (signal.SIGPROF, signal.SIGALRM):  # which end the process, in whatever code it is
        signal.signal(timer, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF, signal.SIGALRM})
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    threading.stack_size((MIN_STACK_BYTES if soft == resource.RLIM_INFINITY else soft) // 2)
    serving = threading.Thread(target=_serve, args=(connection, target))
    serving.start()
    serving.join()


def _serve(connection: Connection, target: str) -> None:
    with suppress(EOFError, BrokenPipeError):  # the parent has closed its end, or is gone
        _answer_calls(connection, target)


def _answer_calls(connection: Connection, target: str) -> None:
    setup, limits = connection.recv()
    call = _attempt(pkgutil.resolve_name(target), setup)
    connection.send((call[0], call[1] if call[0] else None))
    if call[0]:
        return
    bound = _address_space_bytes() + limits.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    while True:
        argument = connection.recv()
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
        signal.setitimer(signal.ITIMER_REAL, 2 * limits.wall_s)  # when nobody waits any more, nor lives
        result = _attempt(call[1], argument)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        connection.send(result)


def _attempt(function: Callable[[Any], Any], argument: Any) -> tuple[bool, Any]:
    """Calls the function; returns whether it raised, and then the error, else the result."""
    try:
        return False, function(argument)
    except MemoryError:
        os._exit(1)  # a limit ended it
    except Exception as error:
        return True, error


def _address_space_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    _main(Connection(int(sys.argv[1])), sys.argv[2])
