"""The file of a checkpoint's sampler: read as it was written, or refused by its name and the key's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from replicas.model.config import ModelConfig
from replicas.model.fields import CheckpointError
from replicas.sampler_file import SAMPLER_FILE, read_sampler, write_sampler
from tests.naive_sampler import SAMPLER
from tests.tiny_checkpoint import make_tiny_checkpoint

EMBEDDED = Path(__file__).parents[2] / "replicas" / "checkpoints" / "triad-5m"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_sampler(tmp_path) is None
    write_sampler(tmp_path, SAMPLER, "a test")
    assert read_sampler(tmp_path) == SAMPLER
    other = replace(SAMPLER, risk=0.5)
    write_sampler(tmp_path, other, "a test")
    assert read_sampler(tmp_path) == other


def test_a_checkpoints_configuration_has_its_sampler(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, seed=1)
    assert ModelConfig.from_folder(folder).sampler is None
    write_sampler(folder, SAMPLER, "a test")
    assert ModelConfig.from_folder(folder).sampler == SAMPLER


@pytest.mark.parametrize(
    ("changes", "weights", "message"),
    [
        ({"version": 2}, {}, "version must be 1, got 2"),
        ({"version": None}, {}, "version must be 1, got None"),
        ({"risk": 0}, {}, "risk must be a number of at least"),
        ({"risk": 65}, {}, "risk must be a number of at least"),
        ({"risk": None}, {}, "risk must be a number"),
        ({"risk": "0.1"}, {}, "risk must be a number"),
        ({"weights": [1.0]}, {}, "weights must be an object"),
        ({"weights": None}, {}, "weights.bias must be a number"),
        ({}, {"odds": -0.1}, "weights.odds must be a number of at least 0"),
        ({}, {"doubts": 0.1}, "weights.doubts must be a number of at least -1000 and at most 0"),
        ({}, {"place": None}, "weights.place must be a number"),
        ({}, {"bias": float("nan")}, "weights.bias must be a number"),
        ({}, {"length": True}, "weights.length must be a number"),
        ({}, {"entropy": 1.0, "left": 0.0}, "weights has entropy, left, which nothing is known of"),
    ],
)
def test_a_file_that_can_not_be_gone_by_is_refused(tmp_path: Path, changes, weights, message: str) -> None:
    write_sampler(tmp_path, SAMPLER, "a test")
    raw = json.loads((tmp_path / SAMPLER_FILE).read_text())
    raw["weights"] |= weights
    (tmp_path / SAMPLER_FILE).write_text(json.dumps(raw | changes))
    with pytest.raises(CheckpointError) as caught:
        read_sampler(tmp_path)
    assert str(caught.value).startswith(f"{SAMPLER_FILE}: {message}")


@pytest.mark.parametrize("text", ["[", "[]", ""])
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / SAMPLER_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=SAMPLER_FILE):
        read_sampler(tmp_path)
