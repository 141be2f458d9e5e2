"""constraints.txt goes with pyproject.toml, with what is installed, and with torch's ordinary wheel.

The wheel of torch for CPUs alone names neither Triton nor CUDA, so where it is at hand by chance nothing
but these tests sees that the ordinary one can't be installed. For another torch, put into ORDINARY_TORCH
what `pip download --no-deps torch==VERSION` and `unzip -p torch-*.whl '*/METADATA' | grep Requires-Dist`
show without an index argument. Whether all of it resolves for a platform, without downloading it:

    uv pip compile --only-binary :all: --python-platform x86_64-manylinux_2_31 --python-version 3.11 \
        -c constraints.txt --extra dev pyproject.toml
"""

import importlib.metadata
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT_NAME = canonicalize_name(PROJECT["project"]["name"])

ORDINARY_TORCH = {
    "2.13.0": (
        "filelock",
        "typing-extensions>=4.10.0",
        "setuptools>=77.0.3",
        "sympy>=1.13.3",
        "networkx>=2.5.1",
        "jinja2",
        "fsspec>=0.8.5",
        "cuda-toolkit[cublas,cudart,cufft,cufile,cupti,curand,cusolver,cusparse,nvjitlink,nvrtc,nvtx]==13.0.3;"
        ' platform_system == "Linux"',
        'cuda-bindings<14,>=13.0.3; platform_system == "Linux" and python_version < "3.15"',
        'nvidia-cudnn-cu13==9.20.0.48; platform_system == "Linux"',
        'nvidia-cusparselt-cu13==0.8.1; platform_system == "Linux"',
        'nvidia-nccl-cu13==2.29.7; platform_system == "Linux"',
        'nvidia-nvshmem-cu13==3.4.5; platform_system == "Linux"',
        'triton==3.7.1; platform_system == "Linux" and python_version < "3.15"',
    )
}
"""Requires-Dist of torch's wheel for manylinux_2_28, but for extras; the same for x86_64 and aarch64."""
TORCHS_OWN = {
    "cuda-toolkit",
    "nvidia-cudnn-cu13",
    "nvidia-cusparselt-cu13",
    "nvidia-nccl-cu13",
    "nvidia-nvshmem-cu13",
}
"""Pinned by torch itself, to a single version each."""
OF_TOOLKIT = Requirement("nvidia-nvjitlink<14,>=13.0.88")
"""The one of cuda-toolkit's that it leaves open; the others it pins."""


def pins() -> dict[str, Version]:
    found: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        name, _, version = line.partition("==")
        assert canonicalize_name(name) not in found, f"{name} is pinned twice"
        found[canonicalize_name(name)] = Version(version)
    return found


def breaks(requirement: Requirement, pinned: dict[str, Version]) -> bool:
    version = pinned.get(canonicalize_name(requirement.name))
    return version is None or not requirement.specifier.contains(version, prereleases=True)


def direct() -> list[Requirement]:
    project = PROJECT["project"]
    lines = [
        *project["dependencies"],
        *(line for of in project["optional-dependencies"].values() for line in of),
    ]
    return [found for found in map(Requirement, lines) if canonicalize_name(found.name) != PROJECT_NAME]


def installed() -> Iterator[tuple[str, Requirement]]:
    """What each distribution in use here requires, with the extras that it is asked for; and who does."""
    todo = [(PROJECT_NAME, requirement) for requirement in direct()]
    seen: set[tuple[str, str]] = set()
    while todo:
        who, requirement = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        yield who, requirement
        name = canonicalize_name(requirement.name)
        for extra in ["", *requirement.extras]:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for line in importlib.metadata.requires(name) or ():
                child = Requirement(line)
                if child.marker is None or child.marker.evaluate({"extra": extra}):
                    child.marker = None
                    todo.append((name, child))


def test_each_direct_dependency_is_pinned_inside_its_range() -> None:
    pinned = pins()
    assert [str(requirement) for requirement in direct() if breaks(requirement, pinned)] == []
    assert all(requirement.specifier for requirement in direct())


def test_the_pins_satisfy_all_that_is_installed() -> None:
    pinned = pins()
    found = list(installed())
    assert len({requirement.name for _, requirement in found}) > 100
    assert [f"{who}: {requirement}" for who, requirement in found if breaks(requirement, pinned)] == []


def test_what_is_installed_is_what_is_pinned() -> None:
    """torch's version may have a suffix that says where the wheel is from, such as +cpu."""
    versions = {
        requirement.name: Version(importlib.metadata.version(requirement.name))
        for _, requirement in installed()
    }
    pinned = pins()
    assert [
        name
        for name, version in versions.items()
        if Version(version.public) != pinned[canonicalize_name(name)]
    ] == []


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_pins_go_with_the_ordinary_wheel_of_torch(python: str, machine: str) -> None:
    environment = {str(key): str(value) for key, value in default_environment().items()} | {
        "platform_system": "Linux",
        "sys_platform": "linux",
        "platform_machine": machine,
        "python_version": python,
        "python_full_version": f"{python}.0",
    }
    pinned = pins()
    wanted = [Requirement(line) for line in ORDINARY_TORCH[str(pinned["torch"])]]
    active = [found for found in wanted if found.marker is None or found.marker.evaluate(environment)]
    assert "triton" in {found.name for found in active}
    assert [str(found) for found in active if found.name not in TORCHS_OWN and breaks(found, pinned)] == []
    assert not TORCHS_OWN & set(pinned), "torch pins these; a pin of ours could only contradict it"
    assert not breaks(OF_TOOLKIT, pinned)


def test_what_torchs_wheel_says_here_is_what_is_written_here() -> None:
    """Of the ordinary wheel all of it; the CPU's leaves out Triton and CUDA and says the same of the rest."""
    said = {
        str(Requirement(line)) for line in importlib.metadata.requires("torch") or () if "extra" not in line
    }
    written = {str(Requirement(line)) for line in ORDINARY_TORCH[str(pins()["torch"])]}
    assert said <= written
    if Version(importlib.metadata.version("torch")).local is None:
        assert said == written
