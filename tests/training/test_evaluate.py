"""The shipped checkpoint does what its card says, on a small sample, through the real engine."""

import pytest

from policies.modes import DecodePlan, Mode
from replicas.yields_file import read_yields
from training.evaluate import DEFAULT_CHECKPOINT, evaluate, table
from training.tasks.registry import FAMILIES, TOOL_FAMILIES

PLANS = (
    DecodePlan(Mode.AR),
    DecodePlan(Mode.DIFFUSION, 16),
    DecodePlan(Mode.SELF_SPECULATION, 16),
)


@pytest.fixture(scope="module")
def evaluated():
    return evaluate(DEFAULT_CHECKPOINT, per_family=8, plans=PLANS)


@pytest.fixture(scope="module")
def scores(evaluated):
    return evaluated[0]


def test_the_yields_beside_the_checkpoint_are_those_of_its_tasks(evaluated):
    """Measured anew on fewer prompts, and not far off."""
    known = {entry.plan: entry for entry in read_yields(DEFAULT_CHECKPOINT)}
    assert [entry.plan for entry in evaluated[1]] == list(PLANS)
    for entry in evaluated[1][1:]:
        assert entry.tokens_per_forward == pytest.approx(known[entry.plan].tokens_per_forward, rel=0.15)
        assert entry.rows == pytest.approx(known[entry.plan].rows, rel=0.1)
        assert entry.num_rounds >= 100


def test_the_yields_say_how_the_answers_were(evaluated):
    overall = [score for score in evaluated[0] if score.family == "all"]
    for score, entry in zip(overall, evaluated[1], strict=True):
        assert entry.differing == pytest.approx(1.0 - score.same_as_ar, abs=1e-6)
        assert entry.right == pytest.approx(score.exact, abs=1e-6)
    assert [entry.differing for entry in evaluated[1] if entry.plan.mode is not Mode.DIFFUSION] == [0.0, 0.0]


def test_one_row_a_family_and_one_over_all(scores):
    assert len(scores) == len(PLANS) * (len(FAMILIES) + 1)
    assert [s.family for s in scores[: len(FAMILIES) + 1]] == [*FAMILIES, "all"]
    assert len(table(scores).splitlines()) == 2 + len(scores)


def test_quality(scores):
    overall = {s.setting.split()[0]: s for s in scores if s.family == "all"}
    assert overall["ar"].exact >= 0.95
    assert overall["diffusion"].exact >= overall["ar"].exact - 0.03
    assert overall["ar"].tokens_per_forward == pytest.approx(1.0)
    assert overall["diffusion"].tokens_per_forward >= 2.5
    assert overall["self_speculation"].tokens_per_forward >= 2


def test_self_speculation_is_lossless(scores):
    for ar, speculated in zip(scores[: len(FAMILIES) + 1], scores[-len(FAMILIES) - 1 :], strict=True):
        assert speculated.same_as_ar == 1.0
        assert speculated.exact == ar.exact


def test_families_with_tools_are_measured_by_their_own_rows():
    scores, _ = evaluate(DEFAULT_CHECKPOINT, per_family=1, plans=PLANS[::2], families=TOOL_FAMILIES)
    assert [s.family for s in scores] == [*TOOL_FAMILIES, "all"] * 2
    assert all(s.same_as_ar == 1.0 for s in scores)
