"""The middleware before the routes, as pure ASGI, and its order."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, format_trace_id
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from replicas.errors import TriadError
from router.auth import STATE_KEY, ApiKey, KeyRing
from router.config import MAX_HEADERS, Bounds
from router.decompress import Decompression
from router.errors import MAX_PARAM_LEN, ApiError, api_error_response, shortened, triad_error_response
from router.metrics import Metrics
from router.paths import COMPLETIONS, DIRECT
from router.request_log import CARRIER, LOG_FIELDS, SPAN
from telemetry.logs import ACCESS, FIELDS, LogContext, log_context
from telemetry.propagation import carrier_below, carrier_of, parent_context

logger = logging.getLogger(ACCESS)

REQUEST_ID_HEADER = "x-request-id"
MAX_REQUEST_ID_LEN = 128
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_.:-]")

OPEN_PATHS = frozenset({"/health", "/healthz", "/ping", "/readyz", "/metrics"})
"""Paths for probes and scrapers, which have no key and ask every few seconds: neither traced nor logged."""
PUBLIC_PREFIX = "/console/"
"""The console's files, which like its page `/` hold no secret: the page itself asks for a key."""
WATCHERS_CALLS = frozenset({("GET", "/v1/triad/events"), ("POST", "/v1/triad/burst")})
"""Calls that need an admin key where there are keys; where there are none, anybody may do as much by other
calls."""
LINGER_S = 1.0
"""The time for which an answered client may go on with a body that nobody wants."""
ONLY_HEAD = "triad_only_head"
"""Set in the scope of a HEAD, of which a stream without an end must know."""
ADMIN_CALLS = frozenset({("PUT", "/v1/triad/policy"), ("DELETE", "/v1/triad/policy")})


def layers(
    *,
    keys: KeyRing,
    bounds: Bounds,
    check_room: Callable[[], None],
    metrics: Metrics | None,
    tracer: Tracer | None,
    answers_id: bool,
    cors_origins: Sequence[str],
) -> list[Middleware]:
    """All middleware, from the outside in.

    check_room: LoadShedding's check

    A browser asks beforehand, without a key, so CORS precedes the check of keys.
    """
    found = [Middleware(LenientPaths), Middleware(AccessLog, metrics, tracer, answers_id)]
    if cors_origins:
        found.append(
            Middleware(
                CORSMiddleware,
                allow_origins=cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],  # SDKs send many of their own
                expose_headers=[REQUEST_ID_HEADER, "Retry-After", "Retry-After-Ms", "Warning"],
            )
        )
    found.append(Middleware(AuthMiddleware, keys, bounds))
    found.append(Middleware(LoadShedding, check_room))
    found.append(Middleware(BodyLimit, bounds.max_body_bytes, bounds.body_timeout_s))
    found.append(Middleware(Decompression, bounds.max_body_bytes))
    return found


class LenientPaths:
    """ASGI middleware: HEAD is answered wherever GET is, with all but the body, and a slash at a path's end
    is nothing."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_bare(message: Message) -> None:
            await send({**message, "body": b""} if "body" in message else message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A copy, since the server looks at its own to know that no body follows.
        scope = dict(scope, path=scope["path"].rstrip("/") or "/")
        if scope["method"] == "HEAD":
            await self._app({**scope, "method": "GET", ONLY_HEAD: True}, receive, send_bare)
        else:
            await self._app(scope, receive, send)


class AccessLog:
    """ASGI middleware around all others: request id, span, counter and log line of every answer.

    answers_id: True to answer with the id; False where what serves the app does, with the id as it came, to
      all but what router.direct brings

    The caller's own X-Request-Id is kept as far as it is a plain word.
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
        state[LOG_FIELDS] = fields
        name = _plain(shortened(f"{scope['method']} {scope['path']}", MAX_PARAM_LEN))
        span = None
        if self._tracer is not None and scope["path"] not in OPEN_PATHS:
            attributes = {"http.request.method": scope["method"], "triad.request.id": request_id}
            parent = parent_context(carrier_of(scope["headers"]))
            span = state[SPAN] = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes)
            state[CARRIER] = carrier_below(span, parent)
        trace_id = None if span is None else format_trace_id(span.get_span_context().trace_id)
        token = log_context.set(LogContext(request_id, trace_id))
        status = 499
        began_s = time.monotonic()
        answers_id = self._answers_id or DIRECT in scope

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if answers_id:
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
            if scope["path"] not in OPEN_PATHS and logger.isEnabledFor(logging.INFO):
                duration_s = time.monotonic() - began_s
                line = {"status": status, "duration_s": round(duration_s, 6)} | fields
                logger.info("%s %d %.1fms", name, status, 1e3 * duration_s, extra={FIELDS: line})
            log_context.reset(token)


