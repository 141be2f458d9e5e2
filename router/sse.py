"""OpenAI's completions as they are sent: JSON bodies, and server-sent events for streams."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from replicas.messages import Delta, Finished, FinishReason, TextLogprob, ToolCallDelta
from router.answer import Answer, Counts, decoding_report, event
from router.errors import encode

DONE = b"data: [DONE]\n\n"
_CHUNK_END = b"}\n\n"
MIN_LOGPROB = -9999.0
"""OpenAI's log-probability for the impossible."""
_MARK = "\0text\0"
"""Stands for the text while a chunk's envelope is made; no other member of a chunk is this."""


def traced(delta: Delta) -> dict[str, Any]:
    """A chunk's `decoding`, where the request asks for a trace: which forwards let its tokens out."""
    if not delta.trace:
        return {}
    parts = [
        {"mode": part.mode.value, "forward": part.forward, "tokens": part.num_tokens, "text": part.text}
        for part in delta.trace
    ]
    return {"decoding": {"trace": parts}}


def usage(finished: Finished) -> dict[str, Any]:
    counts = Counts(finished.num_prompt_tokens, finished.num_completion_tokens)
    found = counts.usage() | {"prompt_tokens_details": {"cached_tokens": finished.num_reused_tokens}}
    if finished.num_reasoning_tokens is not None:
        found["completion_tokens_details"] = {"reasoning_tokens": finished.num_reasoning_tokens}
    return found


