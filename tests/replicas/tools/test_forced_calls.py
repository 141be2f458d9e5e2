"""The embedded model's own calls, over random schemas as pydantic and zod write them: each validates, and is
the same in every lossless mode."""

import json
from random import Random
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel, TypeAdapter

from policies.modes import DecodePlan, Mode
from replicas.answer_forms import Tool, ToolUse
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.grammar import JsonGrammar, compile_schema
from replicas.messages import DecodingOptions, FinishReason, SamplingParams, ToolCallDelta
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec
from tests.replicas.test_grammar import FOLDER, compiler, finish
from tests.replicas.tools.schemas import pydantic_model, zod_schema
from tests.thorough import num_cases

MODES = {
    "ar": DecodingOptions(Mode.AR),
    "self_speculation": DecodingOptions(Mode.SELF_SPECULATION),
    "auto": DecodingOptions(),
}
MAX_TOKENS = 160
ASKED = ("Sort these words.", "How is the weather in Oslo?", "Extract as JSON: Irene is 68, in Dublin.")


@pytest.fixture(scope="module")
def runner() -> TorchRunner:
    return TorchRunner.load(FOLDER, dtype="float32", num_pages=256, page_size=16)


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec.load(FOLDER)


def bias(codec: TextCodec) -> tuple[tuple[int, float], ...]:
    """Brings strings and lists to an end, which a small model does not find by itself."""
    ids = range(codec._tokenizer.vocab_size)
    return tuple((token, 6.0) for token in ids if codec.token_bytes(token)[:1] in (b'"', b"}", b"]"))


def made_calls(
    runner: TorchRunner, codec: TextCodec, schema: dict[str, Any], rng: Random
) -> dict[str, tuple[list[int], FinishReason | None, list[ToolCallDelta]]]:
    """Each mode's tokens, why they ended, and the calls that are read in them."""
    use = ToolUse((Tool("act", json.dumps(schema)),), frozenset({"act"}), is_required=True, is_parallel=False)
    sampling = SamplingParams(max_tokens=MAX_TOKENS, tools=use, logit_bias=bias(codec))
    asked = codec.chats.grammar(sampling, begins_in_reasoning=False)
    assert asked is not None
    matcher = compile_schema(compiler()._load_tokenizer(), asked)
    messages = ({"role": "user", "content": rng.choice(ASKED)},)
    prompt = codec.encode(messages, tools=use)
    if len(prompt) + MAX_TOKENS > runner.spec.max_context:
        # A server refuses a prompt whose schema the context can't hold; what forces the call is the grammar.
        prompt = codec.encode(messages)
    engine = Engine(runner, EngineConfig())
    engine.set_plan(DecodePlan(rng.choice((Mode.SELF_SPECULATION, Mode.DIFFUSION)), 8), "test")
    for mode, decoding in MODES.items():
        engine.submit(mode, list(prompt), sampling, decoding, grammar=JsonGrammar(matcher.deep_copy()))
    found = {}
    for mode, made in finish(engine).items():
        tokens = [token for progress in made for token in progress.token_ids]
        parser = codec.chats.parser(sampling, begins_in_reasoning=False)
        assert parser is not None
        stream = codec.stream(shows_tags=True)
        parsed = parser.push(stream.push(tuple(tokens)) + stream.finish()) + parser.finish()
        assert not parsed.text
        found[mode] = (tokens, made[-1].reason, list(parsed.calls))
    return found


@pytest.mark.parametrize("maker", ["pydantic", "zod"])
def test_a_forced_call_validates_and_is_the_same_in_every_lossless_mode(
    runner: TorchRunner, codec: TextCodec, maker: str
) -> None:
    """25 schemas each, and 250 with --thorough; those that max_tokens cuts are compared alone."""
    num_whole, count = 0, num_cases(25)
    for seed in range(count):
        rng = Random(f"{maker} {seed} called")
        model: type[BaseModel] | None = pydantic_model(rng) if maker == "pydantic" else None
        schema = model.model_json_schema() if model is not None else zod_schema(rng)
        found = made_calls(runner, codec, schema, rng)
        tokens, reason, calls = found["ar"]
        for mode in MODES:
            assert found[mode][0] == tokens, (mode, schema)
        if reason is FinishReason.LENGTH:
            continue
        num_whole += 1
        assert [call.name for call in calls if call.name is not None] == ["act"]
        text = "".join(call.arguments for call in calls)
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
        if model is not None:
            TypeAdapter(model).validate_json(text)
    print(f"{maker}: {num_whole} of {count} calls whole")
    assert num_whole > 0.6 * count
