"""The HTTP app_state: OpenAI's completions, the list of models, health, and the state of the cluster."""

import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI, Request
from opentelemetry.trace import Tracer
from starlette.responses import Response

from policies.control.policy_setting import PolicyWatch
from policies.control.store import LoadStore
from replicas.errors import ErrorCode, TriadError
from replicas.messages import GenerateRequest, ModelInfo, SamplingParams
from router.auth import ApiKey, KeyRing, key_of
from router.body import BodyReader, route_with
from router.completion import Completion
from router.config import Bounds, IngressConfig
from router.console_routes import add_console_routes
from router.dispatch import Dispatcher
from router.errors import ApiError, add_error_handlers, json_response
from router.generation import Generation
from router.limits import KeyLimiter
from router.load_view import LoadView
from router.metrics import Metrics
from router.middleware import layers
from router.openapi import COMPLETION_RESPONSES, MODEL_RESPONSES, OTHER_RESPONSES, add_description
from router.operate import Siblings, add_metrics_route, add_policy_routes
from router.prompt_estimator import check_fits
from router.request_log import RequestLog, trace_carrier_in
from router.responses import GenerationResponse, chunk_interval_s
from router.schema import ChatCompletionRequest, CompletionRequest
from router.sse import Answer, ChatAnswer, TextAnswer
from router.state import cluster_state


