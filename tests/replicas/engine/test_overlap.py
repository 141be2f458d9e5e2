"""Blocks of diffusion that are begun in the commit of the one before."""

from dataclasses import replace

import pytest

from policies.modes import DecodePlan, Mode
from policies.policy import Trial
from replicas.config import EngineConfig
from replicas.engine.batch import ScheduledBatch, Segment, SegmentOutput
from replicas.engine.engine import Engine
from replicas.engine.sequence import Sequence
from replicas.messages import DecodingOptions, SamplingParams
from tests.replicas.engine.scripted import PINNED, ScriptedRunner

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
    def segments(self) -> list[Segment]:
        return [segment for plan in self.plans for segment in plan.segments]

    @property
    def num_overlapping(self) -> int:
        """Blocks of diffusion begun in a commit; it samples its last token alone, as no verify does."""
        decoding = [s for s in self.segments if s.start >= s.prompt_len]
        both = [s for s in decoding if 0 < s.num_causal < len(s.token_ids)]
        return sum(s.wanted[0] == s.num_causal - 1 > 0 for s in both)

    @property
    def num_behind_prompts(self) -> int:
        return sum(s.start < s.prompt_len and s.num_causal < len(s.token_ids) for s in self.segments)


def run(engine: Engine, max_tokens: int = 80, decoding: DecodingOptions | None = None) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    options = decoding or DecodingOptions(PLAN.mode, PLAN.block_length, PLAN.threshold)
    sequence = engine.submit("r", PROMPT, sampling, options)
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    return sequence


def test_each_block_takes_a_forward_less() -> None:
    runs = {}
    for overlaps in (True, False):
        runner = Seen()
        engine = Engine(runner, EngineConfig(overlap_blocks=overlaps))
        runs[overlaps] = run(engine), runner
        assert runner.num_overlapping == (9 if overlaps else 0)  # 80 tokens: ten blocks of 8
        assert runner.num_behind_prompts == overlaps
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


@pytest.mark.parametrize("options", [PINNED["diffusion"], PINNED["self_speculation"], PINNED["ar"]])
def test_the_first_block_begins_behind_the_prompt(options: DecodingOptions) -> None:
    """Behind its last chunk, and only where the step has room; the tokens are the same."""
    found = {}
    for max_prefill_tokens in (64, 12):
        runner = Seen()
        engine = Engine(runner, EngineConfig(max_prefill_tokens=max_prefill_tokens))
        sampling = SamplingParams(max_tokens=50, ignore_eos=True)
        other = engine.submit("other", [4, 9], sampling, PINNED["ar"])
        engine.step()
        sequence = engine.submit("r", [5] * 20, sampling, options)
        while engine.has_work:
            engine.step()
            engine.check_integrity()
        found[max_prefill_tokens] = sequence.tokens
        assert other.num_forwards == 49
        has_masks = options.mode is not Mode.AR and max_prefill_tokens == 64
        assert runner.num_behind_prompts == has_masks
        counters = engine.scheduler.counters
        assert counters.made_by_mode.total() == 100
        assert counters.tokens_by_mode.total() == 98
    assert found[64] == found[12]


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


def test_a_model_that_denoises_with_its_adapter_has_it_behind_a_commit_too() -> None:
    runner = Seen(denoises_with_adapter=True)
    run(Engine(runner))
    assert runner.num_overlapping == 9
    assert all(segment.adapter != segment.is_causal for segment in runner.segments)


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
