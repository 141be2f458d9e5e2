"""The Dockerfile as far as it can be checked without an engine: hadolint's rules, and its paths.

`make image` builds it and runs what comes of it (tests/image/).
"""

import fnmatch
import json
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

from cluster import cli
from cluster.serve_file import serve_file
from tests.image import build

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


def chain(target: str) -> list[tuple[str, str]]:
    """A target's instructions, those of the stages that it begins from first."""
    known = stages()
    source, body = known[target]
    return (chain(source) if source in known else []) + body


def packages(rest: str) -> list[str]:
    """What a RUN installs of Debian's packages."""
    found = re.findall(r"apt-get install -y --no-install-recommends ([^&]*)", rest)
    return [name for names in found for name in names.split()]


def test_the_base_is_pinned_and_debian_s_packages_by_its_release() -> None:
    """No exact revision of a package: a mirror keeps the last alone, so it would not build any more."""
    known = stages()
    for source, body in known.values():
        if source not in known:
            assert re.fullmatch(r"[\w/.-]+:\d+\.\d+\.\d+[\w.-]*", source)
        for name, rest in body:
            assert name not in ("ADD", "MAINTAINER")
            if name == "RUN" and "apt-get install" in rest:
                assert "--no-install-recommends" in rest
                assert "rm -rf /var/lib/apt/lists/*" in rest
                assert packages(rest)
                assert not [package for package in packages(rest) if "=" in package]
            if name == "RUN" and "pip install" in rest:
                assert "-c constraints.txt" in rest
            assert "sudo" not in rest
            assert not re.search(r"(?i)(token|password|secret|key)=", rest)


def test_both_targets_end_as_a_user_by_number() -> None:
    for target in ("cpu", "cuda"):
        everything = chain(target)
        users = [rest for name, rest in everything if name == "USER"]
        assert users[-1] == "10001:10001"
        assert [name for name, _ in everything].count("CMD") == 1


def test_what_is_copied_is_there() -> None:
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from"):
            for path in rest.split()[:-1]:
                assert (ROOT / path).exists(), path
                assert not ignored(path)


def ignored(path: str) -> bool:
    """As .dockerignore says; the last line that matches the path, or a folder above it, decides."""
    found = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        pattern, wanted = line.removeprefix("!"), not line.startswith("!")
        parents = [path, *map(str, list(Path(path).parents)[:-1])]
        if any(fnmatch.fnmatch(one, pattern) for one in parents):
            found = wanted
    return found


def test_of_the_checkpoints_the_embedded_one_alone_is_copied() -> None:
    assert not ignored("replicas/checkpoints/triad-5m/model.safetensors")
    assert ignored("replicas/checkpoints/smollm2-135m/model.safetensors")
    assert ignored("replicas/model/native/portable/forward-x86-64-v3.so")


def test_both_targets_bring_the_native_forward_and_no_compiler_for_it() -> None:
    """It is compiled where the compiler is, for each kind of processor."""
    built = " ".join(rest for name, rest in stages()["build"][1] if name == "RUN")
    assert "g++" in packages(built)
    assert re.search(
        r"pip install .* \. +&& python -P -m replicas[.]model[.]native[.]build --portable", built
    )
    for target in ("cpu", "cuda"):
        assert ("COPY", "--from=build /opt/triad /opt/triad") in chain(target)
        assert "g++" not in packages(" ".join(rest for _, rest in chain(target)))


def test_triton_comes_with_torch_alone() -> None:
    """torch's wheel pins it where that has CUDA; a requirement of ours brought 700 MB to images for CPUs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [name for name in project["dependencies"] if name.startswith("triton")]
    assert "triton" not in " ".join(rest for name, rest in instructions() if name == "RUN")
    assert "gcc" in packages(" ".join(rest for _, rest in chain("cuda")))


def test_it_begins_as_make_serve_does() -> None:
    """Each argument is one that the command takes."""
    (command,) = [json.loads(rest) for name, rest in chain("cpu") if name == "CMD"]
    assert command[0] == "triad"
    options = cli.parser().parse_args(command[1:])
    assert (options.command, options.settings) == ("serve", ["host=0.0.0.0"])
    assert json.loads(serve_file(options.settings))["http_options"]["host"] == "0.0.0.0"


def test_the_stand_in_for_the_base_has_its_name() -> None:
    assert build.base_name((ROOT / "Dockerfile").read_text()) == stages()["base"][0]
    assert build.image_name() == f"localhost/triad:{version('triad-serving')}-cpu"


def test_every_package_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    copied = {rest.split()[0] for name, rest in stages()["build"][1] if name == "COPY"}
    assert set(packages) <= copied
