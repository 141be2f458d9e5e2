"""A bound on reasoning: what it forces, against a naive count over the whole text; behind it what a grammar
forces; and the same tokens in every lossless mode."""

import json
from codecs import getincrementaldecoder
from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.modes import DecodePlan, Mode
from replicas.answer_forms import JsonFormat, ThinkingBudget
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.engine.grammar import Grammar, GrammarFailed, allows
from replicas.errors import TriadError
from replicas.grammar import JsonGrammar, compile_schema
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec
from replicas.tools.grammar import AnswerGrammar
from replicas.tools.output import OutputParser
from replicas.tools.reasoning import MARKS
from replicas.tools.thinking_budget import BudgetedGrammar
from tests.replicas.codec import tiny_tokenizer
from tests.replicas.test_grammar import EOS, FOLDER, compiler, finish, tokens_in
from tests.replicas.tools.test_tool_grammar import TOOLS
from tests.thorough import examples

PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
END = "</think>"


@cache
def codec(has_control_marks: bool) -> TextCodec:
    """Of bytes, whose marks are text, or control tokens."""
    tokenizer = tiny_tokenizer(PLAIN)
    if has_control_marks:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", END]})
    return TextCodec(tokenizer, reasoning_parser="think")


def ids_of(of: TextCodec, text: str | bytes) -> list[int]:
    if isinstance(text, bytes):
        found = (of._bytes.of_byte(byte) for byte in text)
        return [token for token in found if token is not None]
    return of._backend.encode(text, add_special_tokens=False).ids


def budgeted(of: TextCodec, budget: int, begins: bool, inner: Grammar | None = None) -> BudgetedGrammar:
    prompt = of.encode("Hm. ") + (ids_of(of, "<think>") if begins else [])
    return of.budgeted(inner, budget, prompt)


def naive(of: TextCodec, tokens: Sequence[int], budget: int, begins: bool) -> set[int] | None:
    """The tokens that may come next, found by the whole text; None for any."""
    tags = of.chats.control_tags
    shown = {token: f"\udcff{tag}".encode(errors="surrogateescape") for tag, token in tags.items()}
    special = of._bytes.special_ids
    pieces = [shown.get(t, b"") if t in special else of.token_bytes(t) for t in tokens]
    begin, end = (shown[tags[tag]] if tag in tags else tag.encode() for tag in ("<think>", END))
    closing = [tags[END]] if END in tags else ids_of(of, END)
    if not begins:
        whole = b"".join(pieces)
        blanks = len(whole) - len(whole.lstrip())
        if not whole[blanks:].startswith(begin):
            return None
        length = 0
        while length < blanks + len(begin):
            length += len(pieces.pop(0))
    if end in b"".join(pieces):
        return None
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    for count, piece in enumerate((b"", *pieces)):
        decoder.decode(piece)
        if count >= budget and not decoder.getstate()[0]:
            return {closing[len(pieces) - count]}
    return set() if len(pieces) >= budget else None


SPELLINGS = ("<think>", "<", "think>", END, "</thin", "a", " ", "\n", "é", "€", "😀", b"\xe2", b"\xf0\x9f")


@examples(200)
@given(seed=st.integers(0, 10**9), is_control=st.booleans(), begins=st.booleans())
def test_what_is_forced_is_what_a_count_over_the_whole_text_says(
    seed: int, is_control: bool, begins: bool
) -> None:
    of, rng = codec(is_control), Random(seed)
    budget = rng.randint(0, 12)
    grammar = budgeted(of, budget, begins)
    tokens: list[int] = []
    coming: list[int] = []
    if not begins and rng.random() < 0.9:
        coming = ids_of(of, rng.choice(("", " ", "\n\n")) + "<think>")
    for _ in range(40):
        coming = coming or list(ids_of(of, rng.choice(SPELLINGS)))
        draft = [*coming, *ids_of(of, rng.choice(SPELLINGS))][: rng.randint(0, 9)]
        masks = grammar.masks(draft)
        for count, mask in enumerate(masks):
            expected = naive(of, [*tokens, *draft[:count]], budget, begins)
            if expected is None:
                assert mask is None
            elif expected:
                assert set(tokens_in(mask)) == expected
            else:  # a character that is not whole
                assert all(0x80 <= of.token_bytes(token)[0] < 0xC0 for token in tokens_in(mask))
            is_cut = count < len(draft) and not allows(mask, draft[count])
            assert (len(masks) == count + 1) == (is_cut or count == len(draft))
        token = coming.pop(0)
        if not allows(masks[0], token):
            token, coming = rng.choice(tokens_in(masks[0])), []
        grammar.accept(token)
        tokens.append(token)
    assert not grammar.is_complete


