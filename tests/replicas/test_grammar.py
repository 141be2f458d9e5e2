"""Grammars of JSON schemas: every walk they allow is JSON that the schema allows, in every lossless mode."""

import json
import random
from functools import cache
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import replicas
from policies.modes import DecodePlan, Mode
from replicas.answer_forms import GrammarFormat, GrammarKind, JsonFormat
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.engine.grammar import Grammar, GrammarFailed
from replicas.engine.sequence import Progress, Sequence
from replicas.errors import ErrorCode, TriadError
from replicas.grammar import JsonGrammar
from replicas.grammar_compiler import MAX_CACHED, GrammarCompiler
from replicas.messages import DecodingOptions, FinishReason, SamplingParams
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec
from tests.replicas.engine.scripted import ScriptedRunner, naive_ar

FOLDER = str(Path(replicas.__path__[0]) / "checkpoints" / "triad-5m")
CODEC = TextCodec.load(FOLDER)
VOCAB_SIZE = 1664
EOS = 2
MASK = 3

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pet": {"enum": ["cat", "dog", None]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS = {
    "person": PERSON,
    "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "choice": {"anyOf": [{"const": "é€😀"}, {"type": "integer"}]},
    "nested": {"$defs": {"p": PERSON}, "type": "array", "items": {"$ref": "#/$defs/p"}, "maxItems": 2},
    "date": {
        "type": "object",
        "properties": {"on": {"format": "date", "type": "string"}},
        "required": ["on"],
    },
    "own": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "age": {"type": "integer"},
                "city": {"type": "string"},
                "name": {"type": "string"},
            },
            "required": ["age", "city", "name"],
        },
        "minItems": 1,
    },
    "object": {"type": "object"},
}
TASK = (
    "Extract as JSON with the keys age, city, name: "
    "Irene Weber is 68, lives in Dublin, works in Legal and speaks Greek."
)
"""The embedded model answers it with the schema "own"."""


@cache
def compiler() -> GrammarCompiler:
    return CODEC.grammars(VOCAB_SIZE, frozenset({EOS}))


def grammar_of(schema: dict, best_effort: bool = False) -> JsonGrammar:
    return compiler().compile(JsonFormat(json.dumps(schema), best_effort))


def tokens_in(mask: bytes) -> list[int]:
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=VOCAB_SIZE, bitorder="little")
    return [int(token) for token in bits.nonzero()[0]]


def text_of(token_ids: list[int]) -> str:
    return b"".join(CODEC.token_bytes(token) for token in token_ids if token != EOS).decode()


def check(text: str, schema: dict) -> None:
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_walks_are_json_that_validates(name: str) -> None:
    """The choice of a random model, whose taste for ends keeps its strings and lists short."""
    rng = random.Random(name)
    num_complete = 0
    for _ in range(12):
        grammar = grammar_of(SCHEMAS[name])
        tokens: list[int] = []
        while not grammar.is_complete and EOS not in tokens and len(tokens) < 120:
            (mask,) = grammar.masks(())
            may = tokens_in(mask)
            ends = [token for token in may if token == EOS or CODEC.token_bytes(token) in (b'"', b"}", b"]")]
            tokens.append(rng.choice(ends if ends and rng.random() < 0.3 else may))
            grammar.accept(tokens[-1])
        if grammar.is_complete or EOS in tokens:
            num_complete += 1
            check(text_of(tokens), SCHEMAS[name])
    assert num_complete >= (1 if name == "object" else 6)


@pytest.mark.parametrize("name", SCHEMAS)
def test_masks_of_a_draft_equal_those_of_one_token_after_another(name: str) -> None:
    """Drafts that are right, wrong from some point, or go on after the end."""
    rng = random.Random(name)
    for _ in range(8):
        grammar, single = grammar_of(SCHEMAS[name]), grammar_of(SCHEMAS[name])
        for _ in range(rng.randint(0, 5)):
            token = rng.choice(tokens_in(single.masks(())[0]))
            if token == EOS or single.is_complete:
                break
            grammar.accept(token)
            single.accept(token)
        draft, expected = [], [single.masks(())[0]]
        is_over = single.is_complete
        for _ in range(10):
            may = tokens_in(expected[-1])
            draft.append(rng.choice(may) if rng.random() < 0.9 else rng.randrange(VOCAB_SIZE))
            if is_over or len(draft) > len(expected) or draft[-1] not in may:
                is_over = True
                continue
            single.accept(draft[-1])
            is_over = single.is_complete or draft[-1] == EOS
            expected.append(single.masks(())[0])
        assert grammar.masks(draft) == tuple(expected)
        assert grammar.masks(draft) == tuple(expected)  # and the state is what it was


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "bogus"}, "bogus"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"$ref": "#/$defs/none"}, "none"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"type": "string", "pattern": "(a"}, "unclosed"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"enum": []}, "Unsatisfiable"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_by_its_fault(schema: dict, says: str) -> None:
    with pytest.raises(TriadError) as caught:
        grammar_of(schema)
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    assert caught.value.param == "response_format.json_schema.schema"
    assert says in caught.value.message


