"""What is put right of a schema before llguidance sees it, and what is refused."""

import json
import math

import pytest

from replicas.answer_forms import JsonFormat
from replicas.errors import TriadError
from replicas.grammar import JsonGrammar
from replicas.json_schema import MAX_BOUND, SchemaRefused, enforceable
from replicas.schema_patterns import narrowed
from tests.replicas.test_grammar import CODEC, EOS, VOCAB_SIZE, compiler, grammar_of, tokens_in

SINGLE_BYTES = {CODEC.token_bytes(token): token for token in range(VOCAB_SIZE - 1, -1, -1)}
OPEN = {
    "type": "object",
    "properties": {"name": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": True,
}


def allows(grammar: JsonGrammar, text: str) -> bool:
    """As a whole answer."""
    for byte in text.encode():
        token = SINGLE_BYTES[bytes([byte])]
        if grammar.is_complete or len(grammar.masks((token,))) < 2:
            return False
        grammar.accept(token)
    return grammar.is_complete or EOS in tokens_in(grammar.masks(())[0])


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (2**53, "9007199254740992"),
        (-(2**60), "-1152921504606846976"),
        (MAX_BOUND, "9223372036854774784"),
        (10**30, "1" + "0" * 30),
        (1e22, "1" + "0" * 22),
        (0.1, "0.1"),
    ],
)
def test_a_number_that_is_a_double_comes_out_as_it_is(number: float, text: str) -> None:
    assert allows(grammar_of({"const": number}), text)


@pytest.mark.parametrize("number", [9007199254740993, -(2**53) - 1, 2**63 - 1, 2**63, 1e23, 10**400])
@pytest.mark.parametrize("schema", ["const", "enum", "in a list", "in an object"])
def test_a_number_that_would_come_out_changed_is_refused_and_left_out_at_best(
    number: float, schema: str
) -> None:
    body = {
        "const": {"type": "number", "const": number},
        "enum": {"enum": [1, number]},
        "in a list": {"const": [[number]]},
        "in an object": {"properties": {"const": {"const": {"a": number}}}},
    }[schema]
    with pytest.raises(
        SchemaRefused, match=f"{'properties.const.' if 'object' in schema else ''}(const|enum)"
    ):
        enforceable(json.dumps(body), best_effort=False)
    assert str(number) not in enforceable(json.dumps(body), best_effort=True).schema


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        (
            {"minimum": -(2**63), "maximum": 2**63 - 1},
            (0, 2**53 + 1, MAX_BOUND, -MAX_BOUND),
            (2**63, -(2**63) - 1),
        ),
        ({"minimum": 0, "maximum": 2**63 - 1}, (0, MAX_BOUND), (-1, 2**63)),
        ({"maximum": 2**53 + 1}, (2**53, -(10**25)), (2**53 + 2,)),
        ({"minimum": 2**53 + 1}, (2**53 + 2, 10**25), (2**53, 2**53 + 1)),
        ({"exclusiveMaximum": 2**60 + 1}, (2**60 - 4000, 7), (2**60 + 1,)),
        ({"exclusiveMinimum": -(2**60) - 1}, (-(2**60) + 4000, 7), (-(2**60) - 1,)),
    ],
)
def test_integer_bounds_of_64_bits_are_kept_to(
    bounds: dict[str, int], inside: tuple[int, ...], outside: tuple[int, ...]
) -> None:
    schema = {"type": "integer"} | bounds
    for number in inside:
        assert allows(grammar_of(schema), str(number)), number
    for number in outside:
        assert not allows(grammar_of(schema), str(number)), number


@pytest.mark.parametrize("bound", [2**53, 2**53 + 4, -(2**53) - 4, 10**17, -(10**17), 2**59])
def test_an_excluded_integer_is_excluded_where_the_next_is_no_double(bound: int) -> None:
    for keyword, inside in (("exclusiveMinimum", bound + 8192), ("exclusiveMaximum", bound - 8192)):
        schema = {"type": "integer", keyword: bound}
        assert not allows(grammar_of(schema), str(bound))
        assert allows(grammar_of(schema), str(inside))


@pytest.mark.parametrize(
    ("bounds", "outside", "inside"),
    [
        ({"exclusiveMinimum": 0, "maximum": 0.5}, ("0", "0.0", "-0", "0.51"), ("0.00001", "0.5")),
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 1e-30}, ("0", "0.1"), (f"0.{'0' * 30}5",)),
        ({"exclusiveMinimum": 1, "exclusiveMaximum": 1.5}, ("1", "1.0", "1.5"), ("1.000001", "1.49")),
        ({"minimum": -0.5, "exclusiveMaximum": 0}, ("0", "-0", "-0.0"), ("-0.00001", "-0.5")),
        ({"minimum": -1.5, "exclusiveMaximum": -1.0}, ("-1", "-1.0", "-0.9"), ("-1.01", "-1.5")),
    ],
)
def test_an_excluded_number_is_excluded_where_both_bounds_have_its_whole_part(
    bounds: dict[str, float], outside: tuple[str, ...], inside: tuple[str, ...]
) -> None:
    apart = {"allOf": [{keyword: bound} for keyword, bound in bounds.items()]}
    for schema in ({"type": "number"} | bounds, {"type": "number"} | apart):
        assert not [text for text in outside if allows(grammar_of(schema), text)]
        assert all(allows(grammar_of(schema), text) for text in inside)


