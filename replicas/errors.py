"""The errors a replica can answer with. The router maps each code to one HTTP status, in one table."""

from enum import StrEnum


class ErrorCode(StrEnum):
    INVALID_REQUEST = "invalid_request"
    """The request can't be served as it stands; the message says what to change."""
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    QUEUE_FULL = "queue_full"
    """The replica is contended; the same request may succeed later."""
    UNAVAILABLE = "unavailable"
    """No replica can take the request: starting, draining or gone."""
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    INTERNAL = "internal_error"


class TriadError(Exception):
    """A domain error that ends one request.

    param names the request field at fault, in the API's spelling, where there is one.
    """

    def __init__(self, code: ErrorCode, message: str, param: str | None = None):
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[type, tuple[ErrorCode, str, str | None]]:
        return type(self), (self.code, self.message, self.param)


def context_exceeded(max_context: int, counted: str, param: str) -> TriadError:
    """The error for a prompt that leaves no room, in OpenAI's words, by which clients find a longer model.

    counted: what follows "your request", as "has 1200 input tokens"
    """
    message = (
        f"This model's maximum context length is {max_context} tokens. However, your request {counted}. "
        "Please reduce the length of the input."
    )
    return TriadError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, message, param)