@pytest.mark.parametrize("is_control", [True, False])
@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("budget", [0, 1, 7])
def test_the_parser_sees_the_reasoning_end_where_the_bound_does(
    budget: int, begins: bool, is_control: bool
) -> None:
    of = codec(is_control)
    grammar = budgeted(of, budget, begins)
    wanted = iter(ids_of(of, ("" if begins else "<think>") + "y" * 30))
    text = of.stream(shows_tags=True)
    parser = of.chats.parser(SamplingParams(), begins)
    assert isinstance(parser, OutputParser)
    reasoning = content = ""
    for token in wanted:
        (mask,) = grammar.masks(())
        if mask is not None:
            (token,) = tokens_in(mask)
        grammar.accept(token)
        piece = parser.push(text.push((token,)))
        reasoning, content = reasoning + piece.reasoning, content + piece.text
    assert reasoning == "y" * budget
    assert set(content) == {"y"}


ORDERS: dict[str, dict[str, Any]] = {
    "json": {"answer": JsonFormat('{"enum": ["yes", "no"]}')},
    "call": {"format": "hermes", "tools": TOOLS, "places": (0, 1), "is_required": True},
    "offer": {"format": "hermes", "tools": TOOLS, "places": (0, 1)},
    "text": {},
}
THINKING = TextCodec.load(FOLDER, reasoning_parser="think")
PROMPTS = (
    "Extract as JSON with the keys age, city, name: Irene Weber is 68. <think>",
    "Count: 1, 2, 3, <think>",
)


def whole_grammar(order: str, budget: int) -> BudgetedGrammar:
    inner = None
    if ORDERS[order]:
        asked = AnswerGrammar(reasoning=MARKS["think"], begins_in_reasoning=True, **ORDERS[order])
        inner = JsonGrammar(compile_schema(compiler()._load_tokenizer(), asked).deep_copy())
    return THINKING.budgeted(inner, budget, THINKING.encode(PROMPTS[0]))


@pytest.mark.parametrize("order", ORDERS)
def test_every_lossless_mode_gives_the_same_bounded_reasoning_and_answer(order: str) -> None:
    """On the embedded model, which does not end a thought by itself; at two temperatures."""
    runner = TorchRunner.load(FOLDER, dtype="float32", num_pages=256, page_size=16)
    for temperature in (0.0, 1.0):
        for budget in (0, 9, 24):
            found = {}
            for mode in ("ar", "self_speculation", "auto"):
                engine = Engine(runner, EngineConfig())
                engine.set_plan(DecodePlan(Mode.SELF_SPECULATION, 8), "test")
                decoding = DecodingOptions() if mode == "auto" else DecodingOptions(Mode(mode))
                for number, prompt in enumerate(PROMPTS):
                    sampling = SamplingParams(
                        max_tokens=80,
                        temperature=temperature,
                        seed=number,
                        thinking_token_budget=ThinkingBudget(budget),
                    )
                    ids = THINKING.encode(prompt)
                    engine.submit(f"{number}", ids, sampling, decoding, grammar=whole_grammar(order, budget))
                made = finish(engine)
                found[mode] = [
                    [token for progress in made[f"{number}"] for token in progress.token_ids]
                    for number in range(len(PROMPTS))
                ]
            assert found["ar"] == found["self_speculation"] == found["auto"]
            for tokens in found["ar"]:
                text = THINKING.decode([token for token in tokens if token != EOS])
                _, mark, answer = text.partition(END)
                num_closing = len(ids_of(THINKING, END))
                if not mark:
                    assert tokens[-1] == EOS  # it ended within, which a free answer may
                    assert order == "text"
                    continue
                num_reasoning = next(
                    count for count in range(len(tokens)) if END in THINKING.decode(tokens[:count])
                )
                assert num_reasoning <= budget + 3 + num_closing
                if order == "json":
                    assert json.loads(answer) in ("yes", "no")
                elif order == "call":
                    assert answer.lstrip("\n").startswith('<tool_call>\n{"name": "get')


