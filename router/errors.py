"""The one table from domain errors to HTTP answers in OpenAI's form, and the handlers for all others."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from replicas.errors import ErrorCode, TriadError
from router.admission_control import Admission, Shed

RETRY_AFTER_S = 1
"""The wait that a contended or starting server asks of a client."""
MAX_MESSAGE_LEN = 2000
MAX_PARAM_LEN = 200
ANTHROPIC_PATH = "/v1/messages"
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Anthropic's names of errors by status."""
_CODES = {413: "request_entity_too_large"}
"""The codes that are not the status's name in every version of Python."""


@dataclass(frozen=True, slots=True)
class HttpError:
    """One kind of error as it looks over HTTP."""

    status: int
    type: str
    retry_after_s: int | None = None


HTTP_ERRORS: Mapping[ErrorCode, HttpError] = {
    ErrorCode.INVALID_REQUEST: HttpError(400, "invalid_request_error"),
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: HttpError(400, "invalid_request_error"),
    ErrorCode.QUEUE_FULL: HttpError(429, "rate_limit_error", RETRY_AFTER_S),
    ErrorCode.UNAVAILABLE: HttpError(503, "service_unavailable_error", RETRY_AFTER_S),
    ErrorCode.DEADLINE_EXCEEDED: HttpError(504, "timeout_error"),
    ErrorCode.CANCELLED: HttpError(499, "cancelled_error"),
    ErrorCode.INTERNAL: HttpError(500, "server_error"),
}


class Overloaded(TriadError):
    """A refusal at the door, before any work.

    retry_after_s: whole seconds
    """

    def __init__(self, code: ErrorCode, message: str, retry_after_s: int):
        super().__init__(code, message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type, tuple[ErrorCode, str, int]]:  # type: ignore[override]
        return type(self), (self.code, self.message, self.retry_after_s)


def raise_if_shed(verdict: Admission) -> None:
    """Raises Overloaded: UNAVAILABLE (503) where there is no capacity, QUEUE_FULL (429) where it is taken."""
    if not isinstance(verdict, Shed):
        return
    if verdict.contended:
        message = f"The server is full ({verdict.reason}); try again in {verdict.retry_after_s} s."
        raise Overloaded(ErrorCode.QUEUE_FULL, message, verdict.retry_after_s)
    raise Overloaded(ErrorCode.UNAVAILABLE, "No replica can take the request.", verdict.retry_after_s)


