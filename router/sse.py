"""Answers as OpenAI sends them: JSON bodies, and server-sent events for streams."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from replicas.errors import TriadError
from replicas.messages import DecodingReport, Finished
from router.errors import encode, triad_error_body

DONE = b"data: [DONE]\n\n"


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(body) + b"\n\n"


def error_event(error: TriadError) -> bytes:
    """Ends a stream that has already begun; no [DONE] follows."""
    return event(triad_error_body(error))


def decoding_report(report: DecodingReport) -> dict[str, Any]:
    """Triad's `decoding` field: how the answer was made."""
    return {
        "tokens": {mode.value: num for mode, num in sorted(report.tokens_by_mode.items())},
        "forwards": report.num_forwards,
        "tokens_per_forward": round(report.tokens_per_forward, 3),
        "switches": report.num_switches,
        "rule": report.rule,
        "replica": report.replica_id,
    }


def usage(finished: Finished) -> dict[str, Any]:
    return {
        "prompt_tokens": finished.num_prompt_tokens,
        "completion_tokens": finished.num_completion_tokens,
        "total_tokens": finished.num_prompt_tokens + finished.num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": finished.num_reused_tokens},
    }


@dataclass(frozen=True, slots=True)
class Answer(ABC):
    """Writes one request's answer, streamed or whole.

    created: seconds since 1970. include_usage: end a stream with a chunk that has the usage.
    """

    completion_id: str
    model: str
    created: int
    include_usage: bool = False

    @abstractmethod
    def head(self) -> bytes:
        """What a stream begins with."""

    @abstractmethod
    def delta(self, text: str) -> bytes:
        """New text, as it comes."""

    @abstractmethod
    def whole(self, text: str, finished: Finished) -> dict[str, Any]:
        """The body of an answer that is not streamed."""

    @abstractmethod
    def _last_choice(self, finish_reason: str) -> Mapping[str, Any]: ...

    def tail(self, finished: Finished) -> bytes:
        """The chunk with the finish reason and the decoding report; the usage, if asked for; [DONE]."""
        choice = self._last_choice(finished.reason.value)
        last = self._chunk(choice, decoding=decoding_report(finished.report))
        if not self.include_usage:
            return last + DONE
        body = self._envelope(self._chunk_object, []) | {"usage": usage(finished)}
        return last + event(body) + DONE

    @property
    @abstractmethod
    def _chunk_object(self) -> str: ...

    def _chunk(self, choice: Mapping[str, Any], **more: Any) -> bytes:
        body = self._envelope(self._chunk_object, [choice]) | more
        if self.include_usage:
            body["usage"] = None
        return event(body)

    def _envelope(self, object_: str, choices: list[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.completion_id,
            "object": object_,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _body(self, object_: str, choice: Mapping[str, Any], finished: Finished) -> dict[str, Any]:
        report = {"usage": usage(finished), "decoding": decoding_report(finished.report)}
        return self._envelope(object_, [choice]) | report


class ChatAnswer(Answer):
    __slots__ = ()

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk"

    def head(self) -> bytes:
        return self._chunk(self._choice({"role": "assistant", "content": ""}))

    def delta(self, text: str) -> bytes:
        return self._chunk(self._choice({"content": text}))

    def whole(self, text: str, finished: Finished) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finished.reason.value}
        return self._body("chat.completion", choice, finished)

    def _last_choice(self, finish_reason: str) -> Mapping[str, Any]:
        return self._choice({}, finish_reason)

    def _choice(self, delta: Mapping[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


class TextAnswer(Answer):
    __slots__ = ()

    @property
    def _chunk_object(self) -> str:
        return "text_completion"

    def head(self) -> bytes:
        return b""

    def delta(self, text: str) -> bytes:
        return self._chunk(self._choice(text))

    def whole(self, text: str, finished: Finished) -> dict[str, Any]:
        return self._body(self._chunk_object, self._choice(text, finished.reason.value), finished)

    def _last_choice(self, finish_reason: str) -> Mapping[str, Any]:
        return self._choice("", finish_reason)

    def _choice(self, text: str, finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
