"""Generated schemas: whatever their grammars allow is JSON that they allow, or they are refused."""

import json
from random import Random
from typing import Any

import jsonschema
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from replicas.errors import ErrorCode, TriadError
from tests.replicas.test_grammar import CODEC, EOS, grammar_of, text_of, tokens_in
from tests.thorough import examples

MAX_WALK = 200
ENDS = frozenset({b'"', b"}", b"]"})

integers = st.one_of(
    st.integers(-20, 20),
    st.integers(-(2**64), 2**64),
    st.sampled_from([2**53 - 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**30]),
)
numbers = st.one_of(
    integers, st.floats(-1e6, 1e6).map(lambda x: round(x, 3)), st.sampled_from([1e23, 5e-324, 1e300])
)
texts = st.text(st.characters(codec="utf-8"), max_size=5)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(texts, inner, max_size=2)),
    max_leaves=4,
)
names = st.sampled_from(["a", "b", "name", "a\tb", 'q"', "ü", "const", "enum"])


def some(**keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of the keywords."""
    return st.fixed_dictionaries({}, optional=keywords)


def of_type(name: str, **keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return some(**keywords).map(lambda chosen: {"type": name} | chosen)


lengths = st.integers(0, 4)
leaves = st.one_of(
    st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"$ref": "#"}, {"$ref": "#/$defs/d"}]),
    st.builds(lambda value: {"const": value}, values),
    st.builds(lambda several: {"enum": several}, st.lists(values, min_size=1, max_size=3)),
    of_type(
        "integer",
        minimum=integers,
        maximum=integers,
        exclusiveMinimum=integers,
        exclusiveMaximum=integers,
        multipleOf=st.sampled_from([1, 2, 3, 4, 5, 6, 10]),
    ),
    of_type("number", minimum=numbers, maximum=numbers, exclusiveMinimum=numbers, exclusiveMaximum=numbers),
    of_type(
        "string",
        minLength=lengths,
        maxLength=lengths,
        pattern=st.sampled_from(["^[a-z]+$", "ab", "^\\w{2}$", "^é?[0-9]*$", "^$"]),
    ),
)


key_names = st.one_of(
    leaves,
    st.builds(lambda several: {"enum": several}, st.lists(names, max_size=3)),
    some(pattern=st.sampled_from(["^[a-z]+$", "ab", "^é?[0-9]*$"]), minLength=lengths, maxLength=lengths),
)


def composed(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    several = st.lists(inner, min_size=1, max_size=2)
    return st.one_of(
        of_type("array", items=inner, minItems=lengths, maxItems=lengths, prefixItems=several),
        of_type(
            "object",
            properties=st.dictionaries(names, inner, max_size=3),
            required=st.lists(names, max_size=2, unique=True),
            additionalProperties=st.one_of(st.booleans(), inner),
            patternProperties=st.dictionaries(st.sampled_from(["^x_", "e$"]), inner, max_size=1),
            propertyNames=key_names,
            minProperties=lengths,
            maxProperties=lengths,
        ),
        st.builds(lambda options: {"anyOf": options}, several),
        st.builds(lambda parts: {"allOf": parts}, several),
    )


schemas = st.builds(
    lambda schema, defined: schema | {"$defs": {"d": defined}},
    st.recursive(leaves, composed, max_leaves=6),
    st.one_of(leaves, composed(leaves)),
)


def refusal_of(schema: dict[str, Any]) -> TriadError | None:
    try:
        grammar_of(schema)
    except TriadError as refused:
        return refused
    return None


def walk(schema: dict[str, Any], seed: int) -> str | None:
    """Of a random model with a taste for ends; None where it has not come to one."""
    random, grammar, tokens = Random(seed), grammar_of(schema), []
    for _ in range(MAX_WALK):
        if grammar.is_complete:
            return text_of(tokens)
        may = tokens_in(grammar.masks(())[0])
        if EOS in may:
            return text_of(tokens)
        ends = [token for token in may if CODEC.token_bytes(token) in ENDS]
        tokens.append(random.choice(ends if ends and random.random() < 0.5 else may))
        grammar.accept(tokens[-1])
    return None


@examples(60, suppress_health_check=[HealthCheck.too_slow])
@given(schemas, st.integers(0, 2**32))
def test_what_a_schema_allows_validates_or_it_is_refused(schema: dict[str, Any], seed: int) -> None:
    refused = refusal_of(schema)
    if refused is not None:
        assert (refused.code, refused.param) == (
            ErrorCode.INVALID_REQUEST,
            "response_format.json_schema.schema",
        )
        return
    for text in [walk(schema, seed + k) for k in range(3)]:
        if text is not None:
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
