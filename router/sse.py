"""Answers as OpenAI sends them: JSON bodies, and server-sent events for streams."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from replicas.errors import TriadError
from replicas.messages import DecodingReport, Delta, Finished, FinishReason, TextLogprob
from router.errors import encode, triad_error_body

DONE = b"data: [DONE]\n\n"
NUM_AT_ONCE = 256
"""Log-probabilities written in one go; after each the loop sees to its other streams."""
_NO_LOGPROBS = b'"logprobs":null'
"""A mark to split at, which stands in no text, where JSON escapes the quotes."""
MIN_LOGPROB = -9999.0
"""OpenAI's log-probability for the impossible."""


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(body) + b"\n\n"


def error_event(error: TriadError) -> bytes:
    """The event that ends a stream already begun with an error; no [DONE] follows."""
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


def traced(delta: Delta) -> dict[str, Any]:
    """A chunk's `decoding`, where the request asks for a trace: which forwards let its tokens out."""
    if not delta.trace:
        return {}
    parts = [
        {"mode": part.mode.value, "forward": part.forward, "tokens": part.num_tokens, "text": part.text}
        for part in delta.trace
    ]
    return {"decoding": {"trace": parts}}


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens of a request so far: of its prompts, each counted once, and of all its choices."""

    num_prompt: int
    num_completion: int = 0

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_completion,
            "total_tokens": self.num_prompt + self.num_completion,
        }


def usage(finished: Finished) -> dict[str, Any]:
    counts = Counts(finished.num_prompt_tokens, finished.num_completion_tokens)
    return counts.usage() | {"prompt_tokens_details": {"cached_tokens": finished.num_reused_tokens}}


@dataclass(frozen=True, slots=True)
class Answer(ABC):
    """Writes one request's answer, streamed or whole."""

    completion_id: str
    model: str
    created: int
    """Seconds since 1970."""
    include_usage: bool = False
    """True to end a stream with a chunk that has the usage."""
    continuous_usage: bool = False
    """True to have the usage so far in each chunk, as vLLM's and SGLang's do when asked."""
    num_choices: int = 1
    num_logprobs: int | None = None
    """Alternatives asked for with each token, None where no log-probabilities were."""

    @abstractmethod
    def head(self, so_far: Counts) -> bytes:
        """The beginning of a stream."""

    @abstractmethod
    def delta(self, delta: Delta, so_far: Counts) -> bytes:
        """The chunk for new text of a choice; so_far has this text's tokens included."""

    @abstractmethod
    def whole(self, choices: Sequence[Delta], finished: Finished) -> dict[str, Any]:
        """The body of an answer that is not streamed."""

    @abstractmethod
    def _last_choice(self, index: int, reason: FinishReason) -> Mapping[str, Any]: ...

    @abstractmethod
    def logprobs(self, entries: Sequence[TextLogprob]) -> dict[str, Any]:
        """A choice's `logprobs`, whose lists are those of its parts one after another."""

    def end(self, index: int, reason: FinishReason, so_far: Counts) -> bytes:
        """The last chunk of a choice that others outlast."""
        return self._chunk(self._last_choice(index, reason), so_far)

    def tail(self, index: int, reason: FinishReason, finished: Finished) -> bytes:
        """The end of the last choice, with the decoding report; the usage, if asked for; [DONE]."""
        choice = self._last_choice(index, reason)
        counts = Counts(finished.num_prompt_tokens, finished.num_completion_tokens)
        last = self._chunk(choice, counts, decoding=decoding_report(finished.report))
        if not self.include_usage:
            return last + DONE
        body = self._envelope(self._chunk_object, []) | {"usage": usage(finished)}
        return last + event(body) + DONE

    @property
    @abstractmethod
    def _chunk_object(self) -> str: ...

    def _asked_logprobs(self, delta: Delta) -> dict[str, Any] | None:
        return None if self.num_logprobs is None else self.logprobs(delta.logprobs)

    def _chunk(self, choice: Mapping[str, Any], so_far: Counts, **more: Any) -> bytes:
        body = self._envelope(self._chunk_object, [choice]) | more
        if self.continuous_usage:
            body["usage"] = so_far.usage()
        elif self.include_usage:
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

    def _body(self, object_: str, choices: list[Mapping[str, Any]], finished: Finished) -> dict[str, Any]:
        report = {"usage": usage(finished), "decoding": decoding_report(finished.report)}
        return self._envelope(object_, choices) | report


async def delta_event(answer: Answer, delta: Delta, so_far: Counts) -> bytes:
    """answer.delta(...), however many log-probabilities a slow reader has let pile up.

    A step brings one of each choice, so after one that has some the loop may see to other streams.
    """
    if _num_logprobs(answer, (delta,)) <= NUM_AT_ONCE:
        if delta.logprobs:
            await asyncio.sleep(0)
        return answer.delta(delta, so_far)
    before, after = replace(answer, num_logprobs=None).delta(delta, so_far).split(_NO_LOGPROBS)
    return b"".join((before, await _logprobs_json(answer, delta.logprobs), after))


