"""Diffusion in a form, under penalties and with log-probabilities, against naive decoding, token for token.

Real models, all in one batch with the other modes, on pages too few for all of them.
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import replicas
from policies.modes import DecodePlan, Mode
from replicas.answer_forms import JsonFormat
from replicas.config import EngineConfig
from replicas.engine.batch import TokenLogprob
from replicas.engine.engine import Engine
from replicas.engine.sequence import Sequence
from replicas.grammar import JsonGrammar
from replicas.grammar_compiler import GrammarCompiler
from replicas.messages import DecodingOptions, FinishReason, SamplingParams
from replicas.model.runner import TorchRunner
from replicas.model.sampler import uniforms
from replicas.sampler_file import write_sampler
from replicas.text import TextCodec
from tests.naive_diffusion import naive_diffusion
from tests.naive_sampler import SAMPLER
from tests.reference import Reference
from tests.replicas.tools.schemas import pydantic_model, zod_schema
from tests.thorough import examples
from tests.tiny_checkpoint import EOS_TOKEN_ID, MASK_TOKEN_ID, VOCAB_SIZE, make_tiny_checkpoint

FOLDER = Path(replicas.__path__[0]) / "checkpoints" / "triad-5m"
PENALTIES = SamplingParams(presence_penalty=0.6, frequency_penalty=0.4, repetition_penalty=1.2)
ENCOURAGED = SamplingParams(presence_penalty=-0.5, repetition_penalty=0.9)
PLANS = (
    DecodePlan(Mode.DIFFUSION, 8),
    DecodePlan(Mode.DIFFUSION, 16, 0.3),
    DecodePlan(Mode.DIFFUSION, 5, 0.9),
    DecodePlan(Mode.DIFFUSION, 8, risk=1.0),
)


class ReferenceModel:
    """The naive reference's choices under a request's rules, for tests.naive_diffusion."""

    def __init__(self, reference: Reference, sampling: SamplingParams, prompt_len: int):
        self._reference, self._sampling, self._prompt_len = reference, sampling, prompt_len

    def next_token(self, context: tuple[int, ...], allowed: bytes | None) -> int:
        logits = self._reference.causal_logits(context)[-1]
        return self._choose(logits, len(context), context, allowed)[0]

    def guesses(
        self, prefix: tuple[int, ...], block: tuple[int, ...], counted: tuple[int, ...]
    ) -> dict[int, tuple[int, float]]:
        adapter = self._reference.denoise_with_adapter
        logits = self._reference.block_logits(prefix, block, adapter=adapter)
        return {
            index: self._choose(logits[index], len(prefix) + index, counted, None)
            for index, token in enumerate(block)
            if token == self._reference.mask_token_id
        }

    def _choose(
        self, logits: torch.Tensor, position: int, counted: tuple[int, ...], allowed: bytes | None
    ) -> tuple[int, float]:
        sampling = self._sampling
        logits = logits.double().clone()
        logits[self._reference.mask_token_id] = -math.inf
        probs = logits.softmax(-1)
        for token in set(counted):
            scale = sampling.repetition_penalty
            logits[token] = logits[token] / scale if logits[token] > 0 else logits[token] * scale
            times = counted[self._prompt_len :].count(token)
            logits[token] -= (times > 0) * sampling.presence_penalty + times * sampling.frequency_penalty
        if allowed is not None:
            bits = int.from_bytes(allowed, "little")
            logits[[token for token in range(len(logits)) if not bits >> token & 1]] = -math.inf
        if sampling.temperature > 0:
            cumulative = (logits / sampling.temperature).softmax(-1).cumsum(-1)
            target = float(uniforms([sampling.seed], [position])[0]) * float(cumulative[-1])
            token = int(torch.searchsorted(cumulative, target, right=True))
        else:
            token = int(logits.argmax())
        return token, float(probs[token])


def naive(
    reference: Reference,
    prompt: list[int],
    sampling: SamplingParams,
    plan: DecodePlan,
    grammar: Callable[[], JsonGrammar] | None = None,
    overlaps: bool = True,
    max_steps: int | None = None,
) -> list[int]:
    assert sampling.max_tokens is not None
    return naive_diffusion(
        ReferenceModel(reference, sampling, len(prompt)),
        prompt,
        sampling.max_tokens,
        plan,
        mask=reference.mask_token_id,
        eos=frozenset() if sampling.ignore_eos else reference.eos_token_ids,
        max_context=reference.max_context,
        grammar=grammar,
        is_penalised=sampling.has_penalties,
        overlaps=overlaps,
        max_steps=max_steps,
    )


def pinned(plan: DecodePlan, max_steps: int | None = None) -> DecodingOptions:
    block_length = None if plan.mode is Mode.AR else plan.block_length
    return DecodingOptions(
        plan.mode, block_length, plan.threshold, factor=plan.factor, risk=plan.risk, max_steps=max_steps
    )


def completion(sequence: Sequence) -> list[int]:
    return sequence.tokens[sequence.num_prompt_tokens :]


def finish(engine: Engine) -> dict[str, tuple[list[TokenLogprob], FinishReason | None]]:
    told: dict[str, tuple[list[TokenLogprob], FinishReason | None]] = {}
    while engine.has_work:
        for made in engine.step():
            assert made.error is None, made.message
            entries, _ = told.get(made.sequence.request_id, ([], None))
            told[made.sequence.request_id] = ([*entries, *made.logprobs], made.reason)
        engine.check_integrity()
    return told


@pytest.fixture(scope="module", params=[False, True], ids=["denoises plain", "denoises with the adapter"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    folder = make_tiny_checkpoint(path, seed=3, denoise_with_adapter=request.param)
    write_sampler(folder, SAMPLER, "a test")
    return folder


def prompts(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    ordinary = [token for token in range(VOCAB_SIZE) if token not in (MASK_TOKEN_ID, EOS_TOKEN_ID)]
    return [[rng.choice(ordinary) for _ in range(rng.choice((1, 3, 9, 20, 37)))] for _ in range(count)]


@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize("forward", ["auto", "torch"])
def test_penalties_and_logprobs_in_a_crowd(tiny: Path, forward: str, overlaps: bool) -> None:
    """Both forwards; blocks that begin in the commit before, and alone; sampled and greedy."""
    reference = Reference(tiny)
    reference.overlaps_blocks = overlaps
    runner = TorchRunner.load(str(tiny), dtype="float32", num_pages=20, page_size=8, forward=forward)
    engine = Engine(runner, EngineConfig(max_running=8, max_step_tokens=192, overlap_blocks=overlaps))
    wanted: dict[str, list[int]] = {}
    asked: dict[str, Sequence] = {}
    for index, prompt in enumerate(prompts(8, seed=8)):
        rules = (PENALTIES, ENCOURAGED, SamplingParams(logprobs=2), replace(PENALTIES, logprobs=0))[index % 4]
        temperature = 0.8 if index % 3 == 2 else 0.0
        sampling = replace(rules, max_tokens=16, temperature=temperature, seed=index)
        max_steps = 3 if index % 5 == 4 else None
        plan = PLANS[(index + index // 4) % 4]
        name = f"r{index}"
        asked[name] = engine.submit(name, prompt, sampling, pinned(plan, max_steps))
        wanted[name] = naive(reference, prompt, sampling, plan, overlaps=overlaps, max_steps=max_steps)
        other = (DecodePlan(Mode.AR), DecodePlan(Mode.SELF_SPECULATION, 6))[index % 2]
        engine.submit(f"o{index}", prompt, replace(sampling, logprobs=1), pinned(other))
    told = finish(engine)
    assert {name: completion(sequence) for name, sequence in asked.items()} == wanted
    assert sum(sequence.num_preemptions for sequence in asked.values()) > 0
    for name, sequence in asked.items():
        check_logprobs(reference, sequence, told[name][0])


def check_logprobs(reference: Reference, sequence: Sequence, entries: list[TokenLogprob]) -> None:
    """They are what the causal model says of each token, given those before it."""
    if sequence.sampling.logprobs is None:
        assert entries == []
        return
    logits = reference.causal_logits(sequence.tokens).double()
    logits[:, reference.mask_token_id] = -math.inf
    rows = logits.log_softmax(-1)[sequence.num_prompt_tokens - 1 : -1]
    ids = completion(sequence)
    assert [entry.token_id for entry in entries] == ids
    expected = [float(row[token]) for row, token in zip(rows, ids, strict=True)]
    assert [entry.logprob for entry in entries] == pytest.approx(expected, abs=3e-4)
    for entry, row in zip(entries, rows, strict=True):
        best = row.topk(sequence.sampling.logprobs).values.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(best, abs=3e-4)


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec.load(str(FOLDER))


@pytest.fixture(scope="module")
def compiler(codec: TextCodec) -> GrammarCompiler:
    return codec.grammars(1664, frozenset({2}))


@pytest.fixture(scope="module")
def runner() -> TorchRunner:
    return TorchRunner.load(str(FOLDER), dtype="float32", num_pages=160, page_size=16)


OWN = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"age": {"type": "integer"}, "city": {"type": "string"}, "name": {"type": "string"}},
        "required": ["age", "city", "name"],
    },
    "minItems": 1,
}
"""The schema that the embedded model answers TASK by, by itself."""
FOREIGN = {
    "type": "object",
    "properties": {
        "person": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}},
        "since": {"type": "string", "format": "date"},
        "tags": {"type": "array", "items": {"enum": ["red", 7, None]}, "maxItems": 2},
    },
    "required": ["person", "since", "tags"],
    "additionalProperties": False,
}
TASK = (
    "Extract as JSON with the keys age, city, name: "
    "Irene Weber is 68, lives in Dublin, works in Legal and speaks Greek."
)


@pytest.mark.parametrize(
    ("schema", "rules", "plan"),
    [
        (OWN, SamplingParams(), PLANS[0]),
        (OWN, SamplingParams(temperature=0.8, seed=5, logprobs=1), PLANS[1]),
        (FOREIGN, SamplingParams(), PLANS[0]),
        (FOREIGN, SamplingParams(temperature=0.8, seed=6), PLANS[1]),
        (FOREIGN, replace(PENALTIES, logprobs=0), PLANS[2]),
    ],
    ids=["own", "own, sampled", "foreign", "foreign, sampled", "foreign, penalised"],
)
def test_a_form_of_the_embedded_checkpoint(
    runner: TorchRunner,
    codec: TextCodec,
    compiler: GrammarCompiler,
    schema: dict,
    rules: SamplingParams,
    plan: DecodePlan,
) -> None:
    """Alone and beside other modes: what the naive decoder gives, and JSON that the schema allows."""
    form = JsonFormat(json.dumps(schema))
    reference = Reference(FOLDER)
    prompt = codec.encode(({"role": "user", "content": TASK},))
    sampling = replace(rules, max_tokens=70, response_format=form)
    engine = Engine(runner, EngineConfig(max_running=8, max_step_tokens=192))
    sequence = engine.submit("r", prompt, sampling, pinned(plan), grammar=compiler.compile(form))
    told = finish(engine)
    wanted = naive(reference, prompt, sampling, plan, lambda: compiler.compile(form))
    assert completion(sequence) == wanted
    check_logprobs(reference, sequence, told["r"][0])
    assert told["r"][1] is FinishReason.STOP
    check_json(codec, sequence, schema)
    for index, mode in enumerate(Mode):
        engine.submit(f"o{index}", prompt, sampling, DecodingOptions(mode), grammar=compiler.compile(form))
    again = engine.submit("again", prompt, sampling, pinned(plan), grammar=compiler.compile(form))
    finish(engine)
    assert completion(again) == wanted


def check_json(codec: TextCodec, sequence: Sequence, schema: dict) -> None:
    text = codec.decode([token for token in completion(sequence) if token != EOS_TOKEN_ID])
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


@examples(25)
@given(seed=st.integers(0, 10**9))
def test_every_answer_in_any_schema_is_valid(
    runner: TorchRunner, codec: TextCodec, compiler: GrammarCompiler, seed: int
) -> None:
    """Random schemas as programs write them: what ends by itself validates, what is cut is a beginning."""
    rng = random.Random(seed)
    schema = zod_schema(rng) if seed % 2 else pydantic_model(rng).model_json_schema()
    form = JsonFormat(json.dumps(schema), best_effort=True)
    plan = replace(rng.choice(PLANS[:3]), block_length=rng.choice((2, 7, 16, 32)))
    sampling = SamplingParams(
        max_tokens=rng.randint(1, 90),
        temperature=rng.choice((0.0, 0.8, 1.5)),
        seed=seed,
        response_format=form,
        logprobs=rng.choice((None, 0)),
        presence_penalty=rng.choice((0.0, 0.0, 0.7)),
    )
    options = pinned(plan, rng.choice((None, None, 2)))
    engine = Engine(runner)
    prompt = codec.encode(({"role": "user", "content": TASK},))
    sequence = engine.submit("r", prompt, sampling, options, grammar=compiler.compile(form))
    reason = finish(engine)["r"][1]
    ids = completion(sequence)
    assert compiler.compile(form).num_allowed(ids) == len(ids)
    assert sequence.num_forwards <= 2 * len(ids) + plan.block_length
    if reason is FinishReason.STOP:
        check_json(codec, sequence, schema)
