"""What a replica has said of one choice in several messages, as one."""

from collections.abc import Sequence
from dataclasses import replace

from replicas.messages import Delta, ToolCallDelta


def joined(deltas: Sequence[Delta]) -> Delta:
    """Joins consecutive Deltas of one choice into one."""
    if len(deltas) == 1 and not deltas[0].tool_calls:
        return deltas[0]
    return Delta(
        deltas[0].request_id,
        "".join(delta.text for delta in deltas),
        sum(delta.num_tokens for delta in deltas),
        tuple(entry for delta in deltas for entry in delta.logprobs),
        deltas[0].index,
        deltas[-1].reason,
        tuple(token for delta in deltas for token in delta.token_ids),
        deltas[-1].stop_reason,
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