def test_best_effort_enforces_the_rest() -> None:
    schema = {"type": "array", "items": {"enum": [7]}, "uniqueItems": True, "minItems": 1}
    (mask,) = grammar_of(schema, best_effort=True).masks(())
    assert {CODEC.token_bytes(token)[:1] for token in tokens_in(mask)} == {b"["}
    with pytest.raises(TriadError, match="strict"):
        grammar_of(schema)


def test_compiled_grammars_are_kept_up_to_a_bound_and_do_not_share_their_state() -> None:
    mine = CODEC.grammars(VOCAB_SIZE, frozenset({EOS}))
    first = mine.compile(JsonFormat('{"enum": [1]}'))
    first.accept(tokens_in(first.masks(())[0])[0])
    assert first.is_complete
    assert not mine.compile(JsonFormat('{"enum": [1]}')).is_complete
    for number in range(MAX_CACHED + 5):
        mine.compile(JsonFormat(f'{{"enum": [{number}]}}'))
    assert len(mine._compiled) == MAX_CACHED


@pytest.fixture(scope="module")
def runner() -> TorchRunner:
    return TorchRunner.load(FOLDER, dtype="float32", num_pages=160, page_size=16)


def finish(engine: Engine) -> dict[str, list[Progress]]:
    made: dict[str, list[Progress]] = {}
    while engine.has_work:
        for progress in engine.step():
            made.setdefault(progress.sequence.request_id, []).append(progress)
        engine.check_integrity()
    return made


def completion(sequence: Sequence) -> list[int]:
    return sequence.tokens[sequence.num_prompt_tokens :]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_answer_validates_and_speculation_equals_ar(runner: TorchRunner, temperature: float) -> None:
    """The embedded model, all schemas at once, with pages too few for all."""
    engine = Engine(runner, EngineConfig(max_running=24, max_step_tokens=192))
    engine.set_plan(DecodePlan(Mode.DIFFUSION, 8), "test")
    options = {
        "ar": DecodingOptions(Mode.AR),
        "speculation": DecodingOptions(Mode.SELF_SPECULATION, 8),
        "auto": DecodingOptions(),
    }
    asked: dict[tuple[str, int, str], Sequence] = {}
    for name, schema in SCHEMAS.items():
        prompt = CODEC.encode(({"role": "user", "content": TASK},))
        form = JsonFormat(json.dumps(schema))
        for seed in range(2 if temperature else 1):
            for mode, decoding in options.items():
                sampling = SamplingParams(
                    max_tokens=60, temperature=temperature, top_p=0.95, seed=seed, response_format=form
                )
                asked[name, seed, mode] = engine.submit(
                    f"{name}-{seed}-{mode}", prompt, sampling, decoding, grammar=compiler().compile(form)
                )
    made = finish(engine)
    num_complete = 0
    for (name, seed, _), sequence in asked.items():
        assert completion(sequence) == completion(asked[name, seed, "ar"])
        assert sequence.tokens_by_mode[Mode.DIFFUSION] == 0
        reason = made[sequence.request_id][-1].reason
        if reason is FinishReason.STOP:
            num_complete += 1
            check(text_of(completion(sequence)), SCHEMAS[name])
        else:
            assert (reason, sequence.num_completion_tokens) == (FinishReason.LENGTH, 60)
    assert num_complete >= len(asked) / 3
    if not temperature:
        own = asked["own", 0, "speculation"]
        assert made[own.request_id][-1].reason is FinishReason.STOP
        assert own.num_forwards < own.num_completion_tokens - 1


JSON = JsonFormat('{"type": "object"}')


@pytest.mark.parametrize(
    ("sampling", "decoding", "param"),
    [
        (SamplingParams(response_format=JSON, min_tokens=3), DecodingOptions(Mode.DIFFUSION), "min_tokens"),
        (SamplingParams(response_format=JSON, ignore_eos=True), DecodingOptions(), "ignore_eos"),
        (SamplingParams(response_format=JSON, min_tokens=3), DecodingOptions(), "min_tokens"),
    ],
)
def test_what_does_not_go_with_a_grammar_is_refused(sampling, decoding, param) -> None:
    with pytest.raises(TriadError) as caught:
        Engine(ScriptedRunner()).submit("r", [5], sampling, decoding, grammar=grammar_of({}))
    assert caught.value.param == param


class Giving(Grammar):
    """Allows anything for so many tokens, then fails."""

    def __init__(self, num_left: int):
        self.num_left = num_left
        self.is_over = False

    @property
    def is_complete(self) -> bool:
        return False

    def masks(self, draft) -> tuple[bytes, ...]:
        if self.num_left <= 0:
            raise GrammarFailed("too complex")
        return (b"\xff" * 8,) * (len(draft) + 1)

    def accept(self, token_id: int) -> None:
        self.num_left -= 1