class ApiError(HTTPException):
    """An error of the HTTP door itself, which no replica knows of.

    An HTTPException, because FastAPI makes any other error in a body's reading a 400.
    """

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        param: str | None = None,
        type_: str = "invalid_request_error",
        retry_after_s: int | None = None,
    ):
        super().__init__(status, message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.type = type_
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (
            self.status,
            self.code,
            self.message,
            self.param,
            self.type,
            self.retry_after_s,
        )


def rate_limited(what: str, wait_s: float) -> ApiError:
    """The error for an API key whose limit is used up; the server itself may be idle."""
    retry_after_s = max(1, math.ceil(wait_s))
    message = f"{what}; try again in {retry_after_s} s."
    return ApiError(
        429, "rate_limit_exceeded", message, type_="rate_limit_error", retry_after_s=retry_after_s
    )


def shortened(text: str, most: int) -> str:
    """The text cut to a bounded length, for quoting what a client sent, which may be of any."""
    return text if len(text) <= most else text[: most - 1] + "…"


def error_body(type_: str, code: str | None, message: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    message = shortened(message, MAX_MESSAGE_LEN)
    if param is not None:
        param = shortened(param, MAX_PARAM_LEN)
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def triad_error_body(error: TriadError) -> dict[str, Any]:
    return error_body(HTTP_ERRORS[error.code].type, error.code, error.message, error.param)


def anthropic_error_body(status: int, error: Mapping[str, Any]) -> dict[str, Any]:
    """Anthropic's error object, which has no place for the field at fault but its message.

    error: OpenAI's
    """
    type_ = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    param, message = error["param"], error["message"]
    if param is not None and param not in message:
        message = f"{param}: {message}"
    return {"type": "error", "error": {"type": type_, "message": message}}


def encode(body: Any) -> bytes:
    """JSON in UTF-8. A lone surrogate, which UTF-8 doesn't have, becomes '?'."""
    return _ENCODER.encode(body).encode(errors="replace")


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode(body), status, headers, media_type="application/json")


def retry_headers(after_s: int | None) -> dict[str, str]:
    """When to come again, as headers, drawn anew for each answer from after_s to half as much again.

    Clients that were refused together, and obey to the second, would otherwise come back together. OpenAI's
    SDKs read the milliseconds.
    """
    if after_s is None:
        return {}
    wait_s = after_s + random.uniform(0.0, max(1.0, after_s / 2))
    return {"Retry-After": str(round(wait_s)), "Retry-After-Ms": str(round(1000 * wait_s))}


def error_response(
    path: str, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> Response:
    """The answer to a call of a path, in the form that its API gives errors.

    body: in OpenAI's form
    """
    if path.startswith(ANTHROPIC_PATH):
        body = anthropic_error_body(status, body["error"])
    return json_response(body, status, headers)


def triad_error_response(error: TriadError, path: str) -> Response:
    http = HTTP_ERRORS[error.code]
    retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else http.retry_after_s
    return error_response(path, http.status, triad_error_body(error), retry_headers(retry_after_s))


def api_error_response(error: ApiError, path: str) -> Response:
    headers = retry_headers(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = error_body(error.type, error.code, error.message, error.param)
    return error_response(path, error.status, body, headers)


def bad_request(code: str | None, message: str, param: str | None = None) -> ApiError:
    return ApiError(400, code, message, param)


def param_name(location: Sequence[int | str]) -> str | None:
    """A field's place in the body, in OpenAI's spelling: ("messages", 0, "role") -> "messages[0].role"."""
    name = ""
    for part in location:
        if part != "[key]":  # so pydantic says that a member's name is at fault, not its value
            name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return shortened(name, MAX_PARAM_LEN) or None


def bad_value(problem: Mapping[str, Any]) -> ApiError:
    """The answer to one of pydantic's problems, whose place begins at the body."""
    location = [*problem["loc"]]
    if problem["type"] in ("conflict", "unknown_field"):
        location.append(problem["ctx"]["field"])
    param = param_name(location)
    match problem["type"]:
        case "unknown_field" | "extra_forbidden":
            return bad_request("unknown_parameter", f"Unknown parameter: '{param}'.", param)
        case "missing" if param is not None:
            message = f"Missing required parameter: '{param}'."
            return bad_request("missing_required_parameter", message, param)
        case "unsupported_parameter" | "unsupported_value" as code:
            return bad_request(code, f"Unsupported '{param}': {problem['msg']}", param)
    if param is None:
        message = "The body must be a JSON object, sent with Content-Type: application/json."
        return bad_request(None, message)
    return bad_request("invalid_value", f"Invalid '{param}': {problem['msg']}.", param)


def validation_error(error: RequestValidationError) -> ApiError:
    """The answer to the first problem found, since OpenAI's form has room for one."""
    problem = dict(error.errors()[0])
    source, *location = problem["loc"]
    if problem["type"] == "json_invalid":
        return bad_request("invalid_json", f"The body is not valid JSON: {problem['ctx']['error']}.")
    problem["loc"] = location if source == "body" else location[-1:]
    return bad_value(problem)


def add_error_handlers(app: FastAPI) -> None:
    """Makes every error leave in OpenAI's form: domain errors, bad bodies, unknown paths, and bugs."""

    @app.exception_handler(TriadError)
    async def on_triad_error(request: Request, error: TriadError) -> Response:
        return triad_error_response(error, request.url.path)

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return api_error_response(error, request.url.path)

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> Response:
        return api_error_response(validation_error(error), request.url.path)

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> Response:
        status = HTTPStatus(error.status_code)
        message = f"{status.phrase}: {request.method} {request.url.path}"
        if error.detail != status.phrase:
            message += f" ({error.detail})"
        code = _CODES.get(status, status.name.lower())
        body = error_body("invalid_request_error", code, message)
        return error_response(request.url.path, error.status_code, body, error.headers)

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        # Starlette raises it again once this is sent, and the server logs it.
        failed = TriadError(ErrorCode.INTERNAL, "The server failed; see its log.")
        return triad_error_response(failed, request.url.path)
