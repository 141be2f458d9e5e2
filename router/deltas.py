"""What a replica has said of one choice in several messages, as one."""

from collections.abc import Sequence
from dataclasses import replace

from replicas.messages import Delta, ToolCallDelta


def joined(deltas: Sequence[Delta]) -> Delta:
    """Joins consecutive Deltas of one choice into one."""
    first, last = deltas[0], deltas[-1]
    if len(deltas) == 1 and not first.tool_calls:
        return first
    text = "".join([delta.text for delta in deltas])
    num_tokens = sum([delta.num_tokens for delta in deltas])
    if not any(d.logprobs or d.token_ids or d.reasoning or d.tool_calls or d.trace for d in deltas):
        # Most have none of these, and to join nothing takes as long as to join the text.
        return Delta(first.request_id, text, num_tokens, (), first.index, last.reason, (), last.stop_reason)
    return Delta(
        first.request_id,
        text,
        num_tokens,
        tuple(entry for delta in deltas for entry in delta.logprobs),
        first.index,
        last.reason,
        tuple(token for delta in deltas for token in delta.token_ids),
        last.stop_reason,
        "".join(delta.reasoning for delta in deltas),
        _joined_calls([piece for delta in deltas for piece in delta.tool_calls]),
        tuple(part for delta in deltas for part in delta.trace),
    )


def _joined_calls(pieces: Sequence[ToolCallDelta]) -> tuple[ToolCallDelta, ...]:
    """The pieces, those of one call that follow one another as one."""
    calls: list[ToolCallDelta] = []
    arguments: list[list[str]] = []
    for piece in pieces:
        if calls and piece.name is None and piece.index == calls[-1].index:
            arguments[-1].append(piece.arguments)
        else:
            calls.append(piece)
            arguments.append([piece.arguments])
    return tuple(
        replace(call, arguments="".join(parts)) for call, parts in zip(calls, arguments, strict=True)
    )