@pytest.mark.parametrize(
    ("pattern", "outside", "inside"),
    [
        ('^[^"]$', '"', "\\x-\n"),
        (r"^[^\\]$", "\\", '"x-'),
        (r'^[^-\\"\n]$', '-"\\\n', "x\t"),
        (r"^[^a-z\]\"]$", 'a]"', "A\\"),
        (r"^\P{Po}$", '"\\', "x-"),
        (r"^[\x00-\x1f]$", '"\\x', "\n\x02"),
        (r"^[\x00-!x]$", '"\\', "!x\n"),
        (r"^x-y$", "xy", ""),
    ],
)
def test_a_class_has_no_quote_or_backslash_unless_it_says_so(pattern: str, outside: str, inside: str) -> None:
    grammar = {"type": "string", "pattern": pattern}
    for char in outside:
        assert not allows(grammar_of(grammar), json.dumps(char)), char
    for char in inside:
        assert allows(grammar_of(grammar), json.dumps(char)), char


def test_what_is_no_class_of_a_pattern_stays_as_it_is() -> None:
    for pattern in (r"^\[^a-z]$", r"\x00-\x1f", r"[a-z]-[0-9]", r"\\[^]", "^a$"):
        assert narrowed(pattern) == (pattern if pattern != r"\\[^]" else r"\\[^\x01]")


def test_bounds_of_numbers_are_kept_to_by_their_digits() -> None:
    schema = {"type": "number", "minimum": 2**60 + 1, "maximum": 2**60 + 10**6 + 1}
    assert allows(grammar_of(schema), f"{2**60 + 10**5}.5")
    for number in (2**60, 2**60 + 10**6 + 2):
        assert not allows(grammar_of(schema), str(number))


@pytest.mark.parametrize("keyword", ["minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"])
@pytest.mark.parametrize("size", [2**63 + 1, 2**64 - 1, 1e30, 3.4028234663852886e38, math.inf])
def test_bounds_beyond_64_bits_move_inward_or_are_refused_by_name(keyword: str, size: float) -> None:
    outward = 1 if keyword.endswith("aximum") else -1
    schema = json.dumps({"properties": {"id": {"type": "integer", keyword: size * outward}}})
    kept = json.loads(enforceable(schema, best_effort=False).schema)["properties"]["id"]
    assert kept[keyword] == outward * (2**63 - 1024)
    schema = json.dumps({"properties": {"id": {"type": "integer", keyword: -size * outward}}})
    with pytest.raises(SchemaRefused, match=rf"properties\.id\.{keyword}"):
        enforceable(schema, best_effort=False)
    assert keyword not in enforceable(schema, best_effort=True).schema


@pytest.mark.parametrize("pattern", ["^(?!x)[a-z]+$", "^(?=.{1,9}$)a", r"\bword\b", r"(a|b)\1", "("])
def test_a_pattern_that_cannot_be_compiled_is_refused_by_name_and_left_out_at_best(pattern: str) -> None:
    text = {"type": "string", "format": "hostname", "pattern": pattern}
    keyed = {"type": "object", "patternProperties": {pattern: {"type": "null"}}}
    for name, schema in (("pattern", text), ("patternProperties", keyed)):
        asked = json.dumps({"type": "object", "properties": {"host": schema}, "required": ["host"]})
        with pytest.raises(SchemaRefused, match=rf"properties\.host\.{name}: \w+"):
            enforceable(asked, best_effort=False)
        kept = json.loads(enforceable(asked, best_effort=True).schema)["properties"]["host"]
        assert kept == {key: value for key, value in schema.items() if key != name}
        assert grammar_of(json.loads(asked), best_effort=True)


@pytest.mark.parametrize("name", ["starts_with", "cuid2", "base64"])
def test_a_format_of_the_authors_own_is_a_note_beside_the_pattern_that_says_it(name: str) -> None:
    for more in ({"pattern": "^a"}, {"allOf": [{"pattern": "^a"}, {"pattern": "z$"}]}):
        schema = {"type": "string", "format": name} | more
        assert (
            json.loads(enforceable(json.dumps(schema), best_effort=False).schema) == {"type": "string"} | more
        )
        assert grammar_of(schema)
    alone = json.dumps({"type": "string", "format": name})
    assert name in enforceable(alone, best_effort=False).schema
    standard = {"type": "string", "format": "uuid", "pattern": "^0"}
    assert json.loads(enforceable(json.dumps(standard), best_effort=False).schema) == standard


def test_a_property_named_as_a_keyword_is_a_property() -> None:
    schema = {
        "type": "object",
        "properties": {"const": {"type": "integer"}, "maximum": {"type": "string"}},
        "additionalProperties": False,
    }
    assert json.loads(enforceable(json.dumps(schema), best_effort=False).schema) == schema


