"""Files come out of their parts as they went in, or not at all."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from training.smollm2.parts import PART_BYTES, join, split


@pytest.mark.parametrize("size", [0, 1, 10, 11, 35])
def test_there_and_back(tmp_path: Path, size: int) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(random.Random(size).randbytes(size))
    split(tmp_path / "weights.bin", tmp_path / "parts", part_bytes=3)  # more parts than the next time
    parts = split(file, tmp_path / "parts", part_bytes=10)
    assert all(part.stat().st_size <= 10 for part in parts)
    assert len(parts) == -(-size // 10)
    join(tmp_path / "parts", "weights.bin", tmp_path / "back.bin")
    assert (tmp_path / "back.bin").read_bytes() == file.read_bytes()


def test_a_missing_or_damaged_part(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(range(100)))
    parts = split(file, tmp_path / "parts", part_bytes=40)
    target = tmp_path / "back.bin"
    target.write_bytes(b"as it was")
    whole = parts[1].read_bytes()
    for damage in (lambda: parts[1].write_bytes(whole[:-1]), parts[1].unlink):
        damage()
        with pytest.raises(ValueError, match=r"not all parts of weights\.bin"):
            join(tmp_path / "parts", "weights.bin", target)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["back.bin", "parts", "weights.bin"]
        assert target.read_bytes() == b"as it was"


def test_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "training.smollm2.parts", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert run("split", "a", "parts").stdout.splitlines() == ["parts/a.part-00"]
    assert run("join", "parts", "a", "b").returncode == 0
    assert (tmp_path / "b").read_bytes() == b"hello"
    failed = run("join", "parts", "c", "d")
    assert (failed.returncode, "not all parts of c" in failed.stderr) == (1, True)


def test_a_part_is_under_16_mib() -> None:
    assert PART_BYTES < 16 << 20
