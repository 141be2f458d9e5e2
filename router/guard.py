"""What stands before the routes: header limits, and who is let in. Pure ASGI."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from replicas.errors import TriadError
from router.auth import ApiKey, KeyRing
from router.errors import ApiError, api_error_response, triad_error_response

OPEN_PATHS = frozenset({"/health", "/healthz", "/readyz", "/metrics"})
"""For probes and scrapers, which have no key."""
COMPLETIONS = frozenset({"/v1/chat/completions", "/v1/completions"})
ADMIN_CALLS = frozenset({("PUT", "/v1/triad/policy"), ("DELETE", "/v1/triad/policy")})

_STATE_KEY = "triad_api_key"


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is taken of a client, explained to operators in cluster.config."""

    max_body_bytes: int = 8 * 2**20
    body_timeout_s: float = 60.0
    max_header_bytes: int = 32 * 2**10
    max_headers: int = 100
    max_json_depth: int = 32
    max_prompt_chars: int = 1_000_000


@dataclass(frozen=True, slots=True)
class GuardConfig:
    """bounds aside: where the keys are, what happens to limited keys without Redis, and which sites'
    pages may call ("*" is any)."""

    api_keys_file: str | None = None
    limits_without_redis: Literal["open", "closed"] = "open"
    limits_timeout_s: float = 0.1
    cors_origins: tuple[str, ...] = ()


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
                await api_error_response(error)(scope, receive, send)
                return
            scope.setdefault("state", {})[_STATE_KEY] = key
        await self._app(scope, receive, send)

    def _check_headers(self, headers: list[tuple[bytes, bytes]]) -> None:
        num_bytes = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > self._bounds.max_headers or num_bytes > self._bounds.max_header_bytes:
            message = (
                f"At most {self._bounds.max_headers} headers of {self._bounds.max_header_bytes} bytes "
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
        if scope["path"] in OPEN_PATHS:
            return None
        key = self._keys.find(_bearer(scope["headers"]))
        if key is None:
            raise ApiError(401, "invalid_api_key", "Incorrect API key provided.")
        if is_admin_call and not key.admin:
            message = "This needs an admin key."
            raise ApiError(403, "admin_key_required", message, type_="permission_error")
        return key


class LoadShedding:
    """ASGI middleware: while all places are taken a completion is refused before its body is read.

    So that under overload refusals take little from what is served. check: raises TriadError.
    """

    def __init__(self, app: ASGIApp, check: Callable[[], None]):
        self._app = app
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in COMPLETIONS:
            try:
                self._check()
            except TriadError as error:
                await triad_error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def key_of(request: Request) -> ApiKey | None:
    """The caller's key, as the Guard has found it."""
    key: ApiKey | None = getattr(request.state, _STATE_KEY, None)
    return key


def _bearer(headers: list[tuple[bytes, bytes]]) -> str:
    values = [value for name, value in headers if name == b"authorization"]
    if not values:
        message = "You didn't provide an API key. Send it as the header Authorization: Bearer <key>."
        raise ApiError(401, "missing_api_key", message)
    scheme, _, key = values[0].decode("latin-1").strip().partition(" ")
    if len(values) > 1 or scheme.lower() != "bearer" or not key.strip():
        raise ApiError(401, "invalid_api_key", "Send the key as one header Authorization: Bearer <key>.")
    return key.strip()
