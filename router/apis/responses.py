"""OpenAI's Responses: the route, and the answers as its clients read them, streamed or whole."""

import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import Response

from replicas.errors import ErrorCode, TriadError
from replicas.messages import Delta, Finished, FinishReason, GenerateRequest
from router.answer import Counts, decoding_report
from router.answering import generate
from router.apis.blocks import Block, BlockAnswer, Kind, Step, named_event
from router.apis.responses_schema import ResponsesRequest
from router.app_state import AppState
from router.openapi import RESPONSES_RESPONSES

_PREFIXES = {Kind.REASONING: "rs", Kind.TEXT: "msg", Kind.CALL: "fc"}
_TEXT_EVENTS = {Kind.REASONING: "response.reasoning_text", Kind.TEXT: "response.output_text"}


@dataclass(slots=True)
class _Progress:
    """How far a stream is: the number of its next event, and the state in which its items end."""

    next: int = 0
    end: str = "completed"


@dataclass(frozen=True, slots=True)
class ResponseAnswer(BlockAnswer):
    """A response, or the events of one, as OpenAI sends them."""

    asked: dict[str, Any] = field(default_factory=dict)
    """What the request said, as the response repeats it."""
    progress: _Progress = field(default_factory=_Progress)

    def head(self, so_far: Counts) -> bytes:
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def change(self, step: Step, block: Block, text: str) -> bytes:
        if block.kind is Kind.CALL:
            return self._change_of_call(step, block, text)
        name, place = _TEXT_EVENTS[block.kind], self._place(block) | {"content_index": 0}
        logprobs: dict[str, Any] = {"logprobs": []} if block.kind is Kind.TEXT else {}
        match step:
            case Step.OPENED:
                part = _part(block.kind, "")
                return self._item_event("added", block, "in_progress", empty=True) + self._event(
                    "response.content_part.added", **place, part=part
                )
            case Step.GREW:
                return self._event(f"{name}.delta", **place, delta=text, **logprobs)
        part = _part(block.kind, block.text)
        return (
            self._event(f"{name}.done", **place, text=block.text, **logprobs)
            + self._event("response.content_part.done", **place, part=part)
            + self._item_event("done", block, self.progress.end)
        )

    def _change_of_call(self, step: Step, block: Block, text: str) -> bytes:
        name = "response.function_call_arguments"
        match step:
            case Step.OPENED:
                return self._item_event("added", block, "in_progress")
            case Step.GREW:
                return self._event(f"{name}.delta", **self._place(block), delta=text)
        done = self._event(f"{name}.done", **self._place(block), name=block.name, arguments=block.text)
        return done + self._item_event("done", block, self.progress.end)

    def tail(self, last: Delta, finished: Finished) -> bytes:
        self.progress.end = _status(last)
        closed = self.closed()
        body = self.body(last, finished)
        return closed + self._event(f"response.{body['status']}", response=body)

    def body(self, last: Delta, finished: Finished) -> dict[str, Any]:
        status, blocks = _status(last), self.blocks.all
        # What max_output_tokens has cut is the last item.
        states = ["completed"] * (len(blocks) - 1) + [status]
        body = self._response(status) | {
            "output": [self._item(block, state) for block, state in zip(blocks, states, strict=True)],
            "usage": _usage(finished),
            "decoding": decoding_report(finished.report),
        }
        if status == "incomplete":
            return body | {"incomplete_details": {"reason": "max_output_tokens"}}
        return body | {"completed_at": int(time.time())}

    def failure(self, error: TriadError) -> bytes:
        code = "rate_limit_exceeded" if error.code is ErrorCode.QUEUE_FULL else "server_error"
        body = self._response("failed") | {
            "error": {"code": code, "message": error.message},
            "output": [self._item(block, "incomplete") for block in self.blocks.all],
        }
        return self._event("response.failed", response=body)

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "id": self.completion_id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.model,
            "output": [],
            "error": None,
            "incomplete_details": None,
            "usage": None,
        } | self.asked

    def _event(self, name: str, /, **fields: Any) -> bytes:
        number = self.progress.next
        self.progress.next += 1
        return named_event(name, {"type": name, "sequence_number": number} | fields)

    def _item_event(self, what: str, block: Block, status: str, empty: bool = False) -> bytes:
        item = self._item(block, status) | ({"content": []} if empty else {})
        return self._event(f"response.output_item.{what}", output_index=block.index, item=item)

    def _place(self, block: Block) -> dict[str, Any]:
        return {"item_id": self._item_id(block), "output_index": block.index}

    def _item_id(self, block: Block) -> str:
        return f"{_PREFIXES[block.kind]}_{self.completion_id.partition('_')[2]}_{block.index}"

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._item_id(block), "status": status}
        match block.kind:
            case Kind.CALL:
                call = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
                return item | {"type": "function_call"} | call
            case Kind.REASONING:
                return item | {"type": "reasoning", "summary": [], "content": [_part(block.kind, block.text)]}
        content = [_part(block.kind, block.text)]
        return item | {"type": "message", "role": "assistant", "content": content}


def _status(last: Delta) -> str:
    return "incomplete" if last.reason is FinishReason.LENGTH else "completed"


def _part(kind: Kind, text: str) -> dict[str, Any]:
    if kind is Kind.REASONING:
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(finished: Finished) -> dict[str, Any]:
    num_input, num_output = finished.num_prompt_tokens, finished.num_completion_tokens
    return {
        "input_tokens": num_input,
        "input_tokens_details": {"cached_tokens": finished.num_reused_tokens, "cache_write_tokens": 0},
        "output_tokens": num_output,
        "output_tokens_details": {"reasoning_tokens": finished.num_reasoning_tokens or 0},
        "total_tokens": num_input + num_output,
    }


def _said(part: BaseModel | None) -> dict[str, Any]:
    return {} if part is None else part.model_dump(by_alias=True, exclude_none=True)


def _asked(body: ResponsesRequest) -> dict[str, Any]:
    """What a request said, with OpenAI's defaults, as its response repeats it."""
    choice = body.tool_choice or "auto"
    text = {"format": {"type": "text"}} | _said(body.text)
    tier = {} if body.service_tier is None else {"service_tier": "default"}
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "text": text,
        "tools": [{"parameters": None, "strict": False} | _said(tool) for tool in body.tools or ()],
        "tool_choice": choice if isinstance(choice, str) else _said(choice),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": {"effort": None, "summary": None} | _said(body.reasoning),
        "metadata": body.metadata or {},
        "user": body.user,
        "store": False,
        "previous_response_id": None,
        "background": False,
        "truncation": body.truncation or "disabled",
    } | tier


def add_response_routes(app: FastAPI, app_state: AppState) -> None:
    @app.post("/v1/responses", response_class=Response, responses=RESPONSES_RESPONSES)
    async def responses(request: Request, body: ResponsesRequest) -> Response:
        def answer(answer_id: str, sent: GenerateRequest) -> ResponseAnswer:
            created = int(time.time())
            own_id = answer_id.replace("-", "_")
            return ResponseAnswer(own_id, app_state.model_name, created, asked=_asked(body))

        return await generate(app_state, request, body.chat, "resp", answer, body.error_as_sent)