@dataclass(frozen=True, slots=True)
class OpenAiAnswer(Answer):
    """A completion as OpenAI sends it."""

    include_usage: bool = False
    """True to end a stream with a chunk that has the usage."""
    continuous_usage: bool = False
    """True to have the usage so far in each chunk, as vLLM's and SGLang's do when asked."""
    service_tier: str | None = None
    """The tier to name in the body, None where the request names none."""
    shows_each_delta: bool = False
    """True to have a chunk for tokens that have no text, too."""
    shows_token_ids: bool = False
    _envelopes: dict[int, tuple[bytes, bytes]] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )
    """By choice, what stands around the text in a chunk that has no other news, but for the usage so
    far, its last member."""

    @abstractmethod
    def _any_delta(self, delta: Delta, so_far: Counts) -> bytes:
        """The chunk for whatever has come."""

    def delta(self, delta: Delta, so_far: Counts) -> bytes:
        if self.num_logprobs is not None or self.shows_token_ids:
            return self._any_delta(delta, so_far)
        if not delta.text or delta.reasoning or delta.tool_calls or delta.trace:
            return self._any_delta(delta, so_far)
        end = so_far.usage_json() + _CHUNK_END if self.continuous_usage else b""
        envelope = self._envelopes.get(delta.index)
        if envelope is None:
            before, behind = self._any_delta(replace(delta, text=_MARK), so_far).split(encode(_MARK))
            envelope = self._envelopes[delta.index] = before, behind.removesuffix(end)
        before, behind = envelope
        return b"".join((before, encode(delta.text), behind, end))

    @abstractmethod
    def _last_choice(self, last: Delta) -> Mapping[str, Any]: ...

    def shows(self, delta: Delta) -> bool:
        """True if the new text of a choice, or its new tokens, are worth a chunk."""
        shows_tokens = self.shows_each_delta or self.shows_token_ids
        return (
            delta.has_news or bool(delta.logprobs or delta.trace) or (shows_tokens and delta.num_tokens > 0)
        )

    def end(self, last: Delta, so_far: Counts) -> bytes:
        return self._chunk(self._last_choice(last), so_far)

    def tail(self, last: Delta, finished: Finished) -> bytes:
        """The end of the last choice, with the decoding report; the usage, if asked for; [DONE]."""
        choice = self._last_choice(last)
        counts = Counts(finished.num_prompt_tokens, finished.num_completion_tokens)
        chunk = self._chunk(choice, counts, decoding=decoding_report(finished.report))
        if not self.include_usage:
            return chunk + DONE
        body = self._envelope(self._chunk_object, []) | {"usage": usage(finished)}
        return chunk + event(body) + DONE

    @property
    @abstractmethod
    def _chunk_object(self) -> str: ...

    def _token_ids(self, delta: Delta) -> dict[str, Any]:
        return {"token_ids": delta.token_ids} if self.shows_token_ids else {}

    def _asked_logprobs(self, delta: Delta) -> dict[str, Any] | None:
        return None if self.num_logprobs is None else self.logprobs(delta.logprobs)

    def _chunk(self, choice: Mapping[str, Any], so_far: Counts, **more: Any) -> bytes:
        body = self._envelope(self._chunk_object, [choice]) | more
        if self.continuous_usage:
            body["usage"] = so_far.usage()
        elif self.include_usage:
            body["usage"] = None
        return event(body)

    def _envelope(self, object_: str, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        tier = {} if self.service_tier is None else {"service_tier": self.service_tier}
        return {
            "id": self.completion_id,
            "object": object_,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        } | tier

    def _body(self, object_: str, choices: Sequence[Mapping[str, Any]], finished: Finished) -> dict[str, Any]:
        report = {"usage": usage(finished), "decoding": decoding_report(finished.report)}
        return self._envelope(object_, choices) | report


class ChatAnswer(OpenAiAnswer):
    __slots__ = ()

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk"

    def head(self, so_far: Counts) -> bytes:
        role = {"role": "assistant", "content": ""}
        first, *others = (_chat_chunk(index, role) for index in range(self.num_choices))
        chunks = [self._chunk(first, so_far, **self._prompt_ids)]
        return b"".join(chunks + [self._chunk(other, so_far) for other in others])

    def _any_delta(self, delta: Delta, so_far: Counts) -> bytes:
        choice = _chat_chunk(delta.index, _chat_delta(delta), self._asked_logprobs(delta))
        return self._chunk(choice | self._token_ids(delta), so_far, **traced(delta))

    def whole(self, choices: Sequence[Delta], finished: Finished) -> dict[str, Any]:
        body = self._body("chat.completion", [self._choice(choice) for choice in choices], finished)
        return body | self._prompt_ids

    @property
    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.prompt_token_ids[0]} if self.shows_token_ids else {}

    def _choice(self, whole: Delta) -> dict[str, Any]:
        return {
            "index": whole.index,
            "message": _chat_message(whole),
            "logprobs": self._asked_logprobs(whole),
            "finish_reason": whole.reason,
            **_stop_reason(whole),
            **self._token_ids(whole),
        }

    def _last_choice(self, last: Delta) -> Mapping[str, Any]:
        return _chat_chunk(last.index, {}, None, last.reason) | _stop_reason(last)

    def logprobs(self, entries: Sequence[TextLogprob]) -> dict[str, Any]:
        content = [
            _chat_logprob(entry) | {"top_logprobs": [_chat_logprob(other) for other in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}


class TextAnswer(OpenAiAnswer):
    __slots__ = ()

    @property
    def _chunk_object(self) -> str:
        return "text_completion"

    def head(self, so_far: Counts) -> bytes:
        if not self.shows_token_ids:
            return b""
        choices = ({**_empty_text(index), **self._prompt_ids(index)} for index in range(self.num_choices))
        return b"".join(self._chunk(choice, so_far) for choice in choices)

    def _any_delta(self, delta: Delta, so_far: Counts) -> bytes:
        return self._chunk(self._choice(delta), so_far, **traced(delta))

    def whole(self, choices: Sequence[Delta], finished: Finished) -> dict[str, Any]:
        whole = [
            self._choice(choice, choice.reason) | _stop_reason(choice) | self._prompt_ids(choice.index)
            for choice in choices
        ]
        return self._body(self._chunk_object, whole, finished)

    def _choice(self, delta: Delta, reason: FinishReason | None = None) -> dict[str, Any]:
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._asked_logprobs(delta),
            "finish_reason": reason,
            **self._token_ids(delta),
        }

    def _prompt_ids(self, index: int) -> dict[str, Any]:
        """The prompt of a choice: choices of one prompt follow one another."""
        if not self.shows_token_ids:
            return {}
        return {
            "prompt_token_ids": self.prompt_token_ids[index * len(self.prompt_token_ids) // self.num_choices]
        }

    def _last_choice(self, last: Delta) -> Mapping[str, Any]:
        return _empty_text(last.index) | {"finish_reason": last.reason} | _stop_reason(last)

    def logprobs(self, entries: Sequence[TextLogprob]) -> dict[str, Any]:
        """The older API's log-probabilities: parallel lists, and the chosen token among the most probable."""
        return {
            "tokens": [_text_token(entry) for entry in entries],
            "token_logprobs": [_finite(entry.logprob) for entry in entries],
            "top_logprobs": [_text_alternatives(entry) for entry in entries] if self.num_logprobs else None,
            "text_offset": [entry.offset for entry in entries],
        }


def _stop_reason(last: Delta) -> dict[str, Any]:
    """What ended a text, as vLLM tells it; nothing where the model itself or the length did."""
    return {} if last.stop_reason is None else {"stop_reason": last.stop_reason}


def _empty_text(index: int) -> dict[str, Any]:
    return {"index": index, "text": "", "logprobs": None, "finish_reason": None}


def _chat_delta(delta: Delta) -> dict[str, Any]:
    found: dict[str, Any] = _reasoning(delta)
    if delta.text or not delta.has_news:
        found["content"] = delta.text
    if delta.tool_calls:
        found["tool_calls"] = [{"index": call.index} | _tool_call(call) for call in delta.tool_calls]
    return found


def _chat_message(whole: Delta) -> dict[str, Any]:
    content = whole.text if whole.text or not whole.has_news else None
    message = {"role": "assistant", "content": content, "refusal": None} | _reasoning(whole)
    if whole.tool_calls:
        message["tool_calls"] = [_tool_call(call) for call in whole.tool_calls]
    return message


def _reasoning(delta: Delta) -> dict[str, Any]:
    """The reasoning under both names that clients read."""
    return {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning} if delta.reasoning else {}


def _tool_call(call: ToolCallDelta) -> dict[str, Any]:
    """A call, or a piece of one; the first piece names it."""
    if call.name is None:
        return {"function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.call_id, "type": "function", "function": function}


def _chat_chunk(
    index: int,
    delta: Mapping[str, Any],
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


def _text_alternatives(entry: TextLogprob) -> dict[str, float | None] | None:
    if entry.logprob is None:
        return None
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


def _finite(logprob: float | None) -> float | None:
    """The log-probability made finite, as JSON has no infinity."""
    return None if logprob is None else max(logprob, MIN_LOGPROB)