@pytest.mark.parametrize("keyword", ["default", "examples", "description"])
def test_notes_are_not_looked_into(keyword: str) -> None:
    schema = {"type": "integer", keyword: [{"const": 2**53 + 1}]}
    assert json.loads(enforceable(json.dumps(schema), best_effort=False).schema) == schema


@pytest.mark.parametrize("text", ['{"default": 1e999}', '{"enum": [1e999]}', '{"maximum": -1e999}'])
def test_numbers_that_overflow_are_refused(text: str) -> None:
    with pytest.raises(SchemaRefused):
        enforceable(text, best_effort=False)


@pytest.mark.parametrize(
    "text", ['{"const": "\\ud800"}', '{"properties": {"\\udfff": {}}}', "[1", "7", '"x"']
)
def test_what_is_no_schema_or_no_unicode_is_refused(text: str) -> None:
    with pytest.raises(TriadError, match="can't be enforced"):
        grammar_of_text(text)


def grammar_of_text(text: str) -> JsonGrammar:
    return compiler().compile(JsonFormat(text))


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        {
            "$ref": "#/$defs/a",
            "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b~1"}]}, "b/": {"$ref": "#/$defs/a"}},
        },
        {"type": "object", "properties": {"x": {"$ref": "#/properties/x"}}},
        {"prefixItems": [{"oneOf": [{"$ref": "#/prefixItems/0"}]}]},
    ],
)
def test_a_schema_that_is_itself_is_refused(schema: dict) -> None:
    with pytest.raises(TriadError, match="refers to itself") as caught:
        grammar_of(schema)
    assert "strict" not in caught.value.message
    with pytest.raises(TriadError, match="refers to itself"):
        grammar_of(schema, best_effort=True)


def test_recursion_through_an_answer_is_not() -> None:
    tree = {"type": "object", "properties": {"left": {"$ref": "#"}}, "additionalProperties": False}
    assert allows(grammar_of(tree), '{"left": {"left": {}}}')


def test_a_declared_key_comes_once_however_it_is_spelled() -> None:
    for again in ("name", "na\\u006de", "\\u006eame"):
        assert not allows(grammar_of(OPEN), f'{{"name": 1, "{again}": 2}}')
    assert allows(grammar_of(OPEN), '{"name": 1, "other": 2}')


def test_an_undeclared_key_that_comes_again_does_not_count_as_more_properties() -> None:
    for num_properties, is_taken in ((1, True), (2, True), (3, False)):
        schema = OPEN | {"minProperties": num_properties}
        if is_taken:
            grammar_of(schema)
        else:
            with pytest.raises(TriadError, match=r"minProperties.*strict"):
                grammar_of(schema)
            grammar_of(schema, best_effort=True)


@pytest.mark.parametrize("text", ["\x01a", "a\x1bb", "\x7f"])
def test_control_characters_of_a_value_are_written_as_escapes(text: str) -> None:
    written = json.dumps(text).replace("\x7f", "\\u007f")
    for schema in ({"const": text}, {"enum": [text, 1]}, {"pattern": f"^{text}$", "type": "string"}):
        assert allows(grammar_of(schema), written)
        assert not allows(grammar_of(schema), '"a"')
    closed = OPEN | {"additionalProperties": False, "properties": {"name": {"const": text}}}
    assert allows(grammar_of(closed), f'{{"name": {written}}}')
    with pytest.raises(TriadError, match=r"additionalProperties.*strict"):
        grammar_of(OPEN | {"properties": {"name": {"const": text}}})


@pytest.mark.parametrize("pattern", ["\\x1b", "^\\u0001", "[\\x00-\\x05]", "\\u{1f}", "\x02"])
def test_patterns_with_control_characters_are_found(pattern: str) -> None:
    assert enforceable(json.dumps({"type": "string", "pattern": pattern}), best_effort=False).has_controls


@pytest.mark.parametrize("pattern", ["[\\u4e00-\\u9fa5]+", "\\x41", "\\t\\n", "^[^b].a$", "\\u0041"])
def test_patterns_without_are_not(pattern: str) -> None:
    assert not enforceable(json.dumps({"type": "string", "pattern": pattern}), best_effort=False).has_controls


def test_multiples_that_overflow_together_are_refused() -> None:
    schema = {"type": "integer", "allOf": [{"multipleOf": 2**16}, {"multipleOf": 2**17}]}
    with pytest.raises(TriadError, match=r"multipleOf.*strict"):
        grammar_of(schema)
    assert allows(grammar_of(schema, best_effort=True), "1")
    small = {"type": "integer", "allOf": [{"multipleOf": 6}, {"multipleOf": 4}]}
    assert allows(grammar_of(small), "24")
    assert not allows(grammar_of(small), "18")


def test_a_schema_sets_no_options_of_the_library() -> None:
    grammar = grammar_of(
        OPEN | {"x-guidance": {"item_separator": ";", "key_separator": "=", "lenient": True}}
    )
    assert allows(grammar, '{"name": 1, "b": 2}')
