"""Simon Willison's llm: its command, with a model that extra-openai-models.yaml declares."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from tests.clients.asked import MODEL, SCHEMA, SORT, SORTED, WEATHER


@pytest.fixture
def home(tmp_path: Path, base_url: str) -> Path:
    entry = {
        "model_id": "triad",
        "model_name": MODEL,
        "api_base": base_url,
        "supports_schema": True,
        "supports_tools": True,
    }
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([entry]))
    return tmp_path


def llm(home: Path, *arguments: str) -> str:
    env = os.environ | {"LLM_USER_PATH": str(home), "OPENAI_API_KEY": "none"}
    command = [sys.executable, "-m", "llm", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("more", [(), ("--no-stream",)])
def test_text(home: Path, more: tuple[str, ...]) -> None:
    assert llm(home, "-m", "triad", "-o", "temperature", "0", *more, SORT).strip() == SORTED


def test_a_schema(home: Path) -> None:
    told = llm(home, "-m", "triad", "-o", "temperature", "0", "--schema", json.dumps(SCHEMA), WEATHER)
    jsonschema.validate(json.loads(told), SCHEMA)


def test_a_tool_is_offered(home: Path) -> None:
    llm(home, "-m", "triad", "-o", "temperature", "0", "-T", "llm_time", "--chain-limit", "2", SORT)
