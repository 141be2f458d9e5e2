"""What `make serve` says, and what it says when it can't."""

import contextlib
import http.server
import io
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import welcome
from cluster.config import ClusterConfig
from cluster.serve_file import serve_file
from replicas.model.native.build import NativeUnavailable
from replicas.progress import logged
from telemetry.logs import TEXT_FORMAT


class TriadsPage(http.server.BaseHTTPRequestHandler):
    page = b"<title>Triad</title>"

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.page)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_a_free_port_is_no_problem() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert welcome.port_problem(port) is None


def test_a_taken_port_says_by_whom_and_what_to_do() -> None:
    with serving(TriadsPage) as port:
        assert welcome.port_problem(port) == (
            f"Triad is serving on http://127.0.0.1:{port} already: "
            f"use it, or set PORT to another one, such as PORT={port + 1}."
        )
    with serving(type("Other", (TriadsPage,), {"page": b"hello"})) as port:
        assert "in use by another program" in (welcome.port_problem(port) or "")


@pytest.mark.parametrize("port", ["0", "eighty", "65536", "-1"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    with pytest.raises(SystemExit, match="a number from 1 to 65535"):
        welcome.main(["check", port])


def test_the_script_stops_at_a_taken_port_with_one_sentence() -> None:
    with serving(TriadsPage) as port:
        done = subprocess.run(
            [sys.executable, "-m", "cluster.welcome", "check", str(port)], capture_output=True, text=True
        )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("Triad is serving on")


def test_what_serves_is_told_in_few_lines() -> None:
    config = ClusterConfig.model_validate({"num_threads": 3, "num_replicas": 2, "forward": "torch"})
    lines = welcome.description(config, "/tmp/log")
    assert lines == [
        "model    triad-5m, 2 replicas",
        "device   CPU, torch's forward, 3 threads a replica",
        "policy   cost_model; Redis its own, on loopback",
        "log      /tmp/log (LOG=debug shows it here)",
    ]
    assert "1 GPU" in welcome.description(ClusterConfig.model_validate({"num_gpus": 1}), "x")[1]


def test_a_model_that_is_nowhere_is_one_sentence_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(serve_file(["model=/no/such/folder"]))
    with pytest.raises(SystemExit) as ended:
        welcome.main(["tell", str(file), "x"])
    assert str(ended.value).startswith("/no/such/folder is neither a folder nor a hub name")


def test_without_a_compiler_it_says_what_that_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise NativeUnavailable("no C++ compiler found (c++); install g++ or clang, or set CXX")

    monkeypatch.setattr(welcome, "load_library", missing)
    told = welcome.description(ClusterConfig(), "x")[1]
    assert "several times slower" in told
    assert "install g++" in told


def test_attending_ends_when_the_server_has_gone() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        welcome.attend(probe.getsockname()[1], ended.pid, None, lambda line: pytest.fail(line))


def test_it_says_when_it_is_ready_and_the_errors_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "INFO all well\nWARNING slow\n\x1b[31mERROR\x1b[0m 2026 the engine failed\nValueError: no\n"
    )
    said: list[str] = []
    # It lives until its input ends, which is once the third thing is said.
    server = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 3:
            server.communicate()

    with serving(type("Ready", (TriadsPage,), {"page": b'{"data": [{"modes": ["ar"]}]}'})) as port:
        welcome.attend(port, server.pid, log, say)
    assert said[:2] == ["ERROR 2026 the engine failed", "ValueError: no"]
    first, _, console, _ = said[2].splitlines()
    assert first.endswith("modes ar")
    assert console == f"console  http://127.0.0.1:{port}/"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress_lines(total: int, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of a replica's log as Ray passes them on, of so many steps, of three seconds each."""
    seconds = iter(range(0, 1000, 3))
    with caplog.at_level(logging.INFO):
        list(logged(range(total), total, "warming up", logging.getLogger("replicas"), lambda: next(seconds)))
    form = logging.Formatter(TEXT_FORMAT)
    return [f"(ServeReplica:triad:Replica pid=7) {form.format(record)}\n" for record in caplog.records]


def test_a_warm_up_is_a_bar_on_a_terminal_and_few_lines_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    found = [welcome.progress_in(line) for line in progress_lines(64, caplog)]
    assert found == [("warming up", number, 64) for number in range(1, 65)]
    assert welcome.progress_in("INFO replicas: policy now ar, set at run time") is None
    said: list[str] = []
    terminal = Terminal()
    bar, plain = welcome.Progress(said.append, terminal), welcome.Progress(said.append, io.StringIO())
    for step in found[:40]:
        assert step is not None
        bar.show(*step)
    assert "warming up:  62%" in terminal.getvalue()
    assert "40/64" in terminal.getvalue()
    bar.close()
    assert said == []
    for step in found:
        assert step is not None
        plain.show(*step)
    plain.show("loading layers", 1, 2)
    assert len(said) <= plain.LINES + 1
    assert said[-1] == "loading layers: 1 of 2"
