"""The HTTP app_state: OpenAI's completions, the list of models, health, and the state of the cluster."""

import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from importlib.metadata import version as distribution_version
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from replicas.errors import ErrorCode, TriadError
from replicas.messages import GenerateRequest
from router.answering import error_as_sent, generate
from router.apis.messages import add_message_routes
from router.apis.responses import add_response_routes
from router.apis.tokens import add_token_routes
from router.app_state import AppState
from router.body import BodyReader, route_with
from router.config import Bounds
from router.console_routes import add_console_routes
from router.errors import add_error_handlers, json_response
from router.middleware import layers
from router.openapi import COMPLETION_RESPONSES, MODEL_RESPONSES, OTHER_RESPONSES, add_description
from router.operate import add_metrics_route, add_policy_routes
from router.schema import ChatCompletionRequest, CompletionRequest
from router.sse import ChatAnswer, OpenAiAnswer, TextAnswer
from router.state import cluster_state

VERSION = distribution_version("triad-serving")


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
        return await _complete(app_state, request, body, ChatAnswer, "chatcmpl")

    @app.post("/v1/completions", response_class=Response, responses=COMPLETION_RESPONSES)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await _complete(app_state, request, body, TextAnswer, "cmpl")

    @app.get("/v1/models", response_class=Response, responses=OTHER_RESPONSES)
    async def models() -> Response:
        return json_response(
            {"object": "list", "data": [_model_entry(app_state, name) for name in app_state.model_names]}
        )

    @app.get("/v1/models/{model_name:path}", response_class=Response, responses=MODEL_RESPONSES)
    async def model(model_name: str) -> Response:
        app_state.check_model(model_name)
        return json_response(_model_entry(app_state, model_name))

    @app.get("/health", response_class=Response)  # as vLLM names it, and guidellm asks
    @app.get("/healthz", response_class=Response)
    async def healthz() -> Response:
        return json_response({"status": "alive"})

    @app.get("/ping", response_class=Response)  # as SageMaker asks, and vLLM answers
    @app.post("/ping", response_class=Response)
    async def ping() -> Response:
        return Response()

    @app.get("/version", response_class=Response, responses=OTHER_RESPONSES)
    async def version() -> Response:
        return json_response({"version": VERSION})

    @app.get("/readyz", response_class=Response, responses=OTHER_RESPONSES)
    async def readyz() -> Response:
        if not app_state.dispatcher.ready:
            raise TriadError(ErrorCode.UNAVAILABLE, "No replica can serve yet.")
        return json_response({"status": "ready"})

    @app.get("/v1/triad/state", response_class=Response, responses=OTHER_RESPONSES)
    async def state() -> Response:
        return json_response(await cluster_state(app_state.dispatcher, app_state.view, app_state.store))

    add_token_routes(app, app_state)
    add_message_routes(app, app_state)
    add_response_routes(app, app_state)
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


async def _complete(
    app_state: AppState,
    http: Request,
    body: ChatCompletionRequest | CompletionRequest,
    answer_type: type[OpenAiAnswer],
    id_prefix: str,
) -> Response:
    def answer(completion_id: str, request: GenerateRequest) -> OpenAiAnswer:
        return answer_type(
            completion_id=completion_id,
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

    return await generate(app_state, http, body, id_prefix, answer, lambda error: error_as_sent(error, body))


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
