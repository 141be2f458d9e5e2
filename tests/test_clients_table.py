"""The table of docs/clients.md has every client that `make test-clients` runs, in its version."""

import json
import re
from pathlib import Path

from tests.clients.__main__ import NODE_SUITES, SUITES

ROOT = Path(__file__).parent.parent
CLIENTS = ROOT / "tests" / "clients"
TOOLS_OF_TESTS = {"pytest", "pytest-asyncio", "pytest-timeout", "jsonschema", "transformers"}
"""Packages that are no clients, but what the tests of clients are made with."""
OF_CLIENTS = {"zod", "@langchain/core", "node", "@libsql/linux-x64-gnu"}


def pinned() -> set[tuple[str, str]]:
    found = set()
    for file in CLIENTS.glob("*.txt"):
        _, asked, needed = re.split(r"^\n", file.read_text(), flags=re.MULTILINE)
        assert needed.startswith("# What these need.")
        found |= set(re.findall(r"^([\w-]+)(?:\[[\w,]+\])?==(\S+)$", asked, flags=re.MULTILINE))
    for suite in NODE_SUITES:
        packages = json.loads((CLIENTS / suite / "package.json").read_text())["dependencies"]
        found |= set(packages.items())
    return {(name, version) for name, version in found if name not in TOOLS_OF_TESTS | OF_CLIENTS}


def told() -> set[tuple[str, str]]:
    table = re.findall(r"^\| (.+?) \|", (ROOT / "docs" / "clients.md").read_text(), flags=re.MULTILINE)
    found = set()
    for cell in table:
        for name, versions in re.findall(r"`([^`]+)`(?: \(Node\))? ((?:[\d.]+(?:, and )?)+)", cell):
            found |= {(name, version) for version in versions.split(", and ")}
    return found


def test_the_table_has_the_clients_that_are_run() -> None:
    assert len(pinned()) > 12
    assert told() == pinned()


def test_each_client_of_python_has_its_tests() -> None:
    run = {f"test_{name}.py" for names in SUITES.values() for name in names}
    assert run == {path.name for path in CLIENTS.glob("test_*.py")}
    assert {path.stem for path in CLIENTS.glob("*.txt")} == set(SUITES)
