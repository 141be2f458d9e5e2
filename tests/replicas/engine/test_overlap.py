"""Blocks of diffusion that are begun in the commit of the one before."""

from dataclasses import replace

import pytest

from policies.modes import DecodePlan, Mode
from policies.policy import Trial
from replicas.config import EngineConfig
from replicas.engine.batch import ScheduledBatch, SegmentOutput
from replicas.engine.engine import Engine
from replicas.engine.sequence import Sequence
from replicas.messages import DecodingOptions, SamplingParams
from tests.replicas.engine.scripted import ScriptedRunner

PLAN = DecodePlan(Mode.DIFFUSION, 8, 0.7)
OTHER = DecodePlan(Mode.SELF_SPECULATION, 6)
PROMPT = [5, 6, 7]


class Seen(ScriptedRunner):
    """Keeps what it was asked to run."""

    def __init__(self, denoises_with_adapter: bool = False) -> None:
        super().__init__(num_pages=400)
        self._spec = replace(self._spec, denoise_with_adapter=denoises_with_adapter)
        self.plans: list[ScheduledBatch] = []

    def run(self, batch: ScheduledBatch) -> list[SegmentOutput]:
        self.plans.append(batch)
        return super().run(batch)

    @property
    def num_overlapping(self) -> int:
        segments = [segment for plan in self.plans for segment in plan.segments]
        return sum(0 < segment.num_causal < len(segment.token_ids) for segment in segments)


def run(engine: Engine, max_tokens: int = 80, decoding: DecodingOptions | None = None) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    options = decoding or DecodingOptions(PLAN.mode, PLAN.block_length, PLAN.threshold)
    sequence = engine.submit("r", PROMPT, sampling, options)
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    return sequence


def test_each_block_but_the_first_takes_a_forward_less() -> None:
    runs = {}
    for overlaps in (True, False):
        runner = Seen()
        engine = Engine(runner, EngineConfig(overlap_blocks=overlaps))
        runs[overlaps] = run(engine), runner
        assert runner.num_overlapping == (9 if overlaps else 0)  # 80 tokens: ten blocks of 8
        (sequence, _) = runs[overlaps]
        made = list(engine.scheduler.counters.rounds)
        assert sum(round_made.tokens for round_made in made) == sequence.num_completion_tokens - 1
        assert sum(round_made.forwards for round_made in made) == sequence.num_forwards
        assert sum(round_made.rows for round_made in made) == sequence.num_rows
    together, apart = runs[True][0], runs[False][0]
    assert apart.num_rows == 8 * apart.num_forwards
    assert together.num_rows == 8 * (together.num_forwards + 9)
    assert together.num_forwards < apart.num_forwards


@pytest.mark.parametrize("max_tokens", range(1, 20))
def test_nothing_is_begun_that_could_not_be_taken(max_tokens: int) -> None:
    """A token comes from the prefill, 8 from a block: one that is begun has tokens still to come."""
    runner = Seen()
    sequence = run(Engine(runner), max_tokens)
    assert runner.num_overlapping == max(0, max_tokens - 2) // 8
    assert sequence.num_completion_tokens == max_tokens


def test_the_last_block_ends_with_the_context() -> None:
    runner = Seen()
    sequence = run(Engine(runner), runner.spec.max_context - len(PROMPT))
    ends = [segment.start + len(segment.token_ids) for plan in runner.plans for segment in plan.segments]
    assert max(ends) <= runner.spec.max_context
    assert len(sequence.tokens) == runner.spec.max_context


def test_a_new_plan_is_taken_at_the_next_commit() -> None:
    runner = Seen()
    engine = Engine(runner)
    engine.set_plan(PLAN, "first")
    sampling = SamplingParams(max_tokens=80, ignore_eos=True)
    sequence = engine.submit("r", PROMPT, sampling)
    while runner.num_overlapping < 2:
        engine.step()
    engine.set_plan(OTHER, "second")
    while sequence.last_mode is not OTHER.mode:
        assert sequence.round is None or sequence.round.start == sequence.num_cached
        engine.step()
    assert runner.num_overlapping == 2
    assert sequence.round_plan == OTHER
    assert sequence.tokens_by_mode[PLAN.mode] == 1 + 3 * 8


def test_a_model_that_denoises_with_its_adapter_never_does() -> None:
    runner = Seen(denoises_with_adapter=True)
    run(Engine(runner))
    assert runner.num_overlapping == 0
    assert any(segment.adapter for plan in runner.plans for segment in plan.segments)


def test_a_block_that_a_trial_begins_counts_as_if_the_one_before_had_begun_it() -> None:
    """All blocks but the trial's first are begun so; in force nearly all are."""
    now_s = 0.0
    runner = Seen()
    engine = Engine(runner, clock=lambda: now_s)
    engine.set_plan(OTHER, "rule")
    engine.set_trial(Trial(PLAN, 0.1, 0.1))
    for _ in range(20):
        engine.submit("r", PROMPT, SamplingParams(max_tokens=80, ignore_eos=True))
        while engine.has_work:
            engine.step()
            now_s += 0.02
    counters = engine.scheduler.counters
    made = [round_made for round_made in counters.rounds if round_made.plan == PLAN]
    num_begun = counters.forwards_by_mode[PLAN.mode] - sum(round_made.forwards for round_made in made)
    assert len(made) > num_begun > 0
    assert runner.num_overlapping > 0