def _plain(text: str) -> str:
    """The text without what would end a line of the log: a path may have any character."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _route(scope: Scope) -> str:
    """The route for metrics, in which all paths that a client may think up are one."""
    found: str | None = getattr(scope.get("route"), "path", None)
    if found is None and scope["path"] in COMPLETIONS:
        return str(scope["path"])  # refused before it was routed
    return found or "unknown"


class AuthMiddleware:
    """ASGI middleware: an answer of 431, 401 or 403, or the app with the key in the request's state."""

    def __init__(self, app: ASGIApp, keys: KeyRing, bounds: Bounds):
        self._app = app
        self._keys = keys
        self._bounds = bounds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check_headers(scope["headers"])
                key = self._let_in(scope)
            except ApiError as error:
                await api_error_response(error, scope["path"])(scope, receive, send)
                return
            scope.setdefault("state", {})[STATE_KEY] = key
        await self._app(scope, receive, send)

    def _check_headers(self, headers: list[tuple[bytes, bytes]]) -> None:
        num_bytes = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > MAX_HEADERS or num_bytes > self._bounds.max_header_bytes:
            message = (
                f"At most {MAX_HEADERS} headers of {self._bounds.max_header_bytes} bytes "
                f"in all are taken; there are {len(headers)} of {num_bytes}."
            )
            raise ApiError(431, "headers_too_large", message)

    def _let_in(self, scope: Scope) -> ApiKey | None:
        is_admin_call = (scope["method"], scope["path"]) in ADMIN_CALLS
        if self._keys.is_open:
            if is_admin_call:
                message = "No admin key is configured; see api_keys_file and python -m cluster.new_key."
                raise ApiError(403, "admin_key_required", message, type_="permission_error")
            return None
        if scope["path"] in OPEN_PATHS or _is_public(scope):
            return None
        key = self._keys.find(_bearer(scope["headers"]))
        if key is None:
            raise ApiError(401, "invalid_api_key", "Incorrect API key provided.")
        if not key.admin and (is_admin_call or (scope["method"], scope["path"]) in WATCHERS_CALLS):
            message = "This needs an admin key."
            raise ApiError(403, "admin_key_required", message, type_="permission_error")
        return key


def _is_public(scope: Scope) -> bool:
    path: str = scope["path"]
    return scope["method"] == "GET" and (path == "/" or path.startswith(PUBLIC_PREFIX))


class LoadShedding:
    """ASGI middleware: while all places are taken a completion is refused before its body is read.

    check: raises TriadError

    Under overload refusals thus take little from what is served.
    """

    def __init__(self, app: ASGIApp, check: Callable[[], None]):
        self._app = app
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in COMPLETIONS:
            try:
                self._check()
            except TriadError as error:
                await triad_error_response(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """ASGI middleware: a body longer than max_bytes is a 413, whether or not its length is declared, and one
    that is not whole timeout_s after its head a 408, however steadily it trickles."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float):
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes = 0
        is_whole = False
        deadline_s = asyncio.get_running_loop().time() + self._timeout_s

        async def limited() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline_s):
                    message = await receive()
            except TimeoutError:
                told = f"the body was not whole after {self._timeout_s:g} s"
                raise HTTPException(408, told, {"Connection": "close"}) from None
            is_whole = not message.get("more_body", False)
            num_bytes += len(message.get("body", b""))
            # An HTTPException, because FastAPI makes any other error in a body's reading a 400.
            if num_bytes > self._max_bytes:
                raise HTTPException(413, f"the body is over {self._max_bytes} bytes")
            return message

        async def lingering(message: Message) -> None:
            is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if is_whole or not is_last:
                await send(message)
                return
            await send({**message, "more_body": True})
            await _discard(receive)
            await send({"type": "http.response.body", "body": b""})

        if scope["type"] == "http":
            await self._app(scope, limited, lingering)
        else:
            await self._app(scope, receive, send)


async def _discard(receive: Receive) -> None:
    """Reads what still comes of a body, for a while: a connection that is closed with bytes unread is reset,
    and a client that is still sending may so lose the answer."""
    try:
        async with asyncio.timeout(LINGER_S):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass
    except TimeoutError:
        return


def _request_id(scope: Scope) -> str:
    given = _header(scope, REQUEST_ID_HEADER.encode())
    return _NOT_PLAIN.sub("_", given)[:MAX_REQUEST_ID_LEN] if given else f"req-{uuid.uuid4().hex}"


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def _bearer(headers: list[tuple[bytes, bytes]]) -> str:
    values = [value for name, value in headers if name == b"authorization"]
    keys = [value for name, value in headers if name == b"x-api-key"]  # as Anthropic's clients send it
    if not values and len(keys) == 1:
        return keys[0].decode("latin-1").strip()
    if not values:
        message = "You didn't provide an API key. Send it as the header Authorization: Bearer <key>."
        raise ApiError(401, "missing_api_key", message)
    scheme, _, key = values[0].decode("latin-1").strip().partition(" ")
    if len(values) > 1 or scheme.lower() != "bearer" or not key.strip():
        raise ApiError(401, "invalid_api_key", "Send the key as one header Authorization: Bearer <key>.")
    return key.strip()
