"""Streaming users for locust: `locust -f loadtest/locustfile.py --host URL`; see docs/loadtest.md.

TTFT, TPOT, inter-chunk and E2E are entries of their own, counted from the intended send. A failure is one of
E2E's, named by its kind. With --records the master (or the only process) writes every request's record, of
which `python -m loadtest.report` makes the same report as of an open loop.
"""

import random
from pathlib import Path
from typing import Any

import gevent
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

from loadtest.arrivals import Arrival
from loadtest.client import KEY_VARIABLE, bearer
from loadtest.locust_support import RecordSink, ShapeOfLoad, http_client, served_model, stream_once
from loadtest.metrics import e2e_s, inter_chunk_s, tpot_s, ttft_s
from loadtest.records import Clock, Record
from loadtest.run import LOSSLESS, decoding_settings
from loadtest.shapes import parse_shape
from loadtest.workloads import Workload, find_workload, pool, verified

STAGE = "locust"


class RequestFailed(Exception):
    """A failed request; its text is the kind alone, by which locust counts failures."""


class LoadedServer:
    """The state that all users of a process share.

    Options are read at each start: the web UI and a master set them.
    """

    def __init__(self, environment: Environment):
        options = environment.parsed_options
        assert options is not None
        self.clock = Clock()
        self.sink = RecordSink(environment, Path(options.records) if options.records else None)
        self._read(options)
        if options.shape:
            environment.shape_class = ShapeOfLoad(parse_shape(options.shape))
            environment.shape_class.runner = environment.runner

    def _read(self, options: Any) -> None:
        """Reads the options. Raises ValueError, which names the option's fault."""
        self.workload: Workload = find_workload(options.workload)
        self.extra = decoding_settings([options.decoding])[options.decoding]
        self.headers = bearer(options.api_key)
        if options.verify and options.decoding not in LOSSLESS:
            raise ValueError(f"--verify needs a --decoding whose text is fixed: {', '.join(LOSSLESS)}")

    def prepare(self, host: str, options: Any) -> None:
        """Finds, before any user starts, the model's name and the texts that this load must not change.

        Raises ValueError and RuntimeError.
        """
        self._read(options)
        client = http_client(host, options.request_timeout)
        self.model = options.served_model or served_model(client, self.headers)
        if options.verify:
            texts = []
            asks = pool(self.workload, options.verify, options.seed)
            for ask in asks:
                record = Record(options.decoding, "alone", ask.workload, ask.class_name, self.clock())
                body = ask.body(self.model, self.extra)
                timeout_s = options.request_timeout
                texts.append(stream_once(client, record, ask, body, self.headers, timeout_s, self.clock))
                if record.error is not None:
                    raise RuntimeError(f"a request failed even alone: {record.error}: {record.message}")
            self.workload = verified(self.workload, asks, texts)
        client.close()


_servers: dict[int, LoadedServer] = {}
"""The server of each environment, in which locust has no place for it."""


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _options(parser: LocustArgumentParser) -> None:
    add = parser.add_argument
    add("--workload", default="tasks", help="what users ask, as loadtest/workloads.py has it")
    add("--decoding", default="auto", help="auto, lossless, a mode, or JSON of `decoding`")
    add("--served-model", default="", help="default: the first that the server lists")
    add("--api-key", default="", env_var=KEY_VARIABLE, include_in_web_ui=False, help="to show the server")
    add("--pace", type=float, default=0.0, help="requests/s a user; 0: each right after the last")
    add("--request-timeout", type=float, default=120.0, help="seconds")
    add("--verify", type=int, default=0, help="so many prompts, whose texts must not vary")
    add("--shape", default="", include_in_web_ui=False, help="users: square:low=2,high=16,duration_s=60")
    add("--records", default="", include_in_web_ui=False, help="JSONL file of every request's record")
    add("--seed", type=int, default=0)


@events.init.add_listener  # type: ignore[untyped-decorator]
def _init(environment: Environment, **_: Any) -> None:
    # The loop's clock still stands where imports began, and a --run-time set by it would end too soon.
    gevent.get_hub().loop.update_now()
    try:
        _servers[id(environment)] = LoadedServer(environment)
    except ValueError as error:
        raise SystemExit(str(error)) from error


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def _test_start(environment: Environment, **_: Any) -> None:
    host = environment.host or StreamingUser.host
    if not host:
        raise SystemExit("--host is missing: the URL of the server to load")
    try:
        _servers[id(environment)].prepare(host, environment.parsed_options)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"{host}: {error}") from error


class StreamingUser(User):
    """Streams one answer after another: at once, or by its own timetable with --pace.

    With a pace, a request that is due while the one before still streams has waited, and its latencies
    say so: they count from when it was due.
    """

    number = 0

    def on_start(self) -> None:
        StreamingUser.number += 1
        options = self.environment.parsed_options
        self._server = _servers[id(self.environment)]
        self._options = options
        self._rng = random.Random(f"{options.seed}/{StreamingUser.number}")
        assert self.host is not None
        self._client = http_client(self.host, options.request_timeout)
        self._due_s = self._server.clock()

    @task
    def chat(self) -> None:
        server, options = self._server, self._options
        now_s = server.clock()
        if options.pace > 0:
            self._due_s += 1 / options.pace
            gevent.sleep(max(0.0, self._due_s - now_s))
        else:
            self._due_s = now_s
        ask = server.workload.draw(self._rng, Arrival(0.0))
        record = Record(options.decoding, STAGE, ask.workload, ask.class_name, self._due_s)
        body = ask.body(server.model, server.extra)
        stream_once(self._client, record, ask, body, server.headers, options.request_timeout, server.clock)
        server.sink.add(record)
        self._report(record)
        if record.error is not None and options.pace <= 0:
            gevent.sleep(0.2)  # no storm on a server that refuses

    def on_stop(self) -> None:
        self._client.close()

    def _report(self, record: Record) -> None:
        assert record.end_s is not None
        if record.error is not None:
            self._fire("E2E", record.end_s - record.intended_s, record, RequestFailed(record.error.value))
            return
        for name, value in (("TTFT", ttft_s(record)), ("TPOT", tpot_s(record)), ("E2E", e2e_s(record))):
            if value is not None:
                self._fire(name, value, record, None)
        for gap in inter_chunk_s(record):
            self._fire("inter-chunk", gap, record, None)

    def _fire(self, name: str, value_s: float, record: Record, error: Exception | None) -> None:
        self.environment.events.request.fire(
            request_type="SSE",
            name=name,
            response_time=1000 * value_s,
            response_length=sum(chunk.num_chars for chunk in record.chunks) if name == "E2E" else 0,
            exception=error,
            context={},
        )
