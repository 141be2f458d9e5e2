"""vLLM's routes about tokens: `/tokenize`, `/detokenize` and `/tokenizer_info`, which a replica answers,
since it has the tokenizer."""

import json
from typing import Annotated, Any, Self

from fastapi import FastAPI
from pydantic import PlainValidator, model_validator
from starlette.responses import Response

from replicas.answer_forms import ToolUse
from replicas.errors import ErrorCode, TriadError
from replicas.messages import ModelInfo, Prompt
from replicas.token_messages import DescribeTokenizer, DetokenizeRequest, Tokenized, TokenizeRequest
from router.app_state import AppState
from router.chat import Messages, TemplateFields
from router.errors import json_response
from router.fields import Prompted, Text, conflict, token_ids
from router.openapi import TOKENS_RESPONSES
from router.tools import Tools, tool_use

_OF_CHATS = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")


class TokenizeBody(TemplateFields, Prompted):
    """A text as `prompt`, or a chat as `messages`."""

    prompt_field = "prompt"

    model: str | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool | None = None
    """True by default for a text, and false for a chat, whose template writes them."""
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if self.prompt is None and self.messages is None:
            raise conflict("prompt", "either it or messages is wanted")
        if self.prompt is not None:
            if self.messages is not None:
                raise conflict("messages", "does not go with prompt; leave one out")
            for field in (*_OF_CHATS, "reasoning_effort", "thinking"):
                if getattr(self, field) is not None:
                    raise conflict(field, "only with messages")
        return self

    @model_validator(mode="after")
    def _tools_fit(self) -> Self:
        self.tool_use()
        return self

    @property
    def prompt_param(self) -> str:
        return "prompt" if self.messages is None else "messages"

    @property
    def num_prompt_chars(self) -> int:
        use = self.tool_use()
        num_chars = len(self.prompt or "") + sum(message.num_chars for message in self.messages or ())
        return num_chars + (0 if use is None else use.num_chars)

    def tool_use(self) -> ToolUse | None:
        return tool_use(self.tools, None, None)

    def request(self) -> TokenizeRequest:
        prompt: Prompt = self.prompt or ""
        if self.messages is not None:
            prompt = tuple(message.for_template() for message in self.messages)
        adds = self.messages is None if self.add_special_tokens is None else self.add_special_tokens
        return TokenizeRequest(prompt, adds, self.template, self.tool_use(), bool(self.return_token_strs))


class DetokenizeBody(Prompted):
    prompt_field = "tokens"

    model: str | None = None
    tokens: Annotated[tuple[int, ...], PlainValidator(token_ids, json_schema_input_type=list[int])]

    @property
    def num_prompt_chars(self) -> int:
        return len(self.tokens)


def add_token_routes(app: FastAPI, app_state: AppState) -> None:
    @app.post("/tokenize", response_class=Response, responses=TOKENS_RESPONSES)
    async def tokenize(body: TokenizeBody) -> Response:
        app_state.check_model(body.model)
        found = await app_state.dispatcher.tokens(body.request())
        assert isinstance(found, Tokenized)
        answer: dict[str, Any] = {
            "count": len(found.token_ids),
            "max_model_len": _model(app_state).max_context,
            "tokens": found.token_ids,
            "token_strs": found.strings,
        }
        return json_response(answer)

    @app.post("/detokenize", response_class=Response, responses=TOKENS_RESPONSES)
    async def detokenize(body: DetokenizeBody) -> Response:
        app_state.check_model(body.model)
        most = _model(app_state).vocab_size - 1
        if body.tokens and max(body.tokens) > most:
            message = f"A token id is at most {most} for this model."
            raise TriadError(ErrorCode.INVALID_REQUEST, message, "tokens")
        return json_response({"prompt": await app_state.dispatcher.tokens(DetokenizeRequest(body.tokens))})

    @app.get("/tokenizer_info", response_class=Response, responses=TOKENS_RESPONSES)
    async def tokenizer_info() -> Response:
        described = await app_state.dispatcher.tokens(DescribeTokenizer())
        assert isinstance(described, str)
        most = {"model_max_length": _model(app_state).max_context}
        return json_response(json.loads(described) | most)


def _model(app_state: AppState) -> ModelInfo:
    model = app_state.dispatcher.model
    if model is None:
        raise TriadError(ErrorCode.UNAVAILABLE, "No replica can serve yet.")
    return model
