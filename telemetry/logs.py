"""Log lines, as text, or as JSON with the request and the trace that each belongs to, if any."""

import json
import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

PACKAGES = ("policies", "replicas", "router", "cluster", "telemetry")
TEXT_FORMAT = "%(levelname)s %(asctime)s %(name)s: %(message)s"
ACCESS = "router.access"
"""The logger of a line a request."""

FIELDS = "triad"
"""The key of more fields for a line: `logger.info(..., extra={FIELDS: {...}})`."""


@dataclass(frozen=True, slots=True)
class LogContext:
    """The request and the trace that log lines belong to."""

    request_id: str
    trace_id: str | None = None


log_context: ContextVar[LogContext | None] = ContextVar("triad_log_context", default=None)


class JsonFormatter(logging.Formatter):
    """Writes each log line as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": at,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        context = log_context.get()
        if context is not None:
            line["request_id"] = context.request_id
            if context.trace_id is not None:
                line["trace_id"] = context.trace_id
        more = getattr(record, FIELDS, None)
        if isinstance(more, Mapping):
            line |= more
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logs(log_format: str) -> None:
    """Sends this process's lines, from INFO up, to stderr, each as JSON for `json`."""
    is_json = log_format == "json"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if is_json else logging.Formatter(TEXT_FORMAT))
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
