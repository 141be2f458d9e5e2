"""Builds the image's target `cpu` where no registry of images is to be had.

The base is the one thing that is stood in for: mmdebstrap makes it of Debian's packages, which bears the name
that the Dockerfile asks for. How this machine reaches its package indexes is mounted during the build, and is
in no layer.
Needs podman, mmdebstrap and root.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = ("podman", "runc", "mmdebstrap")
PACKAGES = ("podman", "runc", "mmdebstrap", "netavark", "iptables")
BASE_PACKAGES = ("python3", "python3-venv", "python-is-python3", "ca-certificates")
UNWANTED = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*")
APT_SOURCES = Path("/etc/apt/sources.list.d")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
MAX_FILES = min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
RUN = (
    *("podman", "--runtime", "runc", "run"),
    *("--ulimit", f"nofile={MAX_FILES}:{MAX_FILES}", "--ulimit", "nproc=30000:30000"),
)
"""runc, since crun knows no mixed control groups; limits that a root who can't raise them has as well."""


def base_name(dockerfile: str) -> str:
    """The one image that the Dockerfile begins from."""
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", dockerfile, re.MULTILINE))
    names = set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) - stages
    (name,) = names
    return name


def image_name() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return f"localhost/triad:{project['version']}-cpu"


def run(*command: str) -> None:
    print(f"== {' '.join(command)}"[:200], flush=True)
    subprocess.run(command, check=True)


def output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def exists(image: str) -> bool:
    return subprocess.run(("podman", "image", "exists", image), check=False).returncode == 0


def build_base(name: str, folder: Path) -> None:
    """Makes Debian's minimal system with Python, under this name; of which Debian, the name's end says."""
    suite = name.rpartition("-")[2]
    archive = folder / "base.tar"
    sources = [
        str(path) for path in sorted(APT_SOURCES.glob("*.sources")) + sorted(APT_SOURCES.glob("*.list"))
    ]
    run(
        *("mmdebstrap", "--variant=minbase", f"--include={','.join(BASE_PACKAGES)}"),
        *(f"--dpkgopt=path-exclude={path}" for path in UNWANTED),
        # As in Debian's own images, whose layers else had apt's caches.
        *(f'--aptopt=Dir::Cache::{cache} ""' for cache in ("pkgcache", "srcpkgcache")),
        "--customize-hook=rm -f $1/etc/apt/sources.list $1/etc/apt/sources.list.d/*",
        *(suite, str(archive), *sources),
    )
    run("podman", "import", "--quiet", "--change", 'CMD ["python3"]', str(archive), name)
    archive.unlink()


def pip_settings() -> dict[str, str]:
    """pip's configuration on this machine, by a file's names for it; the environment's goes first."""
    found: dict[str, str] = {}
    for line in output(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        if name.startswith(":env:") or key not in found:
            found[key] = value.strip("'\"")
    return found


def pip_mounts(settings: dict[str, str], folder: Path) -> Iterator[str]:
    """pip's settings and the paths that they name, as what a build is to see of this machine."""
    file = folder / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
    yield f"{file}:/etc/pip.conf:ro"
    paths = set()
    for word in " ".join(settings.values()).split():
        # Of an index in a folder, `simple`, the files lie beside it.
        path = Path(word.removeprefix("file://")).parent if word.startswith("file://") else Path(word)
        if path.is_absolute() and path.exists():
            paths.add(path)
    yield from (f"{path}:{path}:ro" for path in sorted(paths))


def build_image(image: str, folder: Path) -> None:
    """Stage `build` first: it alone sees pip's settings, and no mount's empty folder is in the image."""
    apt = [f"{path}:{path}:ro" for path in (APT_SOURCES, CERTIFICATES) if path.exists()]
    torch_index = os.environ.get("TORCH_INDEX_ARGS", "")
    stages = {"build": [*apt, *pip_mounts(pip_settings(), folder)], "cpu": apt}
    for target, mounts in stages.items():
        run(
            *("podman", "build", "--target", target, "--pull=never", "--isolation", "chroot"),
            *("--tag", image if target == "cpu" else f"{image}-{target}"),
            *("--build-arg", f"TORCH_INDEX_ARGS={torch_index}"),
            *(argument for mount in mounts for argument in ("--volume", mount)),
            str(ROOT),
        )


def build(anew: bool) -> str:
    """Builds the base if there is none or it is wanted anew, and the image; returns the image's name.

    Raises SystemExit where a tool is missing, CalledProcessError where a step fails.
    """
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        install = f"apt-get install --no-install-recommends {' '.join(PACKAGES)}"
        sys.exit(f"no {' and no '.join(missing)} here: {install}")
    base = base_name((ROOT / "Dockerfile").read_text())
    with tempfile.TemporaryDirectory(prefix="triad-image-") as name:
        folder = Path(name)
        if anew or not exists(base):
            build_base(base, folder)
        build_image(image_name(), folder)
    return image_name()


def layers(image: str) -> list[tuple[int, str]]:
    """Of each step that adds to the image, its bytes and what it does."""
    steps = json.loads(output("podman", "history", "--no-trunc", "--format", "json", image))
    return [(step["size"], step["CreatedBy"]) for step in steps if step["size"]]


def largest_packages(image: str, count: int = 12) -> list[tuple[int, str]]:
    """The largest of Python's packages in the image, with their bytes."""
    script = "cd /opt/triad/lib/python3*/site-packages && du --summarize --bytes *"
    said = output(*RUN, "--rm", "--network", "none", image, "sh", "-c", script)
    parted = [line.partition("\t") for line in said.splitlines()]
    return sorted(((int(size), name) for size, _, name in parted), reverse=True)[:count]
