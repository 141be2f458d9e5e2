"""The HTTP door: OpenAI's completions, the list of models, health, and the state of the cluster."""

import secrets
import time
import uuid
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.responses import Response

from policies.store import LoadStore
from replicas.errors import ErrorCode, TriadError
from replicas.messages import GenerateRequest, ModelInfo
from router.dispatch import Dispatcher
from router.errors import ApiError, add_error_handlers, json_response
from router.load_view import LoadView
from router.responses import BodyLimit, GenerationResponse
from router.schema import ChatCompletionRequest, CompletionRequest
from router.sse import Answer, ChatAnswer, TextAnswer
from router.state import cluster_state

MAX_BODY_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Door:
    """What the routes work with.

    model_name: the name clients ask for. created: when it was loaded, in seconds since 1970.
    """

    dispatcher: Dispatcher
    view: LoadView
    store: LoadStore
    model_name: str
    created: int
    max_body_bytes: int = MAX_BODY_BYTES


def create_app(door: Door, lifespan: AbstractAsyncContextManager[None] | None = None) -> FastAPI:
    """lifespan: entered when the app starts and left when it stops."""
    app = FastAPI(
        title="Triad",
        description="OpenAI's completions from tri-mode language models, decoded as suits the load.",
        lifespan=None if lifespan is None else lambda _: lifespan,
        middleware=[Middleware(BodyLimit, max_bytes=door.max_body_bytes)],
        redirect_slashes=False,
    )
    add_error_handlers(app)

    @app.post("/v1/chat/completions", response_class=Response)
    async def chat_completions(body: ChatCompletionRequest) -> Response:
        return _generate(door, body, ChatAnswer, "chatcmpl")

    @app.post("/v1/completions", response_class=Response)
    async def completions(body: CompletionRequest) -> Response:
        return _generate(door, body, TextAnswer, "cmpl")

    @app.get("/v1/models", response_class=Response)
    async def models() -> Response:
        return json_response({"object": "list", "data": [_model_entry(door)]})

    @app.get("/v1/models/{model_name:path}", response_class=Response)
    async def model(model_name: str) -> Response:
        _check_model_name(door, model_name)
        return json_response(_model_entry(door))

    @app.get("/healthz", response_class=Response)
    async def healthz() -> Response:
        return json_response({"status": "alive"})

    @app.get("/readyz", response_class=Response)
    async def readyz() -> Response:
        if not door.dispatcher.ready:
            raise TriadError(ErrorCode.UNAVAILABLE, "No replica can serve yet.")
        return json_response({"status": "ready"})

    @app.get("/v1/triad/state", response_class=Response)
    async def state() -> Response:
        return json_response(await cluster_state(door.dispatcher, door.view, door.store))

    return app


def _generate(
    door: Door, body: ChatCompletionRequest | CompletionRequest, answer_type: type[Answer], id_prefix: str
) -> Response:
    _check_model_name(door, body.model)
    request = GenerateRequest(
        request_id=f"{id_prefix}-{uuid.uuid4().hex}",
        channel_id="",
        prompts=body.prompts_for_replica(),
        sampling=body.sampling(lambda: secrets.randbits(63)),
        decoding=body.decoding_options(),
        timeout_s=body.timeout_s,
        num_choices=body.n or 1,
        priority=body.priority or 0,
    )
    if door.dispatcher.model is not None:
        _check_fits(request, door.dispatcher.model)
    answer = answer_type(
        completion_id=request.request_id,
        model=door.model_name,
        created=int(time.time()),
        include_usage=body.include_usage,
        num_choices=request.num_indices,
        num_logprobs=request.sampling.logprobs,
    )
    return GenerationResponse(door.dispatcher.generate(request), answer, bool(body.stream))


def _check_model_name(door: Door, name: str) -> None:
    if name != door.model_name:
        message = f"The model '{name}' does not exist; this server has '{door.model_name}'."
        raise ApiError(404, "model_not_found", message, "model")


def _check_fits(request: GenerateRequest, model: ModelInfo) -> None:
    """What can be told without the tokenizer; the replica checks the rest. Raises TriadError."""
    mode, limit = request.decoding.mode, request.sampling.max_tokens
    if mode is not None and mode not in model.modes:
        modes = ", ".join(model.modes)
        message = f"This model does not decode by {mode}; it has: {modes}."
        raise TriadError(ErrorCode.INVALID_REQUEST, message, "decoding.mode")
    tokens = (token for prompt in request.prompts if isinstance(prompt, tuple) for token in prompt)
    if any(isinstance(token, int) and token >= model.vocab_size for token in tokens):
        message = f"A token id is at most {model.vocab_size - 1} for this model."
        raise TriadError(ErrorCode.INVALID_REQUEST, message, "prompt")
    if limit is not None and limit >= model.max_context:
        message = f"max_tokens is {limit}, but prompt and completion together may have {model.max_context}."
        raise TriadError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, message, "max_tokens")


def _model_entry(door: Door) -> dict[str, Any]:
    """OpenAI's entry, and what a client of Triad wants to know; null until a replica has been seen."""
    model = door.dispatcher.model
    return {
        "id": door.model_name,
        "object": "model",
        "created": door.created,
        "owned_by": "triad",
        "modes": None if model is None else [mode.value for mode in model.modes],
        "max_context": None if model is None else model.max_context,
    }
