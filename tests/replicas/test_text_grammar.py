"""Forms of answers that are no schema: what they allow, to the character, and what is refused by name."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest

from replicas.answer_forms import GrammarFormat, GrammarKind, JsonFormat
from replicas.errors import TriadError
from replicas.grammar import JsonGrammar
from tests.replicas.test_grammar import CODEC, EOS, VOCAB_SIZE, compiler

ODD = ["a b", '"x"', "née\n", "\\d", "a/b", "</s>", "😀", "a"]


def grammar_of(kind: str, text: object) -> JsonGrammar:
    given = text if isinstance(text, str) else json.dumps(text)
    return compiler().compile(GrammarFormat(GrammarKind(kind), given))


def walk(grammar: JsonGrammar, rng: random.Random, most: int = 60) -> tuple[str, bool]:
    """A random answer that the grammar allows, and whether it came to an end."""
    ids: list[int] = []
    while len(ids) < most:
        (mask,) = grammar.masks(())
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=VOCAB_SIZE, bitorder="little")
        token = int(rng.choice(bits.nonzero()[0]))
        if token == EOS:
            break
        grammar.accept(token)
        ids.append(token)
        if grammar.is_complete:
            break
    stream = CODEC.stream(continues_text=True)
    return stream.push(tuple(ids)) + stream.finish(), len(ids) < most


def allows(grammar: JsonGrammar, text: str) -> bool:
    ids = CODEC._backend.encode(text, add_special_tokens=False).ids
    return len(grammar.masks(ids)) == len(ids) + 1


@pytest.mark.parametrize("seed", range(8))
def test_a_choice_is_one_of_them(seed):
    told, ended = walk(grammar_of("choice", ODD), random.Random(seed))
    assert ended
    assert told in ODD


def test_every_choice_can_be_made():
    for choice in ODD:
        assert allows(grammar_of("choice", ODD), choice)
    assert not allows(grammar_of("choice", ODD), "ab")


@pytest.mark.parametrize("seed", range(8))
def test_a_regex_is_kept_to(seed):
    pattern = r"[A-Z]{2}-[0-9]{1,3}( née)?"
    told, ended = walk(grammar_of("regex", pattern), random.Random(seed))
    assert ended
    assert re.fullmatch(pattern, told)


@pytest.mark.parametrize("seed", range(8))
def test_a_lark_grammar_is_kept_to(seed):
    lark = 'start: "(" NUMBER ("+" NUMBER)* ")"\nNUMBER: /[0-9]{1,2}/'
    told, ended = walk(grammar_of("grammar", lark), random.Random(seed), 200)
    assert not ended or re.fullmatch(r"\([0-9]{1,2}(\+[0-9]{1,2})*\)", told)


@pytest.mark.parametrize("seed", range(8))
def test_bad_words_never_come(seed):
    words = ["e", "a/b", ".", "1", "née"]
    told, _ = walk(grammar_of("bad_words", words), random.Random(seed))
    assert told
    assert not any(word in told for word in words)
    assert allows(grammar_of("bad_words", ["bad"]), "ba nana")
    assert not allows(grammar_of("bad_words", ["bad"]), "so bad")


@pytest.mark.parametrize(
    "word", ["\n", "a\nb", "\r\n", "\\\n", "\\n", "\t", "/\n/", " ", "#", "\x0b", '"', "\\"]
)
def test_any_word_may_be_a_bad_one(word):
    grammar = grammar_of("bad_words", [word, "zz"])
    assert allows(grammar, "fine")
    assert not allows(grammar_of("bad_words", [word, "zz"]), f"x{word}y")
    assert not allows(grammar_of("bad_words", [word, "zz"]), "xzzy")
    assert len(word) == 1 or allows(grammar_of("bad_words", [word, "zz"]), f"x{word[:-1]}y{word[1:]}")


def test_a_structural_tag_holds_within_free_text():
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    tag = {
        "type": "structural_tag",
        "structures": [{"begin": "<f>", "schema": schema, "end": "</f>"}],
        "triggers": ["<f"],
    }
    grammar = grammar_of("structural_tag", tag)
    assert allows(grammar, 'So: <f>{"n": 5}</f> and <f>{"n": 6}</f>.')
    assert not allows(grammar, "So: <f>no")
    assert allows(grammar, "So: <g")
    with pytest.raises(TriadError, match="trigger") as caught:
        grammar_of("structural_tag", tag | {"triggers": ["<x"]})
    assert caught.value.param == "structured_outputs.structural_tag"


@pytest.mark.parametrize(
    ("kind", "text"), [("regex", "(a"), ("grammar", "root ::= x"), ("grammar", "start: A")]
)
def test_what_is_no_grammar_is_named(kind, text):
    with pytest.raises(TriadError, match="can't be enforced") as caught:
        grammar_of(kind, text)
    assert caught.value.param == f"structured_outputs.{kind}"


def test_a_schema_that_is_not_strict_warns_of_what_it_leaves_out():
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    grammar = compiler().compile(JsonFormat(json.dumps(schema), best_effort=True))
    assert "uniqueItems" in str(grammar.warning)
    assert compiler().compile(JsonFormat(json.dumps(schema), best_effort=True)).warning == grammar.warning
    whole = {"type": "array", "items": {"type": "integer"}}
    assert compiler().compile(JsonFormat(json.dumps(whole), best_effort=True)).warning is None
    with pytest.raises(TriadError, match="uniqueItems"):
        compiler().compile(JsonFormat(json.dumps(schema)))


@pytest.mark.parametrize("seed", range(8))
def test_json_has_little_white_space(seed):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"enum": [1, None]}}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    told, ended = walk(compiler().compile(JsonFormat(json.dumps(schema))), random.Random(seed), 200)
    if ended:
        assert re.search(r"\s{6}|[^\n ] {2}|\n\s*\n", told) is None
        jsonschema.validate(json.loads(told), schema)
