"""The reader of what a model writes: the same however the text is cut, and never half a tag."""

import json
import keyword
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.messages import Delta
from replicas.model.config import CheckpointError
from replicas.text_stream import FIRST_MARK
from replicas.tools.families import FORMATS, format_of
from replicas.tools.output import OutputParser
from replicas.tools.readers import CallSink
from replicas.tools.reasoning import MARKS
from router.deltas import joined

NAMES = ("f", "get_weather")
TAGS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>")
CONTROLS = {tag: chr(FIRST_MARK + k) for k, tag in enumerate(TAGS)}


def call_text(name: str, calls: Sequence[tuple[str, dict]]) -> str:
    """The calls as a model of the family writes them."""
    if name == "hermes":
        return "\n".join(
            f"<tool_call>\n{json.dumps({'name': f, 'arguments': a})}\n</tool_call>" for f, a in calls
        )
    if name == "mistral":
        return "".join(f"[TOOL_CALLS]{f}[ARGS]{json.dumps(a)}" for f, a in calls)
    if name == "mistral_list":
        return "[TOOL_CALLS]" + json.dumps([{"name": f, "arguments": a} for f, a in calls])
    if name == "llama3_json":
        return "; ".join(json.dumps({"name": f, "parameters": a}) for f, a in calls)
    written = [f + "(" + ", ".join(f"{k}={v!r}" for k, v in a.items()) + ")" for f, a in calls]
    return f"[{', '.join(written)}]"


def read(parser: OutputParser, parts: Sequence[str]) -> Delta:
    pieces = [parser.push(part) for part in parts] + [parser.finish()]
    return joined([Delta("r", p.text, 0, reasoning=p.reasoning, tool_calls=p.calls) for p in pieces])


def told(delta: Delta) -> tuple[str, str, list[tuple[str | None, str, int]]]:
    return delta.text, delta.reasoning, [(c.name, c.arguments, c.index) for c in delta.tool_calls]


def parser_of(name: str, reasoning: str | None = None, begins: bool = False, control: bool = False):
    marks = None if reasoning is None else MARKS[reasoning]
    return OutputParser(
        FORMATS[name], NAMES, marks, begins, lambda tag: CONTROLS.get(tag, tag) if control else tag
    )


def with_controls(text: str) -> str:
    for tag, char in CONTROLS.items():
        text = text.replace(tag, char)
    return text


def cuts(text: str, places: Sequence[int]) -> Iterator[str]:
    bounds = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    for begin, end in pairwise(bounds):
        yield text[begin:end]


leaves = st.one_of(st.none(), st.booleans(), st.integers(-9, 999), st.text(max_size=8), st.just('a"}\\]'))
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(["a", "b c"]), inner, max_size=2)
    ),
    max_leaves=4,
)
calls_made = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(st.sampled_from(["x", "y_2"]), values, max_size=2)),
    min_size=1,
    max_size=3,
)
texts = st.text("ab <>[]|/_toolcaTOL\n", max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    calls=calls_made,
    text=texts,
    thought=st.text("ab <>/think\n", max_size=10),
    reasons=st.booleans(),
    control=st.booleans(),
    places=st.lists(st.integers(0, 10_000), max_size=40),
)
def test_any_cut_gives_what_the_whole_gives(
    name: str, calls: list, text: str, thought: str, reasons: bool, control: bool, places: list[int]
) -> None:
    is_bare = FORMATS[name].opening is None
    said = "" if is_bare else text
    written = (f"<think>{thought}</think>\n" if reasons else "") + said + call_text(name, calls)
    if control:
        written = with_controls(written)
    reasoning = "think" if reasons else None
    whole = read(parser_of(name, reasoning, control=control), [written])
    assert told(read(parser_of(name, reasoning, control=control), list(cuts(written, places)))) == told(whole)
    assert told(read(parser_of(name, reasoning, control=control), list(written))) == told(whole)
    if "</think>" in thought or any(tag in said for tag in TAGS):
        return
    assert [(c.name, json.loads(c.arguments)) for c in whole.tool_calls] == calls
    assert whole.text == (said.strip() if reasons else said.rstrip())
    assert whole.reasoning == (thought.strip() if reasons else "")


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    text=st.text('{["}]:,name parameters<>|tool_call/[TOOL_CALLS]ARGS()=f\\', max_size=40),
    places=st.lists(st.integers(0, 10_000), max_size=10),
)
def test_any_text_at_all_is_read_alike_however_it_is_cut(name: str, text: str, places: list[int]) -> None:
    whole = told(read(parser_of(name, "think"), [text]))
    assert told(read(parser_of(name, "think"), list(cuts(text, places)))) == whole


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_no_push_looks_again_at_the_arguments_so_far(name: str) -> None:
    before, _, behind = call_text(name, [("f", {"x": "|"})]).partition("|")
    reader, sink = FORMATS[name].reader(lambda tag: tag), CallSink()
    reader.push(before.removeprefix(FORMATS[name].opening or ""), sink)
    for _ in range(1000):
        reader.push("word ", sink)
        assert len(reader._text) <= len(before)
    reader.push(behind, sink)
    (call,) = joined([Delta("r", "", 0, tool_calls=sink.take())]).tool_calls
    assert json.loads(call.arguments) == {"x": "word " * 1000}


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        *((f'to="b", {name}="a"', f'{{"to": "b", "{name}": "a"}}') for name in keyword.kwlist),
        ("µ=1, ﬁ=2, नाम=3", '{"µ": 1, "ﬁ": 2, "नाम": 3}'),
        ("x=1e999, y=-0, z=1.50", '{"x": 1e999, "y": -0, "z": 1.50}'),
        (f"x={'9' * 5000}", f'{{"x": {"9" * 5000}}}'),
        ("x=" + "[" * 5000 + "]" * 5000, '{"x": ' + "[" * 5000 + "]" * 5000 + "}"),
        ("x=" + '{"a":' * 999 + "1" + "}" * 999, '{"x": ' + '{"a": ' * 999 + "1" + "}" * 1000),
        (r'x="a\/b\ud83d\ude00)]"', r'{"x": "a\/b\ud83d\ude00)]"}'),
        (r"""x='a\'\x41\ud83d', y="\101",""", r"""{"x": "a'A\ud83d", "y": "A"}"""),
        ('x=[True,None, false ,{"a":null,}], y={ }', '{"x": [true, null, false, {"a": null}], "y": {}}'),
        ("x=[[],],", '{"x": [[]]}'),
        (" ", "{}"),
        *((fault, "{}") for fault in ("1", "1, x=1", "x=y", "x=[,]", "x=[1,,]", "x={1: 2}", "x=[1}", "x=01")),
    ],
)
def test_named_arguments_are_told_in_json_as_they_are_written(written: str, arguments: str) -> None:
    found = read(parser_of("pythonic"), [f"[f({written})]"])
    assert [(call.name, call.arguments) for call in found.tool_calls] == [("f", arguments)]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_arguments_come_in_pieces_behind_the_name_and_no_tag_shows(name: str) -> None:
    arguments = {"city": "Paris, <tool_call> [TOOL_CALLS]", "days": [1, 2]}
    parser = parser_of(name)
    written = ("" if FORMATS[name].opening is None else "Let me look. ") + call_text(
        name, [("f", arguments), ("f", {})]
    )
    shown, pieces = "", []
    for char in written:
        parsed = parser.push(char)
        shown += parsed.text
        pieces += parsed.calls
        assert "Let me look. ".startswith(shown)
    first = [piece for piece in pieces if piece.index == 0]
    assert first[0].name == "f"
    assert first[0].call_id is not None
    assert first[0].call_id.startswith("call_")
    assert all(piece.name is None and piece.call_id is None for piece in first[1:])
    assert json.loads("".join(piece.arguments for piece in first)) == arguments
    assert len(first) > 5 or name == "pythonic"
    assert len({piece.call_id for piece in pieces if piece.call_id}) == 2
    assert parser.ends_with_call
    assert not parser.finish()


