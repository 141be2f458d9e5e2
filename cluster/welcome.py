"""What `make serve` says: whether the port is free, what is about to serve, and when it does.

`python -m cluster.welcome check PORT` fails with one sentence where the port is taken; `tell FILE LOG` says
what the Serve file is going to serve; `attend PORT PID [LOG]` says when it is ready, how far
loading and warming up have come where they take long, and each error in its log, until the process has gone.
"""

import json
import os
import re
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn, TextIO

import yaml
from tqdm import tqdm

from cluster.config import ClusterConfig
from replicas.machine import default_num_threads
from replicas.model.fields import CheckpointError
from replicas.model.native.build import NativeUnavailable, load_library
from replicas.model.place import local_folder

HOST = "127.0.0.1"
POLL_S = 0.5
_PROGRESS = re.compile(r": ([\w ]+): (\d+) of (\d+) after \d+ s$")
"""A line of `replicas.progress`."""
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_ERROR = re.compile(r"\b(ERROR|CRITICAL)\b|^Traceback|\b\w+(Error|Exception): ")


def port_problem(port: int) -> str | None:
    """Why nothing can listen on this port of loopback, and what to do; None where something can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            return None
        except PermissionError:
            return f"Port {port} may not be used by this user: set PORT to one above 1023."
        except OSError:
            pass
    other = f"set PORT to another one, such as PORT={port + 1 if port < 65535 else 8000}"
    if _serves_triad(port):
        return f"Triad is serving on http://{HOST}:{port} already: use it, or {other}."
    return f"Port {port} is in use by another program: {other}."


def description(config: ClusterConfig, log: str) -> list[str]:
    """The lines that say what is about to serve."""
    threads = config.num_threads or default_num_threads(config.num_sharing)
    if config.num_gpus:
        device = f"{config.num_gpus:g} GPU a process, {config.tensor_parallel} a replica"
    else:
        device = f"CPU, {_forward(config)}, {threads} thread{'s' if threads > 1 else ''} a replica"
    replicas = f"{config.num_replicas} replica{'s' if config.num_replicas > 1 else ''}"
    model = config.model if config.model == config.model_name else f"{config.model_name} ({config.model})"
    redis = "its own, on loopback" if config.redis_url is None else "as given"
    return [
        f"model    {model}, {replicas}",
        f"device   {device}",
        f"policy   {config.policy}; Redis {redis}",
        f"log      {log} (LOG=debug shows it here)",
    ]


def _forward(config: ClusterConfig) -> str:
    if config.forward == "torch":
        return "torch's forward"
    try:
        load_library()
    except NativeUnavailable as error:
        return f"torch's forward, several times slower than the native one, which is not there: {error}"
    return "native forward"


def attend(port: int, pid: int, log: Path | None, say: Callable[[str], None]) -> None:
    """Says when the server answers, and the errors of its log as they come, until its process has gone."""
    began_s, is_ready, progress = time.monotonic(), False, Progress(say)
    with ExitStack() as stack:
        lines = None if log is None else stack.enter_context(log.open(errors="replace"))
        while _is_alive(pid):
            for coloured in lines or ():
                line = _COLOUR.sub("", coloured)
                if _ERROR.search(line):
                    progress.close()
                    say(line.rstrip())
                elif found := progress_in(line):
                    progress.show(*found)
            if not is_ready and _answers(port, "/readyz"):
                is_ready = True
                progress.close()
                say("\n".join(ready_lines(port, time.monotonic() - began_s)))
            time.sleep(POLL_S)


def progress_in(line: str) -> tuple[str, int, int] | None:
    """What a replica is at, how far it has come, and of how much, if the line of its log says so."""
    found = _PROGRESS.search(line)
    return None if found is None else (found[1], int(found[2]), int(found[3]))


class Progress:
    """How far a replica has come with what it does before it serves: a bar on a terminal, else lines.

    Several replicas share the bar; it is where the last to tell was.
    """

    LINES = 10
    """How many lines, at most, one work is worth where there is no terminal."""

    def __init__(self, say: Callable[[str], None], stream: TextIO = sys.stdout):
        self._say = say
        self._stream = stream
        self._bar: tqdm[NoReturn] | None = None
        self._what = ""
        self._told = 0.0

    def show(self, what: str, number: int, total: int) -> None:
        if what != self._what:
            self.close()
            self._what, self._told = what, 0.0
        if not self._stream.isatty():
            if number / total - self._told >= 1 / self.LINES:
                self._told = number / total
                self._say(f"{what}: {number} of {total}")
            return
        if self._bar is None:
            self._bar = tqdm(total=total, desc=what, file=self._stream, leave=False)
        self._bar.n = number
        self._bar.refresh()

    def close(self) -> None:
        """Takes the bar away, so that lines can follow."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def ready_lines(port: int, after_s: float) -> list[str]:
    return [
        f"ready    after {after_s:.0f} s; {_modes(port)}",
        f"API      http://{HOST}:{port}/v1",
        f"console  http://{HOST}:{port}/",
        "stop     Ctrl-C; SIGTERM finishes first what has begun",
    ]


def _modes(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/v1/models", timeout=5) as answer:
            modes = json.load(answer)["data"][0]["modes"]
    except (OSError, ValueError, LookupError):  # with API keys it is a 401
        return "with API keys"
    return f"modes {', '.join(modes or ())}"


def _answers(port: int, path: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _serves_triad(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/", timeout=2) as answer:
            return b"<title>Triad</title>" in answer.read(4096)
    except (OSError, ValueError):
        return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    match list(sys.argv[1:] if arguments is None else arguments):
        case ["check", port] if port.isdigit() and 0 < int(port) < 65536:
            if problem := port_problem(int(port)):
                sys.exit(problem)
        case ["check", port]:
            sys.exit(f"PORT is {port!r}; it is a number from 1 to 65535.")
        case ["tell", file, log]:
            (application,) = yaml.safe_load(Path(file).read_text())["applications"]
            config = ClusterConfig.model_validate(application.get("args", {}))
            try:
                local_folder(config.checkpoint)
            except CheckpointError as error:
                sys.exit(f"{error}: set MODEL to one of these, or leave it out.")
            print("\n".join(description(config, log)), flush=True)
        case ["attend", port, pid, *log] if len(log) <= 1:
            path = Path(log[0]) if log else None
            attend(int(port), int(pid), path, lambda line: print(line, flush=True))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
