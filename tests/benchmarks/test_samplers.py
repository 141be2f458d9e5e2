"""What the samplers of benchmarks.samplers know of a guess, and what they make of it."""

import math

import pytest
import torch

from benchmarks.samplers import PLACE, SUREST, Chooser, features
from replicas.engine.batch import ScheduledBatch, Segment, SegmentOutput
from replicas.messages import SamplingParams
from tests.replicas.engine.scripted import MASK, ScriptedRunner

PROBS = (0.9, 0.6, 0.99)


class ThreeGuesses(ScriptedRunner):
    """Has a guess and a runner-up for the places 2, 3 and 5 of a block."""

    def run(self, batch: ScheduledBatch) -> list[SegmentOutput]:
        [segment] = batch.segments
        assert segment.sampling.logprobs is not None
        top = tuple(((7, math.log(prob)), (8, math.log(1.0 - prob))) for prob in PROBS)
        return [SegmentOutput((7, 7, 7), PROBS, top)]


def denoising(seed: int) -> Segment:
    tokens = (seed, 20, MASK, MASK, 21, MASK)
    return Segment(0, 4, tokens, (0, 1, 2), 0, False, (2, 3, 5), SamplingParams(logprobs=20))


def test_a_guess_is_known_by_itself_its_neighbours_and_its_place():
    rows = features(denoising(seed=9), ThreeGuesses().run(ScheduledBatch((denoising(9),)))[0])
    odds = [math.log(prob / (1.0 - prob)) for prob in PROBS]
    assert rows[:, PLACE].expm1().tolist() == pytest.approx([2, 3, 5])
    assert rows[:, 0].tolist() == pytest.approx(odds)
    assert rows[:, 3].tolist() == pytest.approx(odds)  # of two tokens the margin is the log-odds
    assert rows[:, 4].tolist() == pytest.approx([SUREST, odds[0], SUREST])  # left of it
    assert rows[:, 5].tolist() == pytest.approx([odds[1], SUREST, SUREST])  # right of it
    assert rows[:, 6].tolist() == pytest.approx([odds[0], odds[1], odds[1]])  # least sure up to it
    assert rows[:, 9].tolist() == pytest.approx([math.log1p(1), math.log1p(2), math.log1p(1)])
    assert rows[:, 11].tolist() == [0.0, 0.0, 0.0]
    assert features(denoising(MASK), ThreeGuesses().run(ScheduledBatch((denoising(9),)))[0])[0, 11] == 1.0


@pytest.mark.parametrize(("budget", "fixed"), [(0.005, 0), (0.05, 1), (0.15, 2), (1.0, 3)])
def test_as_many_are_fixed_as_leave_the_wrong_ones_expected_within_the_budget(budget, fixed):
    chooser = Chooser(ThreeGuesses(), lambda rows: torch.sigmoid(rows[:, 0]), budget)
    [output] = chooser.run(ScheduledBatch((denoising(seed=9),)))
    surest_first = [output.probs[2], output.probs[0], output.probs[1]]
    assert sum(prob >= 0.5 for prob in output.probs) == fixed
    assert surest_first == sorted(surest_first, reverse=True)
    assert output.token_ids == (7, 7, 7)