def test_what_only_looks_like_a_tag_is_text_in_the_end() -> None:
    parser = parser_of("hermes")
    assert parser.push("a <tool").text == "a"
    assert parser.push("s> b <tool_c").text == " <tools> b"
    assert parser.finish().text == " <tool_c"
    assert not parser.ends_with_call


@pytest.mark.parametrize("cut", [15, 30, 45])
def test_half_a_call_is_no_text_and_no_whole_call(cut: int) -> None:
    parser = parser_of("hermes")
    whole = read(parser, ["Hm. " + call_text("hermes", [("f", {"city": "Paris"})])[:cut]])
    assert whole.text == "Hm."
    assert not parser.ends_with_call


@pytest.mark.parametrize(
    ("reasoning", "begins", "text", "thought", "answer", "end"),
    [
        ("think", False, "<think>\nWell.\n</think>\n\nYes.", "Well.", "Yes.", 22),
        ("think", True, "Well.</think>Yes.", "Well.", "Yes.", 13),
        ("think", False, "Yes. <think>", "", "Yes. <think>", 0),
        ("think", True, "Well, ", "Well,", "", None),
        ("mistral", False, "[THINK]Well.[/THINK]Yes.", "Well.", "Yes.", 20),
        (None, False, "<think>a</think>b", "", "<think>a</think>b", 0),
    ],
)
def test_reasoning_is_told_from_the_answer(reasoning, begins, text, thought, answer, end) -> None:
    parser = parser_of("hermes", reasoning, begins)
    delta = read(parser, list(text))
    assert (delta.reasoning, delta.text) == (thought, answer)
    assert parser.reasoning_end == end


def test_a_call_in_reasoning_is_none() -> None:
    text = f"<think>maybe {call_text('hermes', [('f', {})])}</think>No."
    assert told(read(parser_of("hermes", "think"), list(text))) == ("No.", text[7:-11], [])


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '[TOOL_CALLS]' + tools[0].name + '[ARGS]' }}", "mistral"),
        ("{{ '[TOOL_CALLS] [' }}{{ tools }}", "mistral_list"),
        ("{{ '<tool_call>' }}{{ tools }}", "hermes"),
        ("{{ '<|python_tag|>' }}{{ tools }}", "llama3_json"),
        ("[func_name1(params_name1=params_value1)]{{ tools }}", "pythonic"),
        ("{{ messages }}{{ tools }}", "hermes"),
        ("{{ '[TOOL_CALLS]' }}", "hermes"),  # it knows no tools, so the prompt asks for Hermes' form
        (None, "hermes"),
    ],
)
def test_a_templates_family_is_found(template: str | None, name: str) -> None:
    found = format_of(template)
    assert found is not None
    assert found.name == name
    assert format_of(template, "none") is None


def test_another_family_may_be_set_where_the_template_knows_tools() -> None:
    assert format_of("{{ tools }}", "pythonic") is FORMATS["pythonic"]
    assert format_of("{{ tools }}[TOOL_CALLS]", "mistral") is FORMATS["mistral_list"]
    assert format_of("{{ tools }}", "mistral") is FORMATS["mistral"]
    with pytest.raises(CheckpointError, match="tool_parser=mistral"):
        format_of("{{ messages }}", "mistral")
