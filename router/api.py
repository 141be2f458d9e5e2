"""The HTTP door: OpenAI's completions, the list of models, health, and the state of the cluster."""

import secrets
import time
import uuid
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from opentelemetry.trace import Tracer
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from policies.setting import PolicyWatch
from policies.store import LoadStore
from replicas.errors import ErrorCode, TriadError
from replicas.messages import GenerateRequest, ModelInfo
from router.auth import KeyRing
from router.dispatch import Dispatcher
from router.errors import ApiError, add_error_handlers, json_response
from router.guard import Bounds, Guard, RoomCheck, bounded_route, check_prompts, key_of
from router.limits import KeyLimiter
from router.load_view import LoadView
from router.metrics import Metrics
from router.operate import Siblings, add_metrics_route, add_policy_routes
from router.responses import BodyLimit, GenerationResponse
from router.schema import ChatCompletionRequest, CompletionRequest
from router.sse import Answer, ChatAnswer, TextAnswer
from router.state import cluster_state
from router.trail import REQUEST_ID_HEADER, Record, Trail, traceparent_in


@dataclass(frozen=True, slots=True)
class Door:
    """What the routes work with.

    model_name: the name clients ask for. created: when it was loaded, in seconds since 1970.
    limiter: None counts nothing. policy: None can't be changed at run time. tracer: None traces nothing.
    stream_interval_s: the least time between two pieces of a stream.
    siblings: whose figures /metrics shows beside this ingress's own.
    """

    dispatcher: Dispatcher
    view: LoadView
    store: LoadStore
    model_name: str
    created: int
    bounds: Bounds = field(default_factory=Bounds)
    keys: KeyRing = field(default_factory=KeyRing)
    cors_origins: tuple[str, ...] = ()
    stream_interval_s: float = 0.0
    limiter: KeyLimiter | None = None
    policy: PolicyWatch | None = None
    metrics: Metrics | None = None
    siblings: Siblings | None = None
    tracer: Tracer | None = None


def create_app(door: Door, lifespan: AbstractAsyncContextManager[None] | None = None) -> FastAPI:
    """lifespan: entered when the app starts and left when it stops."""
    app = FastAPI(
        title="Triad",
        description="OpenAI's completions from tri-mode language models, decoded as suits the load.",
        lifespan=None if lifespan is None else lambda _: lifespan,
        middleware=_middleware(door),
        redirect_slashes=False,
    )
    app.router.route_class = bounded_route(door.bounds.max_json_depth)
    add_error_handlers(app)

    @app.post("/v1/chat/completions", response_class=Response)
    async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
        return await _generate(door, request, body, ChatAnswer, "chatcmpl")

    @app.post("/v1/completions", response_class=Response)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await _generate(door, request, body, TextAnswer, "cmpl")

    @app.get("/v1/models", response_class=Response)
    async def models() -> Response:
        return json_response({"object": "list", "data": [_model_entry(door)]})

    @app.get("/v1/models/{model_name:path}", response_class=Response)
    async def model(model_name: str) -> Response:
        _check_model_name(door, model_name)
        return json_response(_model_entry(door))

    @app.get("/health", response_class=Response)  # as vLLM names it, and guidellm asks
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

    if door.metrics is not None:
        add_metrics_route(app, door.metrics, door.store, door.siblings)
    if door.policy is not None:
        add_policy_routes(app, door.policy)
    return app


def _middleware(door: Door) -> list[Middleware]:
    """From the outside in. A browser asks beforehand, without a key, so CORS precedes the guard."""
    layers = [Middleware(Trail, door.metrics, door.tracer)]
    if door.cors_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=door.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type", REQUEST_ID_HEADER],
                expose_headers=[REQUEST_ID_HEADER, "Retry-After"],
            )
        )
    layers.append(Middleware(Guard, door.keys, door.bounds))
    layers.append(Middleware(RoomCheck, door.dispatcher.check_room))
    layers.append(Middleware(BodyLimit, door.bounds.max_body_bytes, door.bounds.body_timeout_s))
    return layers


async def _generate(
    door: Door,
    http: Request,
    body: ChatCompletionRequest | CompletionRequest,
    answer_type: type[Answer],
    id_prefix: str,
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
        traceparent=traceparent_in(http.scope),
    )
    is_chat = isinstance(body, ChatCompletionRequest)
    check_prompts(request, door.bounds.max_prompt_chars, "messages" if is_chat else "prompt")
    if door.dispatcher.model is not None:
        _check_fits(request, door.dispatcher.model)
    answer = answer_type(
        completion_id=request.request_id,
        model=door.model_name,
        created=int(time.time()),
        include_usage=body.include_usage,
        continuous_usage=body.continuous_usage,
        num_choices=request.num_indices,
        num_logprobs=request.sampling.logprobs,
    )
    key = key_of(http)
    charge = None if door.limiter is None else await door.limiter.charge(key, request)
    operation = "chat" if is_chat else "text_completion"
    record = Record(http.scope, operation, door.model_name, key, charge, door.metrics, door.limiter)
    generation = door.dispatcher.generate(request)
    return GenerationResponse(generation, answer, bool(body.stream), record, door.stream_interval_s)


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
