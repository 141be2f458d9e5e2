"""Outlines: typed answers by OpenAI's response_format and by vLLM's structured_outputs."""

import json
from typing import Literal

import openai
import outlines
from outlines.types import CFG, JsonSchema, Regex

from tests.clients.asked import MODEL, SCHEMA, SORT, SORTED, WEATHER, Report


def client(base_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)


def test_by_openai(base_url: str) -> None:
    model = outlines.from_openai(client(base_url), MODEL)
    assert model(SORT, temperature=0) == SORTED
    assert "".join(model.stream(SORT, temperature=0)) == SORTED
    Report.model_validate_json(model(WEATHER, Report, temperature=0))
    assert "days" in json.loads(model(WEATHER, JsonSchema(SCHEMA), temperature=0))


def test_by_vllm(base_url: str) -> None:
    model = outlines.from_vllm(client(base_url), MODEL)
    assert model(SORT, temperature=0) == SORTED
    Report.model_validate_json(model(WEATHER, Report, temperature=0))
    assert model(WEATHER, Literal["rain", "sun"], temperature=0) in ("rain", "sun")
    assert model(WEATHER, Regex("[0-9]{2} C"), temperature=0).endswith(" C")
    assert model(WEATHER, CFG('start: "rain" | "sun"'), temperature=0) in ("rain", "sun")
    assert isinstance(model(WEATHER, int, temperature=0), str)


async def test_by_vllm_without_blocking(base_url: str) -> None:
    model = outlines.from_vllm(openai.AsyncOpenAI(base_url=base_url, api_key="none"), MODEL)
    Report.model_validate_json(await model(WEATHER, Report, temperature=0))
