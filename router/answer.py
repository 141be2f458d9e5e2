"""What an answer over HTTP is, whichever API it is of; and its writing, a part at a time where it is long."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from replicas.errors import TriadError
from replicas.messages import DecodingReport, Delta, Finished, TextLogprob
from router.errors import encode, triad_error_body

NUM_AT_ONCE = 256
"""Log-probabilities written in one go; after each the loop sees to its other streams."""
_NO_LOGPROBS = b'"logprobs":null'
"""A mark to split at, which stands in no text, where JSON escapes the quotes."""


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(body) + b"\n\n"


def error_event(error: TriadError) -> bytes:
    """The event that ends a stream already begun with an error; no [DONE] follows."""
    return b"event: error\n" + event(triad_error_body(error))


def decoding_report(report: DecodingReport) -> dict[str, Any]:
    """Triad's `decoding` field: how the answer was made."""
    ratio = report.tokens_per_forward
    return {
        "tokens": {mode.value: num for mode, num in sorted(report.tokens_by_mode.items())},
        "forwards": report.num_forwards,
        "tokens_per_forward": None if ratio is None else round(ratio, 3),
        "switches": report.num_switches,
        "rule": report.rule,
        "replica": report.replica_id,
    }


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

    def usage_json(self) -> bytes:
        """usage() as JSON, which takes a tenth of the time."""
        total = self.num_prompt + self.num_completion
        return b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % (
            self.num_prompt,
            self.num_completion,
            total,
        )


@dataclass(frozen=True, slots=True)
class Answer(ABC):
    """Writes one request's answer, streamed or whole, as one API has it."""

    completion_id: str
    model: str
    created: int
    """Seconds since 1970."""
    num_choices: int = 1
    num_logprobs: int | None = None
    """Alternatives asked for with each token, None where no log-probabilities were."""
    prompt_token_ids: tuple[tuple[int, ...], ...] = ()
    """Each prompt's token ids, where the request asks for them."""

    @abstractmethod
    def head(self, so_far: Counts) -> bytes:
        """The beginning of a stream."""

    @abstractmethod
    def delta(self, delta: Delta, so_far: Counts) -> bytes:
        """The chunk for new text of a choice; so_far has this text's tokens included."""

    @abstractmethod
    def whole(self, choices: Sequence[Delta], finished: Finished) -> dict[str, Any]:
        """The body of an answer that is not streamed."""

    def whole_json(self, choices: Sequence[Delta], finished: Finished) -> bytes:
        """whole() as JSON."""
        return encode(self.whole(choices, finished))

    @abstractmethod
    def end(self, last: Delta, so_far: Counts) -> bytes:
        """The last chunk of a choice that others outlast."""

    @abstractmethod
    def tail(self, last: Delta, finished: Finished) -> bytes:
        """The end of the last choice, and with it of the stream."""

    @abstractmethod
    def logprobs(self, entries: Sequence[TextLogprob]) -> dict[str, Any]:
        """A choice's `logprobs`, whose lists are those of its parts one after another."""

    def shows(self, delta: Delta) -> bool:
        """True if the new text of a choice, or its new tokens, are worth a chunk."""
        return delta.has_news or bool(delta.logprobs)

    def failure(self, error: TriadError) -> bytes:
        """The end of a stream that breaks off, and its only one."""
        return error_event(error)


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
        return [answer.whole_json(choices, finished)]
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
