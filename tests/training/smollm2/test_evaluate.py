"""The measurement itself, on the embedded checkpoint, whose figures are known."""

from pathlib import Path

import pytest

from policies.modes import DecodePlan, Mode
from tests.training.smollm2.tiny import make_base
from training.evaluate import DEFAULT_CHECKPOINT
from training.smollm2.evaluate import evaluate, table
from training.tasks.registry import held_out_tasks

PROMPTS = [next(iter(held_out_tasks(family, 1))).prompt for family in ("story", "sql")]
PLANS = (DecodePlan(Mode.AR), DecodePlan(Mode.SELF_SPECULATION, 8), DecodePlan(Mode.DIFFUSION, 16, 0.9))


def test_scores() -> None:
    scores, answers = evaluate(DEFAULT_CHECKPOINT, PROMPTS, PLANS)
    ar, speculated, diffused = scores
    assert (ar.tokens_per_forward, ar.accepted, ar.same_as_ar) == (1.0, None, 1.0)
    assert speculated.same_as_ar == 1.0
    assert speculated.tokens == ar.tokens
    assert speculated.accepted == pytest.approx(speculated.tokens_per_forward)
    assert 2 < speculated.accepted <= 8
    assert diffused.accepted is None
    assert diffused.tokens_per_forward > 1
    assert [len(made) for made in answers] == [2, 2, 2]
    assert len(table(scores).splitlines()) == 2 + 3


def test_without_an_adapter_there_is_nothing_to_measure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no diffusion, self_speculation: is its linear_spec_lora/ there"):
        evaluate(make_base(tmp_path), PROMPTS)