@dataclass(frozen=True, slots=True)
class AppState:
    """All that the routes work with."""

    dispatcher: Dispatcher
    view: LoadView
    store: LoadStore
    model_name: str
    """The name clients ask for, which answers have."""
    created: int
    """The time when the model was loaded, in seconds since 1970."""
    config: IngressConfig = field(default_factory=IngressConfig)
    keys: KeyRing = field(default_factory=KeyRing)
    limiter: KeyLimiter | None = None
    """None counts nothing."""
    policy: PolicyWatch | None = None
    """None: the policy can't be changed at run time."""
    metrics: Metrics | None = None
    siblings: Siblings | None = None
    """The figures that /metrics shows beside this ingress's own."""
    tracer: Tracer | None = None
    """None traces nothing."""
    answers_id: bool = True
    """True if answers have the request's id from here, and not from what serves the app."""

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names by which clients may ask for the model."""
        return (self.model_name, *self.config.model_aliases)

    def interval_s(self) -> float:
        """Returns the least time between two chunks of a stream as things are."""
        if self.config.stream_interval_ms is None:
            return chunk_interval_s(self.dispatcher.num_in_flight)
        return self.config.stream_interval_ms / 1000.0


def create_app(app_state: AppState, lifespan: AbstractAsyncContextManager[None] | None = None) -> FastAPI:
    """The app with all its routes and middleware.

    lifespan: entered when the app starts and left when it stops
    """
    bounds = Bounds.of(app_state.config)
    bodies = BodyReader(bounds)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        async with lifespan or nullcontext():
            yield
        await burst.close()
        bodies.close()

    app = FastAPI(
        title="Triad",
        description="OpenAI's completions from tri-mode language models, decoded as suits the load.",
        lifespan=life,
        middleware=layers(
            keys=app_state.keys,
            bounds=bounds,
            check_room=app_state.dispatcher.check_room,
            metrics=app_state.metrics,
            tracer=app_state.tracer,
            answers_id=app_state.answers_id,
            cors_origins=app_state.config.cors_origins,
        ),
        redirect_slashes=False,
        docs_url=None,  # their pages load from foreign hosts
        redoc_url=None,
    )
    add_description(app)
    app.router.route_class = route_with(bodies)
    add_error_handlers(app)

    @app.post("/v1/chat/completions", response_class=Response, responses=COMPLETION_RESPONSES)
    async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
        return await _generate(app_state, request, body, ChatAnswer, "chatcmpl")

    @app.post("/v1/completions", response_class=Response, responses=COMPLETION_RESPONSES)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await _generate(app_state, request, body, TextAnswer, "cmpl")

    @app.get("/v1/models", response_class=Response, responses=OTHER_RESPONSES)
    async def models() -> Response:
        return json_response(
            {"object": "list", "data": [_model_entry(app_state, name) for name in app_state.model_names]}
        )

    @app.get("/v1/models/{model_name:path}", response_class=Response, responses=MODEL_RESPONSES)
    async def model(model_name: str) -> Response:
        _check_model_name(app_state, model_name)
        return json_response(_model_entry(app_state, model_name))

    @app.get("/health", response_class=Response)  # as vLLM names it, and guidellm asks
    @app.get("/healthz", response_class=Response)
    async def healthz() -> Response:
        return json_response({"status": "alive"})

    @app.get("/readyz", response_class=Response, responses=OTHER_RESPONSES)
    async def readyz() -> Response:
        if not app_state.dispatcher.ready:
            raise TriadError(ErrorCode.UNAVAILABLE, "No replica can serve yet.")
        return json_response({"status": "ready"})

    @app.get("/v1/triad/state", response_class=Response, responses=OTHER_RESPONSES)
    async def state() -> Response:
        return json_response(await cluster_state(app_state.dispatcher, app_state.view, app_state.store))

    burst = add_console_routes(
        app,
        app_state.dispatcher,
        app_state.view,
        app_state.store,
        app_state.model_name,
        app_state.metrics,
    )
    if app_state.metrics is not None:
        add_metrics_route(app, app_state.metrics, app_state.store, app_state.siblings)
    if app_state.policy is not None:
        add_policy_routes(app, app_state.policy)
    return app


async def _generate(
    app_state: AppState,
    http: Request,
    body: ChatCompletionRequest | CompletionRequest,
    answer_type: type[Answer],
    id_prefix: str,
) -> Response:
    _check_model_name(app_state, body.model)
    key = key_of(http)
    request = GenerateRequest(
        request_id=f"{id_prefix}-{uuid.uuid4().hex}",
        channel_id="",
        prompts=body.prompts_for_replica(),
        sampling=_within(body.sampling(lambda: secrets.randbits(63)), app_state.dispatcher.model),
        decoding=body.decoding_options(),
        timeout_s=body.timeout_s,
        num_choices=body.n or 1,
        priority=body.priority or 0,
        trace_carrier=trace_carrier_in(http.scope),
        cache_salt=_cache_salt(app_state, key, body.cache_salt),
        template=body.template,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        tokens_per_delta=body.stream_interval,
        return_token_ids=bool(body.return_token_ids),
        echo=body.echoes,
    )
    is_chat = isinstance(body, ChatCompletionRequest)
    if app_state.dispatcher.model is not None:
        try:
            _check_fits(request, app_state.dispatcher.model)
        except TriadError as error:
            raise as_sent(error, body) from None
    answer = answer_type(
        completion_id=request.request_id,
        model=app_state.model_name,
        created=int(time.time()),
        include_usage=body.include_usage,
        continuous_usage=body.continuous_usage,
        num_choices=request.num_indices,
        num_logprobs=request.sampling.logprobs,
        service_tier=None if body.service_tier is None else "default",
        shows_each_delta=body.stream_interval is not None,
        shows_token_ids=request.return_token_ids,
    )
    charge = None if app_state.limiter is None else await app_state.limiter.charge(key, request)
    operation = "chat" if is_chat else "text_completion"
    record = RequestLog(
        http.scope, operation, app_state.model_name, key, charge, app_state.metrics, app_state.limiter
    )
    generation = Generation(app_state.dispatcher, request)
    return GenerationResponse(
        generation,
        answer,
        bool(body.stream),
        record,
        app_state.interval_s,
        lambda error: as_sent(error, body),
    )


def as_sent(error: TriadError, body: Completion) -> TriadError:
    """The error in the body's own names: a replica doesn't know which of two names a field had."""
    param = None if error.param is None else body.name_sent(error.param)
    message = re.sub(r"\bmax_tokens\b", body.limit_field, error.message)
    if (param, message) == (error.param, error.message):
        return error
    return TriadError(error.code, message, param)


def _within(sampling: SamplingParams, model: ModelInfo | None) -> SamplingParams:
    """The sampling with no more tokens wanted than the context has, by which a limit is charged."""
    if model is None or sampling.max_tokens is None:
        return sampling
    return replace(sampling, max_tokens=min(sampling.max_tokens, model.max_context))


def _cache_salt(app_state: AppState, key: ApiKey | None, asked: str | None) -> str:
    """The salt of a request's prefix cache: its key's and its own, which no other pair has in common."""
    of_key = "" if key is None or app_state.config.shared_prefix_cache else key.name
    return of_key if asked is None else f"{of_key}\0{asked}"


def _check_model_name(app_state: AppState, name: str) -> None:
    if name not in app_state.model_names:
        had = ", ".join(f"'{known}'" for known in app_state.model_names)
        message = f"The model '{name}' does not exist; this server has {had}."
        raise ApiError(404, "model_not_found", message, "model")


def _check_fits(request: GenerateRequest, model: ModelInfo) -> None:
    """Checks all that needs no tokenizer; the replica checks the rest. Raises TriadError."""
    mode = request.decoding.mode
    if mode is not None and mode not in model.modes:
        modes = ", ".join(model.modes)
        message = f"This model does not decode by {mode}; it has: {modes}."
        raise TriadError(ErrorCode.INVALID_REQUEST, message, "decoding.mode")
    ids = [prompt for prompt in request.prompts if prompt and isinstance(prompt[0], int)]
    if any(max(prompt) >= model.vocab_size for prompt in ids):  # type: ignore[type-var, operator]
        message = f"A token id is at most {model.vocab_size - 1} for this model."
        raise TriadError(ErrorCode.INVALID_REQUEST, message, "prompt")
    check_fits(request, model)


def _model_entry(app_state: AppState, name: str) -> dict[str, Any]:
    """OpenAI's entry of the model, its context as vLLM names it, and Triad's `modes` and `max_context`.

    These are null until a replica is seen.
    """
    model = app_state.dispatcher.model
    max_context = None if model is None else model.max_context
    return {
        "id": name,
        "object": "model",
        "created": app_state.created,
        "owned_by": "triad",
        "modes": None if model is None else [mode.value for mode in model.modes],
        "max_context": max_context,
        "max_model_len": max_context,
    }
