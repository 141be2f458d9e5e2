"""The locustfile's support: one streamed request over gevent, and the way of its records."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import gevent
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError
from locust import LoadTestShape
from locust.env import Environment
from locust.runners import WORKER_REPORT_INTERVAL, MasterRunner, WorkerRunner

from loadtest.records import ErrorKind, Record, to_json
from loadtest.run import refused
from loadtest.shapes import Shape
from loadtest.stream import StreamReader, fail_by_status
from loadtest.workloads import Ask

PATH = "/v1/chat/completions"


def http_client(host: str, timeout_s: float) -> HTTPClient:
    """A client of one kept-alive connection; each user has its own."""
    return HTTPClient.from_url(host, concurrency=1, connection_timeout=timeout_s, network_timeout=timeout_s)


def stream_once(
    client: HTTPClient,
    record: Record,
    ask: Ask,
    body: dict[str, Any],
    headers: dict[str, str],
    timeout_s: float,
    clock: Callable[[], float],
) -> str:
    """Sends one request and reads to the end. Any failure is in the record; returns the text so far."""
    reader = StreamReader(record)
    record.sent_s = clock()
    expired = gevent.Timeout(timeout_s)
    expired.start()
    try:
        encoded = json.dumps(body).encode()
        response = client.request("POST", PATH, encoded, {"Content-Type": "application/json", **headers})
        record.status = response.status_code
        if record.status != 200:
            fail_by_status(record, record.status, bytes(response.read()).decode(errors="replace"))
        else:
            while line := bytes(response.readline(b"\n")):
                reader.feed(line, clock())
                if record.error is not None:
                    break
            reader.close(ask.check, ask.expected)
        response.release()
    except gevent.Timeout as error:
        if error is not expired:
            raise
        record.fail(ErrorKind.TIMEOUT, f"no end within {timeout_s:g} s")
        client.close()
    except TimeoutError:
        record.fail(ErrorKind.TIMEOUT, f"no end within {timeout_s:g} s")
        client.close()
    except (OSError, HTTPConnectionClosed, HTTPParseError) as error:
        begun = record.status is not None
        record.fail(ErrorKind.TRUNCATED if begun else ErrorKind.CONNECTION, repr(error))
        client.close()
    finally:
        expired.close()
    record.end_s = clock()
    return reader.text


def served_model(client: HTTPClient, headers: dict[str, str]) -> str:
    """The first model's name. Raises RuntimeError."""
    try:
        response = client.get("/v1/models", headers)
        body = bytes(response.read())
        if response.status_code != 200:
            raise RuntimeError(refused("/v1/models", response.status_code))
        return str(json.loads(body)["data"][0]["id"])
    except (OSError, HTTPConnectionClosed, HTTPParseError, ValueError, LookupError, TypeError) as error:
        raise RuntimeError(f"/v1/models does not answer as OpenAI's API does: {error!r}") from error


class RecordSink:
    """Takes records to a file; a worker sends them with its statistics to its master, which has the file."""

    def __init__(self, environment: Environment, path: Path | None):
        self._is_worker = isinstance(environment.runner, WorkerRunner)
        self._file: TextIO | None = None
        self._batch: list[str] = []
        if self._is_worker:
            environment.events.report_to_master.add_listener(self._report)  # type: ignore[no-untyped-call]
        elif path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8", buffering=1)
            environment.events.worker_report.add_listener(self._take)  # type: ignore[no-untyped-call]

    def add(self, record: Record) -> None:
        line = to_json(record) + "\n"
        if self._is_worker:
            self._batch.append(line)
        elif self._file is not None:
            self._file.write(line)

    def _report(self, client_id: str, data: dict[str, Any], **_: Any) -> None:
        data["records"], self._batch = self._batch, []

    def _take(self, client_id: str, data: dict[str, Any], **_: Any) -> None:
        assert self._file is not None
        self._file.writelines(data["records"])


class ShapeOfLoad(LoadTestShape):
    """A shape of `loadtest.shapes` in users. `abstract` keeps locust from picking it up unasked.

    A master quits without its workers' last report, so it holds out for one at no users.
    """

    abstract = True

    def __init__(self, shape: Shape, spawn_rate: float = 50.0):
        super().__init__()  # type: ignore[no-untyped-call]
        self._shape = shape
        self._spawn_rate = spawn_rate

    def tick(self) -> tuple[int, float] | None:
        at_s: float = self.get_run_time()  # type: ignore[no-untyped-call]
        if at_s < self._shape.duration_s:
            return round(self._shape.level(at_s)), self._spawn_rate
        is_master = isinstance(self.runner, MasterRunner)
        if is_master and at_s < self._shape.duration_s + WORKER_REPORT_INTERVAL + 1:
            return 0, self._spawn_rate
        return None
