"""What is kept of a request: its id, its span, its figures, its log line, and its account of tokens."""

import logging
import re
import time
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, format_trace_id
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from replicas.errors import TriadError
from replicas.messages import Failed, Finished
from router.auth import ApiKey
from router.dispatch import Generation
from router.errors import MAX_PARAM_LEN, ApiError, shortened
from router.guard import COMPLETIONS
from router.limits import Charge, KeyLimiter
from router.metrics import Metrics, Outcome
from telemetry.logs import FIELDS, LogContext, log_context
from telemetry.propagation import carrier_below, carrier_of, parent_context

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"

MAX_REQUEST_ID_LEN = 128
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_.:-]")
_SPAN = "triad_span"
_CARRIER = "triad_trace_carrier"
_FIELDS = "triad_log_fields"
_QUIET = frozenset({"/health", "/healthz", "/readyz", "/metrics"})
"""Asked every few seconds: neither traced nor logged."""


class AccessLog:
    """ASGI middleware around all others: request id, span, counter and log line of every answer.

    The caller's own X-Request-Id is kept as far as it is a plain word. answers_id: whether to answer with
    it, unless what stands before the app does, with the id as it came.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics | None, tracer: Tracer | None, answers_id: bool = True):
        self._app = app
        self._metrics = metrics
        self._tracer = tracer
        self._answers_id = answers_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        state = scope.setdefault("state", {})
        fields: dict[str, Any] = {}
        state[_FIELDS] = fields
        name = shortened(f"{scope['method']} {scope['path']}", MAX_PARAM_LEN)
        span = None
        if self._tracer is not None and scope["path"] not in _QUIET:
            attributes = {"http.request.method": scope["method"], "triad.request.id": request_id}
            parent = parent_context(carrier_of(scope["headers"]))
            span = state[_SPAN] = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes)
            state[_CARRIER] = carrier_below(span, parent)
        trace_id = None if span is None else format_trace_id(span.get_span_context().trace_id)
        token = log_context.set(LogContext(request_id, trace_id))
        status = 499
        began_s = time.monotonic()

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._answers_id:
                    MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            route = _route(scope)
            if self._metrics is not None:
                self._metrics.answered(route, status)
            if span is not None:
                span.set_attribute("http.response.status_code", status)
                span.set_attribute("http.route", route)
                if status >= 500:
                    span.set_status(Status(StatusCode.ERROR))
                span.end()
            if scope["path"] not in _QUIET and logger.isEnabledFor(logging.INFO):
                line = {"status": status, "duration_s": round(time.monotonic() - began_s, 6)} | fields
                logger.info("%s", name, extra={FIELDS: line})
            log_context.reset(token)


def _route(scope: Scope) -> str:
    """For metrics, so that any path a client may think of is one."""
    found: str | None = getattr(scope.get("route"), "path", None)
    if found is None and scope["path"] in COMPLETIONS:
        return str(scope["path"])  # refused before it was routed
    return found or "unknown"


def span_of(scope: Scope) -> Span | None:
    span: Span | None = scope.get("state", {}).get(_SPAN)
    return span


def trace_carrier_in(scope: Scope) -> Mapping[str, str]:
    """The context that spans below this request's belong to, as headers; empty without tracing."""
    carrier: Mapping[str, str] = scope.get("state", {}).get(_CARRIER, {})
    return carrier


class RequestLog:
    """Around one generation's answer: entered before it is sent off, left with however it ends."""

    def __init__(
        self,
        scope: Scope,
        operation: str,
        model: str,
        key: ApiKey | None,
        charge: Charge | None,
        metrics: Metrics | None,
        limiter: KeyLimiter | None,
    ):
        self._scope = scope
        self._operation = operation
        self._model = model
        self._key = key
        self._charge = charge
        self._metrics = metrics
        self._limiter = limiter
        self._generation: Generation | None = None
        self._began_s = time.monotonic()
        self._first_token_s: float | None = None
        self._error: str | None = None

    def of(self, generation: Generation) -> Self:
        self._generation = generation
        generation.on_end = self._count
        return self

    def first_token(self) -> None:
        self._first_token_s = time.monotonic() - self._began_s

    def failed(self, error: TriadError) -> None:
        """An error that leaves as an event in the stream."""
        self._error = error.code.value

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        generation = self._generation
        finished = None if generation is None else generation.finished
        if isinstance(error, TriadError):
            self.failed(error)
        elif isinstance(error, ApiError):
            self._error = error.code
        elif error is not None:
            self._error = type(error).__name__
        elif finished is None and self._error is None:
            self._error = "disconnected"
        num_made = 0 if generation is None else generation.num_tokens
        if self._limiter is not None and self._charge is not None:
            # What no replica has accepted has cost nothing; what one has, its prompt, however it ends.
            num_prompt = 0 if generation is None else generation.num_prompt_tokens
            self._limiter.settle(self._charge, num_prompt + num_made)
        duration_s = time.monotonic() - self._began_s
        if self._metrics is not None:
            outcome = Outcome(self._operation, duration_s, self._first_token_s, finished, self._error)
            self._metrics.ended(outcome)
        self._note(duration_s, num_made, self._key_name)

    @property
    def _key_name(self) -> str | None:
        return None if self._key is None else self._key.name

    def _count(self, last: Finished | Failed | None) -> None:
        """The tokens of a request, complete or not, once its replica has said how it ended."""
        generation = self._generation
        if self._metrics is None or generation is None:
            return
        for failed, num_tokens in generation.given_up:
            self._metrics.made(failed.report, num_tokens)
        self._metrics.made(None if last is None else last.report, generation.num_tokens)
        has_counted = last is not None and last.report is not None
        num_completion = last.num_completion_tokens if last and has_counted else generation.num_tokens
        self._metrics.used(self._key_name, generation.num_prompt_tokens, num_completion)

    def _note(self, duration_s: float, num_made: int, key_name: str | None) -> None:
        generation = self._generation
        finished = None if generation is None else generation.finished
        facts: dict[str, Any] = {
            "gen_ai.operation.name": self._operation,
            "gen_ai.provider.name": "triad",
            "gen_ai.request.model": self._model,
            "gen_ai.usage.output_tokens": num_made,
        }
        if generation is not None and finished is not None:
            report = finished.report
            facts |= {
                "gen_ai.usage.input_tokens": finished.num_prompt_tokens,
                "gen_ai.response.finish_reasons": [
                    reason.value for _, reason in sorted(generation.finish_reasons.items())
                ],
                "triad.forwards": report.num_forwards,
                "triad.mode_switches": report.num_switches,
                "triad.rule": report.rule,
                "triad.replica.id": report.replica_id,
            }
            facts |= {f"triad.tokens.{mode.value}": n for mode, n in report.tokens_by_mode.items()}
        if self._first_token_s is not None:
            facts["triad.first_token_s"] = round(self._first_token_s, 6)
        if key_name is not None:
            facts["triad.key"] = key_name
        if self._error is not None:
            facts["error.type"] = self._error
        self._scope.get("state", {}).get(_FIELDS, {}).update(facts)
        span = span_of(self._scope)
        if span is not None:
            span.set_attributes(facts)
            if self._error not in (None, "disconnected"):
                span.set_status(Status(StatusCode.ERROR, self._error))


def _request_id(scope: Scope) -> str:
    given = _header(scope, REQUEST_ID_HEADER.encode())
    return _NOT_PLAIN.sub("_", given)[:MAX_REQUEST_ID_LEN] if given else f"req-{uuid.uuid4().hex}"


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
