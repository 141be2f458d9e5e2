"""STRUCTURE.md and README.md name what is there, and nothing that is not."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("telemetry", "policies", "replicas", "router", "cluster", "loadtest", "tests")


@pytest.mark.parametrize("document", ["STRUCTURE.md", "README.md", "EXPERIMENTS.md"])
def test_named_files_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    pattern = rf"(?:{'|'.join(PACKAGES)}|docs|benchmarks|helm)/[\w./-]*"
    named = {match.rstrip(".") for match in re.findall(rf"(?<![\w/.])({pattern})", text)}
    assert named
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing, f"{document} names what does not exist: {missing}"


def test_every_package_is_named() -> None:
    text = (ROOT / "STRUCTURE.md").read_text()
    subpackages = {path.parent.relative_to(ROOT) for path in ROOT.glob("*/**/__init__.py")}
    ours = sorted(str(path) for path in subpackages if path.parts[0] in PACKAGES[:-1])
    assert [name for name in ours if f"{name}/" not in text] == []


def test_init_files_are_empty() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("__init__.py"):
            assert not path.read_text(), f"{path} is not empty"


def test_files_are_short() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            num_lines = len(path.read_text().splitlines())
            assert num_lines <= 420, f"{path.relative_to(ROOT)} has {num_lines} lines; split it"
