"""What `make` says when it can't set up."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_without_a_network_the_set_up_says_so_in_one_sentence_and_can_be_begun_again(tmp_path: Path) -> None:
    """A registry at a port of loopback where nothing listens; settings of pip's own, and of a make around
    this one, are out of the way."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "MAKE"))}
    nowhere = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "1",
    }
    command = ["make", "serve", f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}"]
    for _ in range(2):
        done = subprocess.run(
            command, cwd=ROOT, env=ours | nowhere, capture_output=True, text=True, timeout=200
        )
        assert done.returncode != 0
        said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
        assert len(said) == 1, done.stderr
        assert "is not set up: no package registry is reached" in said[0]
        assert done.stdout.startswith("== setting up")
