"""Anthropic's Messages: the routes, and the answers as its clients read them, streamed or whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from replicas.errors import TriadError
from replicas.messages import Delta, Finished, FinishReason, GenerateRequest
from replicas.token_messages import Tokenized, TokenizeRequest
from router.answer import Counts, decoding_report
from router.answering import generate
from router.apis.blocks import Block, BlockAnswer, Kind, Step, named_event
from router.apis.messages_schema import CountTokensRequest, MessagesRequest
from router.app_state import AppState
from router.errors import HTTP_ERRORS, anthropic_error_body, encode, json_response, triad_error_body
from router.openapi import MESSAGES_RESPONSES, TOKENS_RESPONSES

_STOP_REASONS = {
    FinishReason.STOP: "end_turn",
    FinishReason.LENGTH: "max_tokens",
    FinishReason.TOOL_CALLS: "tool_use",
}
_NO_INPUT = b'"input":null'
"""A mark to split at, which stands in no text, where JSON escapes the quotes."""


@dataclass(frozen=True, slots=True)
class MessageAnswer(BlockAnswer):
    """A message, or the events of one, as Anthropic sends them."""

    omits_thinking: bool = False
    """True if blocks of thinking come without their text."""

    def head(self, so_far: Counts) -> bytes:
        usage = _usage(so_far.num_prompt, 0, 0)
        start = {"type": "message_start", "message": self._message([], None, None, usage)}
        return named_event("message_start", start) + named_event("ping", {"type": "ping"})

    def change(self, step: Step, block: Block, text: str) -> bytes:
        match step:
            case Step.OPENED:
                return _event("content_block_start", block, content_block=_content(block, arguments={}))
            case Step.GREW if self._hides(block):
                return b""
            case Step.GREW:
                return _event("content_block_delta", block, delta=_grown(block.kind, text))
        signature = {"type": "signature_delta", "signature": ""}
        signed = block.kind is Kind.REASONING
        before = _event("content_block_delta", block, delta=signature) if signed else b""
        return before + _event("content_block_stop", block)

    def tail(self, last: Delta, finished: Finished) -> bytes:
        reason, sequence = _stop(last)
        change = {
            "type": "message_delta",
            "delta": {"stop_reason": reason, "stop_sequence": sequence},
            "usage": _usage_of(finished),
            "decoding": decoding_report(finished.report),
        }
        end = named_event("message_delta", change) + named_event("message_stop", {"type": "message_stop"})
        return self.closed() + end

    def body(self, last: Delta, finished: Finished) -> dict[str, Any]:
        reason, sequence = _stop(last)
        content = [_content(block, "" if self._hides(block) else block.text) for block in self.blocks.all]
        message = self._message(content, reason, sequence, _usage_of(finished))
        return message | {"decoding": decoding_report(finished.report)}

    def whole_json(self, choices: Sequence[Delta], finished: Finished) -> bytes:
        before, *after = encode(self.whole(choices, finished)).split(_NO_INPUT)
        calls = [block for block in self.blocks.all if block.kind is Kind.CALL]
        pairs = zip(calls, after, strict=True)
        return before + b"".join(
            b'"input":%b%b' % (call.arguments().encode(errors="replace"), rest) for call, rest in pairs
        )

    def _hides(self, block: Block) -> bool:
        return self.omits_thinking and block.kind is Kind.REASONING

    def failure(self, error: TriadError) -> bytes:
        status = HTTP_ERRORS[error.code].status
        return named_event("error", anthropic_error_body(status, triad_error_body(error)["error"]))

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, sequence: str | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "id": self.completion_id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": usage,
        }


def _event(name: str, block: Block, **more: Any) -> bytes:
    return named_event(name, {"type": name, "index": block.index} | more)


def _content(block: Block, text: str = "", arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    """The block. Arguments that are None are JSON already, and put in later."""
    match block.kind:
        case Kind.REASONING:
            return {"type": "thinking", "thinking": text, "signature": ""}
        case Kind.TEXT:
            return {"type": "text", "text": text}
    return {"type": "tool_use", "id": _tool_id(block), "name": block.name, "input": arguments}


def _tool_id(block: Block) -> str:
    return f"toolu_{block.call_id.removeprefix('call_')}"


def _grown(kind: Kind, text: str) -> dict[str, Any]:
    match kind:
        case Kind.REASONING:
            return {"type": "thinking_delta", "thinking": text}
        case Kind.TEXT:
            return {"type": "text_delta", "text": text}
    return {"type": "input_json_delta", "partial_json": text}


def _stop(last: Delta) -> tuple[str, str | None]:
    """Why the text ended, and the stop sequence that did it."""
    assert last.reason is not None
    if isinstance(last.stop_reason, str):
        return "stop_sequence", last.stop_reason
    return _STOP_REASONS[last.reason], None


def _usage(num_prompt: int, num_reused: int, num_completion: int) -> dict[str, Any]:
    """The counts, where tokens that the prefix cache had are not among the input's."""
    return {
        "input_tokens": num_prompt - num_reused,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_reused,
        "output_tokens": num_completion,
    }


def _usage_of(finished: Finished) -> dict[str, Any]:
    found = _usage(finished.num_prompt_tokens, finished.num_reused_tokens, finished.num_completion_tokens)
    if finished.num_reasoning_tokens is not None:
        found["output_tokens_details"] = {"thinking_tokens": finished.num_reasoning_tokens}
    return found


def add_message_routes(app: FastAPI, app_state: AppState) -> None:
    @app.post("/v1/messages", response_class=Response, responses=MESSAGES_RESPONSES)
    async def messages(request: Request, body: MessagesRequest) -> Response:
        def answer(answer_id: str, sent: GenerateRequest) -> MessageAnswer:
            name = answer_id.replace("-", "_")
            return MessageAnswer(name, app_state.model_name, 0, omits_thinking=body.omits_thinking)

        return await generate(app_state, request, body.chat, "msg", answer, body.error_as_sent)

    @app.post("/v1/messages/count_tokens", response_class=Response, responses=TOKENS_RESPONSES)
    async def count_tokens(body: CountTokensRequest) -> Response:
        app_state.check_model(body.model)
        chat = body.chat
        (prompt,) = chat.prompts_for_replica()
        try:
            found = await app_state.dispatcher.tokens(
                TokenizeRequest(prompt, False, chat.template, chat.tool_use())
            )
        except TriadError as error:
            raise body.error_as_sent(error) from None
        assert isinstance(found, Tokenized)
        return json_response({"input_tokens": len(found.token_ids)})
