"""A checked body's generation: its request to a replica, its charge, its records, its answer."""

import re
import secrets
import uuid
from collections.abc import Callable
from dataclasses import replace

from fastapi import Request
from starlette.responses import Response

from replicas.errors import ErrorCode, TriadError
from replicas.messages import GenerateRequest, ModelInfo, SamplingParams
from router.answer import Answer
from router.app_state import AppState
from router.auth import ApiKey, key_of
from router.completion import Completion
from router.generation import Generation
from router.prompt_estimator import check_fits
from router.request_log import RequestLog, trace_carrier_in
from router.responses import GenerationResponse
from router.schema import ChatCompletionRequest, CompletionRequest

AnswerOf = Callable[[str, GenerateRequest], Answer]
"""A function from the answer's id and the request to what writes its answer."""
AsSent = Callable[[TriadError], TriadError]


async def generate(
    app_state: AppState,
    http: Request,
    body: ChatCompletionRequest | CompletionRequest,
    id_prefix: str,
    answer_of: AnswerOf,
    as_sent: AsSent,
) -> Response:
    """Returns the response that will run a body's generation. Raises TriadError or ApiError before that.

    as_sent: gives an error in the names that the client used
    """
    app_state.check_model(body.model)
    key = key_of(http)
    request = _request(app_state, http, body, f"{id_prefix}-{uuid.uuid4().hex}", key)
    if app_state.dispatcher.model is not None:
        try:
            _check_fits(request, app_state.dispatcher.model)
        except TriadError as error:
            raise as_sent(error) from None
    charge = None if app_state.limiter is None else await app_state.limiter.charge(key, request)
    operation = "chat" if isinstance(body, ChatCompletionRequest) else "text_completion"
    record = RequestLog(
        http.scope, operation, app_state.model_name, key, charge, app_state.metrics, app_state.limiter
    )
    return GenerationResponse(
        Generation(app_state.dispatcher, request),
        answer_of(request.request_id, request),
        bool(body.stream),
        record,
        app_state.interval_s,
        as_sent,
    )


def _request(
    app_state: AppState,
    http: Request,
    body: ChatCompletionRequest | CompletionRequest,
    request_id: str,
    key: ApiKey | None,
) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
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
        drops_turns=body.drops_turns,
        tokens_per_delta=body.stream_interval,
        return_token_ids=bool(body.return_token_ids),
        echo=body.echoes,
    )


def error_as_sent(error: TriadError, body: Completion) -> TriadError:
    """The error in the body's own names: a replica doesn't know which of two names a field had."""
    param = None if error.param is None else body.name_sent(error.param)
    message = re.sub(r"\bmax_tokens\b", body.limit_field, error.message)
    message = re.sub(r"\bthinking_token_budget\b", body.budget_field, message)
    if (param, message) == (error.param, error.message):
        return error
    return TriadError(error.code, message, param)


def _within(sampling: SamplingParams, model: ModelInfo | None) -> SamplingParams:
    """The sampling with no more tokens wanted than the context has, by which a limit is charged."""
    if model is None or sampling.max_tokens is None or sampling.max_tokens <= model.max_context:
        return sampling
    return replace(sampling, max_tokens=model.max_context)


def _cache_salt(app_state: AppState, key: ApiKey | None, asked: str | None) -> str:
    """The salt of a request's prefix cache: its key's and its own, which no other pair has in common."""
    of_key = "" if key is None or app_state.config.shared_prefix_cache else key.name
    return of_key if asked is None else f"{of_key}\0{asked}"


def _check_fits(request: GenerateRequest, model: ModelInfo) -> None:
    """Checks all that needs no tokenizer; the replica checks the rest. Raises TriadError."""
    mode = request.decoding.mode
    if mode is not None and mode not in model.modes:
        modes = ", ".join(model.modes)
        message = f"This model does not decode by {mode}; it has: {modes}."
        raise TriadError(ErrorCode.INVALID_REQUEST, message, "decoding.mode")
    if request.decoding.risk is not None and not model.has_sampler:
        message = "This model has no learned sampler, so a risk means nothing; give a factor or a threshold."
        raise TriadError(ErrorCode.INVALID_REQUEST, message, "decoding.risk")
    ids = [prompt for prompt in request.prompts if prompt and isinstance(prompt[0], int)]
    if any(max(prompt) >= model.vocab_size for prompt in ids):  # type: ignore[type-var, operator]
        message = f"A token id is at most {model.vocab_size - 1} for this model."
        raise TriadError(ErrorCode.INVALID_REQUEST, message, "prompt")
    check_fits(request, model)