async def whole_body(answer: Answer, choices: Sequence[Delta], finished: Finished) -> list[bytes]:
    """answer.whole(...) as JSON, in pieces."""
    if _num_logprobs(answer, choices) <= NUM_AT_ONCE:
        return [encode(answer.whole(choices, finished))]
    bare = encode(replace(answer, num_logprobs=None).whole(choices, finished))
    before, *after = bare.split(_NO_LOGPROBS)
    pieces = [before]
    for choice, rest in zip(choices, after, strict=True):
        pieces += [await _logprobs_json(answer, choice.logprobs), rest]
    return pieces


def _num_logprobs(answer: Answer, deltas: Sequence[Delta]) -> int:
    return sum(len(delta.logprobs) for delta in deltas) * (1 + (answer.num_logprobs or 0))


async def _logprobs_json(answer: Answer, entries: Sequence[TextLogprob]) -> bytes:
    """The member `logprobs` of a choice: its lists written a part at a time, side by side."""
    lists: dict[str, list[bytes]] = {}
    others: dict[str, Any] = {}
    step = max(1, NUM_AT_ONCE // (1 + (answer.num_logprobs or 0)))
    for start in range(0, max(1, len(entries)), step):
        for name, value in answer.logprobs(entries[start : start + step]).items():
            if isinstance(value, list):
                lists.setdefault(name, []).append(encode(value)[1:-1])
            else:
                others[name] = value
        await asyncio.sleep(0)
    members = [b"%b:[%b]" % (encode(name), b",".join(parts)) for name, parts in lists.items()]
    members += [b"%b:%b" % (encode(name), encode(value)) for name, value in others.items()]
    return b'"logprobs":{%b}' % b",".join(members)


class ChatAnswer(Answer):
    __slots__ = ()

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk"

    def head(self, so_far: Counts) -> bytes:
        role = {"role": "assistant", "content": ""}
        return b"".join(self._chunk(_chat_chunk(index, role), so_far) for index in range(self.num_choices))

    def delta(self, delta: Delta, so_far: Counts) -> bytes:
        choice = _chat_chunk(delta.index, {"content": delta.text}, self._asked_logprobs(delta))
        return self._chunk(choice, so_far, **traced(delta))

    def whole(self, choices: Sequence[Delta], finished: Finished) -> dict[str, Any]:
        return self._body("chat.completion", [self._choice(choice) for choice in choices], finished)

    def _choice(self, whole: Delta) -> dict[str, Any]:
        return {
            "index": whole.index,
            "message": {"role": "assistant", "content": whole.text, "refusal": None},
            "logprobs": self._asked_logprobs(whole),
            "finish_reason": whole.reason,
        }

    def _last_choice(self, index: int, reason: FinishReason) -> Mapping[str, Any]:
        return _chat_chunk(index, {}, None, reason)

    def logprobs(self, entries: Sequence[TextLogprob]) -> dict[str, Any]:
        content = [
            _chat_logprob(entry) | {"top_logprobs": [_chat_logprob(other) for other in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}


class TextAnswer(Answer):
    __slots__ = ()

    @property
    def _chunk_object(self) -> str:
        return "text_completion"

    def head(self, so_far: Counts) -> bytes:
        return b""

    def delta(self, delta: Delta, so_far: Counts) -> bytes:
        return self._chunk(self._choice(delta), so_far, **traced(delta))

    def whole(self, choices: Sequence[Delta], finished: Finished) -> dict[str, Any]:
        return self._body(self._chunk_object, [self._choice(c, c.reason) for c in choices], finished)

    def _choice(self, delta: Delta, reason: FinishReason | None = None) -> dict[str, Any]:
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._asked_logprobs(delta),
            "finish_reason": reason,
        }

    def _last_choice(self, index: int, reason: FinishReason) -> Mapping[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}

    def logprobs(self, entries: Sequence[TextLogprob]) -> dict[str, Any]:
        """The older API's log-probabilities: parallel lists, and the chosen token among the most probable."""
        return {
            "tokens": [_text_token(entry) for entry in entries],
            "token_logprobs": [_finite(entry.logprob) for entry in entries],
            "top_logprobs": [_text_alternatives(entry) for entry in entries] if self.num_logprobs else None,
            "text_offset": [entry.offset for entry in entries],
        }


def _chat_chunk(
    index: int,
    delta: Mapping[str, str],
    logprobs: dict[str, Any] | None = None,
    reason: FinishReason | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _chat_logprob(entry: TextLogprob) -> dict[str, Any]:
    return {
        "token": _text_of(entry) or _escaped(entry),
        "logprob": _finite(entry.logprob),
        "bytes": list(entry.bytes),
    }


def _text_token(entry: TextLogprob) -> str:
    return _text_of(entry) or f"bytes:{_escaped(entry)}"


def _text_alternatives(entry: TextLogprob) -> dict[str, float]:
    found = {_text_token(other): _finite(other.logprob) for other in entry.top}
    return found | {_text_token(entry): _finite(entry.logprob)}


def _text_of(entry: TextLogprob) -> str | None:
    """The token's text; None where it is part of a character only."""
    try:
        return entry.bytes.decode()
    except UnicodeDecodeError:
        return None


def _escaped(entry: TextLogprob) -> str:
    """The token's bytes as OpenAI writes a token that is no text: \\xe2\\x80."""
    return "".join(f"\\x{byte:02x}" for byte in entry.bytes)


def _finite(logprob: float) -> float:
    """The log-probability made finite, as JSON has no infinity."""
    return max(logprob, MIN_LOGPROB)
