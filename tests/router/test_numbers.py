"""Any number in any field: what the sampler can bear, or a 400 that names the field."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from replicas.messages import NUM_SEEDS, DecodingOptions, SamplingParams
from router.body import read
from router.completion import Completion
from router.config import Bounds
from router.errors import ApiError
from router.operate import PolicyBody
from router.schema import ChatCompletionRequest, CompletionRequest
from tests.thorough import examples

INT32 = 2**31 - 1
BODIES: dict[type[Completion], dict[str, Any]] = {
    ChatCompletionRequest: {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "logprobs": True},
    CompletionRequest: {"model": "m", "prompt": "Hi"},
}
BOTH = (ChatCompletionRequest, CompletionRequest)
INTEGERS = {
    "max_tokens": (1, INT32, BOTH[:1]),
    "max_completion_tokens": (1, INT32, BOTH[:1]),
    "min_tokens": (0, INT32, BOTH),
    "top_k": (-1, INT32, BOTH),
    "seed": (-NUM_SEEDS, NUM_SEEDS - 1, BOTH),
    "priority": (-1000, 1000, BOTH),
    "n": (1, 128, BOTH),
    "best_of": (1, 1, BOTH[1:]),
    "logprobs": (0, 5, BOTH[1:]),
    "top_logprobs": (0, 20, BOTH[:1]),
    "decoding.block_length": (2, 64, BOTH),
    "decoding.max_steps": (1, 64, BOTH),
}
FLOATS = {
    "temperature": (0.0, 2.0, BOTH),
    "top_p": (math.nextafter(0.0, 1.0), 1.0, BOTH),
    "min_p": (0.0, 1.0, BOTH),
    "presence_penalty": (-2.0, 2.0, BOTH),
    "frequency_penalty": (-2.0, 2.0, BOTH),
    "repetition_penalty": (0.01, 100.0, BOTH),
    "timeout_s": (math.nextafter(0.0, 1.0), 86400.0, BOTH),
    "logit_bias.5": (-100.0, 100.0, BOTH),
    "decoding.threshold": (math.nextafter(0.0, 1.0), 1.0, BOTH),
    "decoding.quality.max_differing": (math.nextafter(0.0, 1.0), 1.0, BOTH),
}
NUMBERS = INTEGERS | FLOATS
FIELDS = [(name, model) for name, (_, _, models) in NUMBERS.items() for model in models]

ODD = [
    *["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e-400", "-0", "-0.0", "0", "0.0", "4.0", "1.5"],
    *["true", "false", '"4"', '""', "[]", "[1]", "{}", "5e-324", "1.7976931348623157e308", "1e999999999"],
    *map(str, [10**400, -(10**400), 10**4000, *(sign * 2**k for k in range(0, 130) for sign in (1, -1))]),
    *(str(2**k - 1) for k in (7, 15, 31, 32, 53, 63, 64)),
]
RAW = st.one_of(
    st.sampled_from(ODD),
    st.integers(-(10**420), 10**420).map(str),
    st.integers(-200, 200).map(str),
    st.floats().map(json.dumps),
    st.floats(-200, 200, width=16).map(json.dumps),
    st.integers(-200, 200).map(lambda number: f"{number}.0"),
)


def outcome(model: type[BaseModel], body: bytes) -> BaseModel | ApiError:
    try:
        return read(model, body, Bounds())
    except ApiError as error:
        return error


def body_with(model: type[Completion], name: str, raw: str) -> bytes:
    more: Any = "HERE"
    for part in reversed(name.split(".")):
        more = {part: more}
    return json.dumps(BODIES[model] | more).replace('"HERE"', raw).encode()


def check_bounds(sampling: SamplingParams, decoding: DecodingOptions) -> None:
    """What the sampler and the scheduler take."""
    assert sampling.max_tokens is None or 0 <= sampling.max_tokens <= INT32
    assert 0 <= sampling.min_tokens <= INT32
    assert 0 <= sampling.top_k <= INT32
    assert 0 <= sampling.seed < NUM_SEEDS
    assert 0 <= sampling.temperature <= 2
    assert 0 < sampling.top_p <= 1
    assert 0 <= sampling.min_p <= 1
    assert abs(sampling.presence_penalty) <= 2 >= abs(sampling.frequency_penalty)
    assert 0.01 <= sampling.repetition_penalty <= 100
    assert all(0 <= token <= INT32 and abs(bias) <= 100 for token, bias in sampling.logit_bias)
    assert sampling.logprobs is None or 0 <= sampling.logprobs <= 20
    assert decoding.threshold is None or 0 < decoding.threshold <= 1
    assert decoding.max_differing is None or 0 < decoding.max_differing <= 1
    assert decoding.block_length is None or 2 <= decoding.block_length <= 64
    assert decoding.max_steps is None or 1 <= decoding.max_steps <= 64
    integers = [sampling.max_tokens, sampling.min_tokens, sampling.top_k, sampling.seed, sampling.logprobs]
    integers += [decoding.block_length, decoding.max_steps, *(token for token, _ in sampling.logit_bias)]
    assert {type(number) for number in integers} <= {int, type(None)}


@given(field=st.sampled_from(FIELDS), raw=RAW)
@examples(800)
def test_any_number_is_in_range_or_named(field: tuple[str, type[Completion]], raw: str) -> None:
    name, model = field
    least, most, _ = NUMBERS[name]
    value = json.loads(raw)
    is_number = type(value) in (int, float)
    is_whole = (
        is_number and math.isfinite(value) and value == int(value) if type(value) is float else is_number
    )
    fits = is_number and least <= value <= most and (name in FLOATS or is_whole)
    request = outcome(model, body_with(model, name, raw))
    if isinstance(request, ApiError):
        assert not fits, (name, raw, request.message)
        assert (request.status, request.param) == (400, name)
        assert len(request.message) < 300
        return
    assert fits, (name, raw)
    assert isinstance(request, Completion)
    check_bounds(request.sampling(lambda: 0), request.decoding_options())


@pytest.mark.parametrize("name", NUMBERS)
def test_the_ends_of_each_range_are_in_it_and_what_is_next_to_them_is_not(name: str) -> None:
    least, most, (model, *_) = NUMBERS[name]
    for end, away in ((least, -math.inf), (most, math.inf)):
        read(model, body_with(model, name, repr(end)), Bounds())
        beyond = math.nextafter(end, away) if name in FLOATS else end + (1 if away > 0 else -1)
        with pytest.raises(ApiError) as error:
            read(model, body_with(model, name, repr(beyond)), Bounds())
        assert error.value.param == name


@given(raw=RAW, key=st.one_of(st.text(max_size=12), RAW, st.just("9" * 10), st.just("2147483648")))
@examples(200)
def test_any_bias_is_of_a_token_or_named(raw: str, key: str) -> None:
    body = json.dumps(BODIES[CompletionRequest] | {"logit_bias": {key: "HERE"}}).replace('"HERE"', raw)
    request = outcome(CompletionRequest, body.encode())
    if isinstance(request, ApiError):
        assert request.status == 400
        assert request.param.startswith("logit_bias")
        return
    assert isinstance(request, CompletionRequest)
    ((token, _),) = request.sampling(lambda: 0).logit_bias
    assert str(token) == key
    check_bounds(request.sampling(lambda: 0), request.decoding_options())


@given(ids=st.lists(RAW, min_size=1, max_size=3))
@examples(200)
def test_any_token_id_is_one_or_the_prompt_is_named(ids: list[str]) -> None:
    body = f'{{"model": "m", "prompt": [{",".join(ids)}]}}'
    request = outcome(CompletionRequest, body.encode())
    if isinstance(request, ApiError):
        assert (request.status, request.param) == (400, "prompt")
        return
    for prompt in request.prompts_for_replica():  # type: ignore[attr-defined]
        assert isinstance(prompt, str) or all(type(i) is int and 0 <= i <= INT32 for i in prompt)


@given(raw=RAW)
@examples(100)
def test_a_policys_parameters_are_numbers_that_all_can_read(raw: str) -> None:
    body = json.dumps({"policy": "threshold", "policy_params": {"stabilise": {"dwell_s": "HERE"}}})
    body = body.replace('"HERE"', raw)
    request = outcome(PolicyBody, body.encode())
    if isinstance(request, ApiError):
        assert (request.status, request.param) == (400, "policy_params")
        return
    params = request.policy_params  # type: ignore[attr-defined]
    json.loads(json.dumps(params, allow_nan=False))
    value = params["stabilise"]["dwell_s"]
    assert not isinstance(value, int | float) or abs(value) <= 1e9
