"""Sizes, padding and guesses: what a graph replays must not depend on what it was captured with. Pure."""

import numpy as np
import pytest
import torch

from replicas.engine.batch import Segment
from replicas.messages import SamplingParams
from replicas.model.config import ModelConfig
from replicas.model.cuda.fill import fill_in
from replicas.model.cuda.graphs import GraphCache
from replicas.model.cuda.inputs import HostStep, StepSize, sections_of
from replicas.model.cuda.lookahead import guess, match, resolve
from replicas.model.cuda.sizes import GraphSizes
from replicas.model.cuda.staging import Staging
from tests.replicas.model.conftest import commit_and_masks, segment
from tests.tiny_checkpoint import MASK_TOKEN_ID, tiny_config

CONFIG = ModelConfig.parse(tiny_config())
PAGE = 8
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LONG = SamplingParams(max_tokens=100)


def sizes(*counts: int) -> StepSize:
    return StepSize(*counts, num_tiles=(1, 0, 0), has_adapter=False)


def test_written_sections_are_padded_and_in_place() -> None:
    segments = [
        segment([7, 8, 9], (4, 2), start=6, num_causal=0, adapter=True, wanted=(1, 2)),
        segment([3], (5,), start=2),
    ]
    host = HostStep.pack(segments, CONFIG, PAGE)
    size = StepSize(6, 4, 4, (4, 0, 0), True)
    buffer = np.full(host.num_ints(size) + 3, 99, dtype=np.int32)
    used = host.write(buffer, size)
    assert (buffer[used:] == 99).all()
    *places, (_, at, _) = size.places()
    parts = {name: buffer[first:end].tolist() for name, first, end in places}
    assert all(first % 4 == 0 for _, first, _ in places), (
        "kernels are compiled for pointers aligned to 16 bytes"
    )
    assert parts["token_ids"] == [7, 8, 9, 3, 0, 0]
    assert parts["positions"] == [6, 7, 8, 2, 0, 0]
    assert parts["slots"] == [4 * PAGE + 6, 4 * PAGE + 7, 2 * PAGE, 5 * PAGE + 2, -1, -1]
    assert parts["wanted"] == [1, 2, 3, 0]
    assert parts["adapter"] == [0, 1, 2, -1, -1, -1]
    assert parts["wanted_adapter"] == [0, 1, -1, -1]
    assert parts["segments"] == [0, 6, 3, 0, 0, 3, 2, 1, 1, 2, *[0] * 10]
    assert parts["tiles0"] == [0, 0, 1, 0, -1, -1, -1, -1]
    assert buffer[at:used].tolist() == [4, 2, 5]


def test_a_commit_and_the_block_behind_it_are_one_segment() -> None:
    segments = [segment([3], (5,), start=2), commit_and_masks([7, 8, 9], 3, (4, 2), start=4)]
    host = HostStep.pack(segments, CONFIG, PAGE)
    found = {name: values.tolist() for name, values in host.sections.items()}
    assert found["token_ids"] == [3, 7, 8, 9, *[MASK_TOKEN_ID] * 3]
    assert found["positions"] == [2, 4, 5, 6, 7, 8, 9]
    assert found["slots"][1:] == [*range(4 * PAGE + 4, 5 * PAGE), 2 * PAGE, 2 * PAGE + 1]
    assert found["wanted"] == [0, 3, 5, 6]
    assert found["segments"] == [0, 2, 1, 1, 0, 1, 4, 6, 3, 1]
    assert not host.size.has_adapter


def test_adapter_free_steps_have_no_adapter_sections() -> None:
    host = HostStep.pack([segment([3], (5,), start=2)], CONFIG, PAGE)
    assert dict(host.size.sections())["adapter"] == 0
    assert not GraphSizes(CONFIG).padded(host.size).has_adapter


def test_graphs_are_captured_once_and_kept() -> None:
    captured, replayed = [], []

    def capture(size: StepSize):
        captured.append(size)
        return lambda: replayed.append(size)

    cache = GraphCache(capture)
    a, b = sizes(1, 1, 1), sizes(2, 2, 2)
    for size in (a, b, a):
        cache.run(size)
    assert captured == [a, b]
    assert replayed == [a, b, a]
    assert len(cache) == 2


def test_a_failed_capture_is_not_kept() -> None:
    def capture(size: StepSize):
        raise RuntimeError("out of memory")

    cache = GraphCache(capture)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.run(sizes(1, 1, 1))
    assert len(cache) == 0


def step(token: int, start: int, seq_id: int = 0, pages: tuple[int, ...] = (3,)) -> Segment:
    return segment([token], pages, start=start, seq_id=seq_id)


def test_what_follows_a_step_is_a_step() -> None:
    asked = [step(9, 2, seq_id=4), step(8, 5, seq_id=6)]
    guessed = guess(asked, [0, 1], PAGE)
    assert guessed is not None
    known = resolve(guessed, [41, 42])
    assert match(known, [step(42, 6, seq_id=6)]) == [1]
    assert match(known, [step(41, 3, seq_id=4, pages=(3, 7)), step(42, 6, seq_id=6)]) == [0, 1]
    assert match(known, [step(40, 3, seq_id=4)]) is None
    assert match(known, [step(41, 4, seq_id=4)]) is None
    assert match(known, [step(41, 3, seq_id=4, pages=(2,))]) is None
    assert match(known, [step(41, 3, seq_id=4), step(1, 0, seq_id=9)]) is None
    assert match(known, [commit_and_masks([41], 2, (3,), start=3, seq_id=4)]) is None


def test_the_device_fills_in_what_the_host_would_have_packed() -> None:
    guessed = guess([step(9, 2, seq_id=4), step(8, 5, seq_id=6)], [1, 0], PAGE)
    assert guessed is not None
    staging = Staging(DEVICE)
    host = HostStep.pack(guessed.segments, CONFIG, PAGE)
    size = GraphSizes(CONFIG).padded(host.size)
    assert size is not None
    parts = sections_of(staging.send_step(host, size, None), size)
    fill_in(guessed, torch.tensor([41, 42], device=DEVICE), parts, staging)
    expected = HostStep.pack([step(42, 3, seq_id=4), step(41, 6, seq_id=6)], CONFIG, PAGE)
    for name, values in expected.sections.items():
        assert parts[name][: len(values)].tolist() == values.tolist(), name


@pytest.mark.parametrize(
    "unknown",
    [
        segment([9, 5, 6], (3,), start=1),  # a verify: of how many accepted tokens is not known
        segment([9, 5], (3,), start=1, num_causal=0, wanted=(1,)),  # a block denoised by diffusion
        commit_and_masks([9, 31], 2, (3,), start=1),  # and one committed, with the next behind it
        commit_and_masks([9], 2, (3,), start=1),
        segment([9, 5, 5], (3,), start=1, num_causal=1, adapter=True, wanted=(0, 2)),  # a seed and a draft
        segment([9, 5], (3,), start=1, wanted=()),  # a chunk of a prompt
        segment([9], (3,), start=7),  # the next token's page is not there
        segment([9], (3,), start=1, sampling=SamplingParams(presence_penalty=1.0)),
    ],
)
def test_nothing_is_guessed_where_anything_is_unknown(unknown: Segment) -> None:
    assert guess([step(7, 0), unknown], [0, 1], PAGE) is None
