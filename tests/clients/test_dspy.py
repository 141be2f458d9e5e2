"""DSPy: its language model over chats, texts and Responses, and a program with a typed output."""

from contextlib import suppress
from typing import Any

import dspy
import pytest

from tests.clients.asked import MODEL, SORT, SORTED


@pytest.fixture
def through(base_url: str) -> dict[str, Any]:
    return {"api_base": base_url, "api_key": "none", "cache": False, "temperature": 0.0, "max_tokens": 200}


@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_text(through: dict[str, Any], kind: Any) -> None:
    lm = dspy.LM(f"openai/{MODEL}", model_type=kind, **through)
    (told,) = lm(SORT)
    assert (told if isinstance(told, str) else told["text"]) == SORTED


def test_a_text_completion(through: dict[str, Any]) -> None:
    lm = dspy.LM(f"text-completion-openai/{MODEL}", model_type="text", **through)
    assert len(lm("Once")) == 1


def test_a_program_asks_for_a_form(through: dict[str, Any]) -> None:
    """The embedded model fails at the format of DSPy's own adapters; of the server this asks for JSON."""
    lm = dspy.LM(f"openai/{MODEL}", **through)
    program = dspy.Predict("question -> answer: bool")
    unread = suppress(dspy.utils.exceptions.AdapterParseError)
    with unread, dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        assert isinstance(program(question="Is it so?").answer, bool)
    assert lm.history