@pytest.mark.parametrize("num_left", [0, 3])
def test_a_grammar_that_fails_ends_its_sequence_only(num_left: int) -> None:
    engine = Engine(ScriptedRunner())
    engine.submit("bad", [5, 6], SamplingParams(response_format=JSON), grammar=Giving(num_left))
    engine.submit("good", [5, 6], SamplingParams(max_tokens=12))
    made = finish(engine)
    assert made["bad"][-1].error is ErrorCode.INTERNAL
    assert "too complex" in made["bad"][-1].message
    assert sum(len(progress.token_ids) for progress in made["bad"]) == num_left
    assert [token for progress in made["good"] for token in progress.token_ids] == naive_ar([5, 6], 12)


class Panic(BaseException):
    """As a panic of llguidance's comes out."""


class Panicking:
    """An LLMatcher none of whose calls returns."""

    def compute_bitmask(self) -> bytes:
        raise Panic("index out of bounds\nbacktrace")

    def consume_token(self, token_id: int) -> bool:
        raise Panic("unreachable")


def test_a_panic_of_the_library_is_a_failure_of_its_grammar_alone() -> None:
    grammar = JsonGrammar(Panicking())  # type: ignore[arg-type]
    with pytest.raises(GrammarFailed, match="index out of bounds"):
        grammar.masks(())
    grammar.accept(5)
    assert not grammar.is_complete
    with pytest.raises(GrammarFailed, match="unreachable"):
        grammar.masks(())


def test_a_draft_whose_masks_take_long_is_cut_and_the_state_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = grammar_of(PERSON)
    draft: list[int] = []
    single = grammar_of(PERSON)
    for _ in range(6):
        draft.append(tokens_in(single.masks(())[0])[0])
        single.accept(draft[-1])
    whole = grammar.masks(draft)
    assert len(whole) == 7
    monkeypatch.setattr("replicas.grammar.MAX_DRAFT_MASKS_S", 0.0)
    assert grammar.masks(draft) == whole[:1]
    monkeypatch.undo()
    assert grammar.masks(draft) == whole


def test_a_grammar_whose_masks_have_come_to_take_long_ends_its_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grammar = grammar_of(PERSON)
    token = tokens_in(grammar.masks(())[0])[0]
    monkeypatch.setattr("replicas.grammar.MAX_MASK_S", 0.0)
    with pytest.raises(GrammarFailed, match="ms a token by now; write what repeats as"):
        grammar.masks(())
    grammar.accept(token)
    monkeypatch.undo()
    with pytest.raises(GrammarFailed, match="ms a token by now"):
        grammar.masks(())


@pytest.mark.parametrize("num_logprobs", [None, 0])
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(
    ("lark", "error"),
    [
        (f'start: "ab" <[{EOS}]>', None),
        (f'start: "ab" <[{EOS}]> "cd"', None),
        ('start: "ab" <|eos|>', None),
        (f'start: "ab" <[{MASK}]> "cd"', ErrorCode.INTERNAL),
    ],
)
def test_a_grammar_that_names_an_end_of_text_or_the_mask_ends_alike_in_every_mode(
    runner: TorchRunner, lark: str, error: ErrorCode | None, mode: Mode, num_logprobs: int | None
) -> None:
    """An end of text ends the answer where it is named; the mask is in no answer."""
    form = GrammarFormat(GrammarKind.LARK, lark)
    sampling = SamplingParams(max_tokens=20, response_format=form, logprobs=num_logprobs)
    engine = Engine(runner, EngineConfig())
    engine.submit("a", CODEC.encode("Say"), sampling, DecodingOptions(mode), grammar=compiler().compile(form))
    made = finish(engine)["a"]
    tokens = [token for progress in made for token in progress.token_ids]
    assert made[-1].error is error
    assert text_of(tokens) == "ab"
    assert (tokens[-1] == EOS) == (error is None)


def test_a_failure_behind_a_draft_is_no_failure_of_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    grammar, single = grammar_of(PERSON), grammar_of(PERSON)
    draft: list[int] = []
    for _ in range(4):
        draft.append(tokens_in(single.masks(())[0])[0])
        single.accept(draft[-1])
    whole, of_one = grammar.masks(draft), JsonGrammar._mask
    seen = []

    def failing(self: JsonGrammar) -> bytes:
        seen.append(len(seen))
        if len(seen) > 3:
            raise GrammarFailed("it takes too long")
        return of_one(self)

    monkeypatch.setattr(JsonGrammar, "_mask", failing)
    assert grammar.masks(draft) == whole[:3]
    monkeypatch.undo()
    assert grammar.masks(draft) == whole
