"""The Dockerfile as far as it can be checked without an engine: hadolint's rules, and its paths."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """By name: what it begins from, and its instructions."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for name, rest in instructions():
        if name == "FROM":
            source, stage = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
            found[stage] = (source, [])
        else:
            found[list(found)[-1]][1].append((name, rest))
    return found


def test_base_images_and_system_packages_are_pinned() -> None:
    known = stages()
    for source, body in known.values():
        if source not in known:
            assert re.fullmatch(r"[\w/.-]+:\d+\.\d+\.\d+[\w.-]*", source)
        for name, rest in body:
            assert name not in ("ADD", "MAINTAINER")
            if name == "RUN" and "apt-get install" in rest:
                assert "--no-install-recommends" in rest
                assert "rm -rf /var/lib/apt/lists/*" in rest
                packages = rest.split("--no-install-recommends", 1)[1].split("&&")[0].split()
                assert all("=" in package for package in packages)
            if name == "RUN" and "pip install" in rest:
                assert "-c constraints.txt" in rest
            assert "sudo" not in rest
            assert not re.search(r"(?i)(token|password|secret|key)=", rest)


def test_both_targets_end_as_a_user_by_number() -> None:
    known = stages()
    for target in ("cpu", "cuda"):
        source, body = known[target]
        everything = known[source][1] + body
        users = [rest for name, rest in everything if name == "USER"]
        assert users[-1] == "10001:10001"
        assert [name for name, _ in everything].count("CMD") == 1


def test_what_is_copied_is_there() -> None:
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from"):
            for path in rest.split()[:-1]:
                assert (ROOT / path).exists(), path
                assert path not in (ROOT / ".dockerignore").read_text().splitlines()


def test_every_package_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    for target in ("build-cpu", "build-cuda"):
        copied = {rest.split()[0] for name, rest in stages()[target][1] if name == "COPY"}
        assert set(packages) <= copied
