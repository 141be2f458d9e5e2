"""Instructor, in the modes that this model can end: those that a grammar forces."""

import instructor
import openai
import pytest
from instructor import Mode

from tests.clients.asked import MODEL, WEATHER, Report

ASKED = {"model": MODEL, "messages": [{"role": "user", "content": WEATHER}], "max_retries": 0}


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON_SCHEMA, Mode.RESPONSES_TOOLS])
def test_a_model_of_pydantic(base_url: str, mode: Mode) -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=base_url, api_key="none"), mode=mode)
    assert isinstance(client.chat.completions.create(**ASKED, response_model=Report), Report)


def test_the_default_of_from_provider(base_url: str) -> None:
    client = instructor.from_provider(f"openai/{MODEL}", base_url=base_url, api_key="none")
    report = client.create(messages=ASKED["messages"], response_model=Report, max_retries=0)
    assert isinstance(report, Report)


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON_SCHEMA])
def test_a_partial_stream(base_url: str, mode: Mode) -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=base_url, api_key="none"), mode=mode)
    *_, last = client.chat.completions.create_partial(**ASKED, response_model=Report)
    Report.model_validate(last.model_dump())
