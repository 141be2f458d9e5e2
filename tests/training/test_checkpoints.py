"""The shipped checkpoint that calls functions by itself, on held-out chats."""

from pathlib import Path

from policies.modes import DecodePlan, Mode
from training.evaluate import DEFAULT_CHECKPOINT, evaluate
from training.tasks.registry import TOOL_FAMILIES

CHECKPOINT: Path = DEFAULT_CHECKPOINT.with_name("triad-5m-tools")
PER_FAMILY = 6


def test_most_chats_with_functions_are_answered_right_and_alike_in_the_lossless_modes() -> None:
    plans = (DecodePlan(Mode.AR), DecodePlan(Mode.SELF_SPECULATION, 16))
    scores, _ = evaluate(CHECKPOINT, PER_FAMILY, plans, families=TOOL_FAMILIES)
    by_ar, by_speculation = (score for score in scores if score.family == "all")
    assert by_ar.num_tasks == PER_FAMILY * len(TOOL_FAMILIES)
    assert by_ar.exact >= 0.8  # 92.5 % of 200
    assert by_speculation.same_as_ar == 1.0
    assert by_speculation.tokens_per_forward > 5.0
