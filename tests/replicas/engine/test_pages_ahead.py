"""A sequence has the pages of its next step while half of the pool is free, and no more than its needs
after."""

import pytest

from policies.modes import Mode
from replicas.engine.batch import ScheduledBatch, SegmentOutput
from replicas.engine.engine import Engine
from replicas.messages import DecodingOptions, SamplingParams
from tests.replicas.engine.scripted import ScriptedRunner

PAGE = 4


class Seen(ScriptedRunner):
    """Notes for each segment of a round how many tokens its pages have room for behind it."""

    def __init__(self, num_pages: int):
        super().__init__(num_pages=num_pages, page_size=PAGE)
        self.rooms: list[tuple[int, int]] = []

    def run(self, batch: ScheduledBatch) -> list[SegmentOutput]:
        for segment in batch.segments:
            end = segment.start + len(segment.token_ids)
            self.rooms.append((len(segment.token_ids), len(segment.pages) * PAGE - end))
        return super().run(batch)


def complete(runner: Seen, mode: Mode, max_tokens: int = 30) -> list[int]:
    engine = Engine(runner)
    options = DecodingOptions(mode, None if mode is Mode.AR else 4)
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    sequence = engine.submit("a", [7, 8, 9], sampling, options)
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    return list(sequence.tokens)


@pytest.mark.parametrize("mode", [Mode.AR, Mode.SELF_SPECULATION])
def test_the_next_steps_pages_are_there(mode: Mode) -> None:
    runner = Seen(num_pages=64)
    made = complete(runner, mode)
    until_the_end = [room >= length for length, room in runner.rooms[1:-10]]
    assert until_the_end
    assert all(until_the_end)
    assert made == complete(Seen(num_pages=24), mode), "pages change no token"


def test_no_page_is_taken_past_the_last_token() -> None:
    runner = Seen(num_pages=64)
    complete(runner, Mode.AR, max_tokens=5)
    assert runner.rooms[-1][1] < PAGE


def test_a_pool_more_than_half_taken_gives_none() -> None:
    runner = Seen(num_pages=24)  # all that one sequence may need, so from the 13th page on more than half
    engine = Engine(runner)
    engine.submit("a", [7] * 48, SamplingParams(max_tokens=30, ignore_eos=True), DecodingOptions(Mode.AR))
    while engine.has_work:
        engine.step()
    assert min(room for _, room in runner.rooms) == 0
    assert all(room < PAGE for _, room in runner.rooms[2:])