def test_a_grammar_that_does_not_let_the_reasoning_end_says_so() -> None:
    class Stubborn(Grammar):
        is_complete = False

        def masks(self, draft: Sequence[int]) -> tuple[bytes, ...]:
            return (b"\x08",) * (len(draft) + 1)

        def accept(self, token_id: int) -> None: ...

    with pytest.raises(GrammarFailed, match="budget"):
        budgeted(codec(False), 0, True, Stubborn()).masks(())


def test_a_model_without_marks_refuses_a_bound_or_has_none() -> None:
    of = TextCodec(tiny_tokenizer(PLAIN))
    with pytest.raises(TriadError, match="no marks of reasoning") as caught:
        of.chats.fitted(SamplingParams(thinking_token_budget=ThinkingBudget(5)))
    assert caught.value.param == "thinking_token_budget"
    habitual = SamplingParams(thinking_token_budget=ThinkingBudget(5, needs_marks=False))
    assert of.chats.fitted(habitual) == SamplingParams()
    assert codec(True).chats.fitted(habitual) is habitual


def test_a_mode_is_chosen_that_is_lossless() -> None:
    assert SamplingParams(thinking_token_budget=ThinkingBudget(5)).keeps_lossless


@examples(100)
@given(seed=st.integers(0, 10**9), is_control=st.booleans(), begins=st.booleans())
def test_what_blocks_ask_of_it_is_what_the_masks_say(seed: int, is_control: bool, begins: bool) -> None:
    of, rng = codec(is_control), Random(seed)
    grammar = budgeted(of, rng.randint(0, 12), begins)
    for _ in range(12):
        spelled = [token for _ in range(4) for token in ids_of(of, rng.choice(SPELLINGS))]
        coming = spelled[: rng.randint(0, 20)]
        masks = grammar.masks(coming)
        num_allowed = grammar.num_allowed(coming)
        assert num_allowed == len(masks) - 1
        allowed = coming[:num_allowed]
        assert grammar.mask_behind(allowed) == masks[-1]
        forced = grammar.forced(allowed)
        for count, token in enumerate(forced):
            mask = grammar.mask_behind([*allowed, *forced[:count]])
            assert mask is not None
            assert tokens_in(mask) == [token]
        for token in (*allowed, *forced)[: rng.randint(0, 8)]:
            grammar.accept(token)


def test_a_dead_end_behind_a_mere_draft_is_not_the_answers() -> None:
    """The form lets no reasoning end, and the answer has none; but a draft of it has."""

    class Stubborn(Grammar):
        is_complete = False

        def masks(self, draft: Sequence[int]) -> tuple[bytes, ...]:
            return (b"\xff" * 64,) * (len(draft) + 1)

        def accept(self, token_id: int) -> None: ...

    class OnceOnly(Stubborn):
        def masks(self, draft: Sequence[int]) -> tuple[bytes, ...]:
            return (b"\xff" * 64, *(b"\x08",) * len(draft))

    of = codec(True)
    [begin] = ids_of(of, "<think>")
    assert len(budgeted(of, 0, False, OnceOnly()).masks((begin,))) == 1
    assert len(budgeted(of, 9, False, Stubborn()).masks((begin,))) == 2
