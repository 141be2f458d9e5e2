"""The records of one generation: its span's attributes, its figures, its log line's fields, its account."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from opentelemetry.trace import Span, Status, StatusCode
from starlette.types import Scope

from replicas.errors import ErrorCode, TriadError
from replicas.messages import Failed, Finished
from router.auth import ApiKey
from router.errors import ApiError
from router.generation import Generation
from router.limits import Charge, KeyLimiter
from router.metrics import Metrics, Outcome

SPAN = "triad_span"
CARRIER = "triad_trace_carrier"
LOG_FIELDS = "triad_log_fields"
"""The keys, in a request's state, of its span, the headers for spans below it, and its log line's fields."""


def span_of(scope: Scope) -> Span | None:
    """The request's span; None without tracing."""
    span: Span | None = scope.get("state", {}).get(SPAN)
    return span


def trace_carrier_in(scope: Scope) -> Mapping[str, str]:
    """The context that spans below this request's belong to, as headers; empty without tracing."""
    carrier: Mapping[str, str] = scope.get("state", {}).get(CARRIER, {})
    return carrier


class RequestLog:
    """Records one generation's answer: entered before it is sent off, left with however it ends."""

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
        """Notes an error that leaves as an event in the stream."""
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
            num_prompt = 0 if generation is None else generation.accepted.num_prompt_tokens
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
        """Counts the tokens of a request, complete or not, once its replica has said how it ended."""
        generation = self._generation
        if self._metrics is None or generation is None:
            return
        for failed, num_tokens in generation.given_up:
            self._metrics.made(failed.report, num_tokens)
            made = num_tokens if failed.report is None else failed.num_completion_tokens
            self._metrics.cancelled(failed.code.value, made)
        self._metrics.made(None if last is None else last.report, generation.num_tokens)
        has_counted = last is not None and last.report is not None
        num_completion = last.num_completion_tokens if last and has_counted else generation.num_tokens
        if isinstance(last, Finished):
            self._metrics.reused(last.num_reused_tokens)
        else:
            why = ErrorCode.UNAVAILABLE if last is None else last.code
            self._metrics.cancelled(why.value, num_completion)
        self._metrics.used(self._key_name, generation.accepted.num_prompt_tokens, num_completion)

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
        self._scope.get("state", {}).get(LOG_FIELDS, {}).update(facts)
        span = span_of(self._scope)
        if span is not None:
            span.set_attributes(facts)
            if self._error not in (None, "disconnected"):
                span.set_status(Status(StatusCode.ERROR, self._error))
