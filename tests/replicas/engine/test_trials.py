"""Trials: spans in which all `auto` sequences run a plan not in force, within a budget."""

from itertools import pairwise

import pytest

from policies.modes import DecodePlan, Mode
from policies.policy import Trial
from replicas.config import EngineConfig
from replicas.engine.batch import ScheduledBatch
from replicas.engine.engine import Engine
from replicas.engine.sequence import Progress
from replicas.engine.trials import MAX_SAVED_S, PAUSE_S, TRIAL_S
from replicas.messages import DecodingOptions, SamplingParams
from tests.replicas.engine.scripted import ScriptedRunner, naive_ar

AR = DecodePlan(Mode.AR)
SPECULATION = DecodePlan(Mode.SELF_SPECULATION, 6)
DIFFUSION = DecodePlan(Mode.DIFFUSION, 8, 0.7)
LOSSLESS = DecodingOptions(lossless=True)
STEP_S = 0.02


class Timed(ScriptedRunner):
    """Every forward takes STEP_S by its own clock; it keeps the batches, each with the time it began."""

    def __init__(self) -> None:
        super().__init__(num_pages=400)
        self.now_s = 0.0
        self.seen: list[tuple[float, ScheduledBatch]] = []

    def clock(self) -> float:
        return self.now_s

    def run(self, batch: ScheduledBatch):
        self.seen.append((self.now_s, batch))
        self.now_s += STEP_S
        return super().run(batch)

    def spans(self, mode: Mode) -> list[tuple[float, float]]:
        """When stretches of forwards of this mode, prompts aside, began and ended."""
        spans: list[tuple[float, float]] = []
        last = None
        for began_s, batch in self.seen:
            if batch.mode is mode and last is mode:
                spans[-1] = (spans[-1][0], began_s + STEP_S)
            elif batch.mode is mode:
                spans.append((began_s, began_s + STEP_S))
            last = batch.mode or last
        return spans


def serve(
    trial: Trial | None, plan: DecodePlan, decodings: list[DecodingOptions], seconds: float = 60.0
) -> tuple[Engine, Timed, list[Progress]]:
    """Requests of these kinds, each followed by another, for so long."""
    runner = Timed()
    engine = Engine(runner, EngineConfig(max_running=16), clock=runner.clock)
    engine.set_plan(plan, "rule")
    engine.set_trial(trial)
    ended: list[Progress] = []
    sampling = SamplingParams(max_tokens=80, ignore_eos=True)
    for number, decoding in enumerate(decodings):
        engine.submit(f"0-{number}", [3, 4 + number], sampling, decoding)
    while runner.now_s < seconds:
        for made in engine.step():
            if made.ended:
                ended.append(made)
                wave, number = map(int, made.sequence.request_id.split("-"))
                prompt = [3 + (wave + 1) % 8, 4 + number]
                engine.submit(f"{wave + 1}-{number}", prompt, sampling, decodings[number])
        engine.check_integrity()
    return engine, runner, ended


@pytest.mark.parametrize("change_s", [0.0, 0.05, 0.2])
@pytest.mark.parametrize(("share", "loss"), [(0.02, 0.5), (0.02, 0.1), (0.1, 1.0)])
def test_what_trials_may_lose_is_kept_to(share: float, loss: float, change_s: float) -> None:
    trial = Trial(SPECULATION, loss, share, change_s)
    _, runner, _ = serve(trial, AR, [DecodingOptions()] * 4, seconds=120.0)
    spans = runner.spans(Mode.SELF_SPECULATION)
    lost_s = sum(change_s + loss * (end_s - began_s) for began_s, end_s in spans)
    # Rounds that a trial's end finds begun are run to theirs: a tenth more.
    assert 0.5 * share <= lost_s / runner.now_s <= 1.1 * share + MAX_SAVED_S / runner.now_s


def test_a_trial_lasts_its_time_and_two_are_apart() -> None:
    _, runner, _ = serve(Trial(SPECULATION, 0.1, 0.1), AR, [DecodingOptions()] * 4)
    spans = runner.spans(Mode.SELF_SPECULATION)
    assert len(spans) >= 10
    for began_s, end_s in spans[:-1]:
        assert TRIAL_S - 2 * STEP_S <= end_s - began_s <= TRIAL_S + 4 * STEP_S
    for (_, end_s), (began_s, _) in pairwise(spans):
        assert began_s - end_s >= PAUSE_S - 4 * STEP_S


def test_all_sequences_are_in_it_as_they_would_be_in_force() -> None:
    engine, runner, _ = serve(Trial(SPECULATION, 0.5, 0.02), AR, [DecodingOptions()] * 8, seconds=10.0)
    tried = [batch for _, batch in runner.seen if batch.mode is Mode.SELF_SPECULATION]
    full = [batch for batch in tried if len(batch.segments) == 8]
    assert len(full) >= 0.8 * len(tried) > 0
    assert {forward.mode for forward in engine.forwards} <= {None, Mode.AR, Mode.SELF_SPECULATION}


def test_blocks_of_diffusion_overlap_in_a_trial_too() -> None:
    engine, runner, _ = serve(Trial(DIFFUSION, 0.5, 0.02), SPECULATION, [DecodingOptions()], seconds=10.0)
    overlapping = [
        segment
        for _, batch in runner.seen
        for segment in batch.segments
        if 0 < segment.num_causal < len(segment.token_ids)
    ]
    assert overlapping
    made = [made for made in engine.scheduler.counters.rounds if made.plan == DIFFUSION]
    assert made


def test_a_trials_first_round_of_self_speculation_which_has_no_draft_is_not_counted() -> None:
    """It brings one token whatever the plan; in force only what follows a refusal does."""
    engine, _, _ = serve(Trial(SPECULATION, 0.1, 0.1), AR, [DecodingOptions()], seconds=20.0)
    counters = engine.scheduler.counters
    made = [made for made in counters.rounds if made.plan == SPECULATION]
    num_left_out = counters.forwards_by_mode[Mode.SELF_SPECULATION] - len(made)
    assert len(made) > 5 * num_left_out > 0
    assert all(made.forwards == 1 for made in made)


def test_the_answer_is_the_same_and_no_switch_is_told_of() -> None:
    _, _, ended = serve(Trial(SPECULATION, 0.1, 0.1), AR, [LOSSLESS, DecodingOptions()])
    for made in ended:
        sequence = made.sequence
        prompt, tokens = sequence.tokens[:2], sequence.tokens[2:]
        assert tokens == naive_ar(prompt, 80, ignore_eos=True)
        report = sequence.report("r")
        assert (report.num_switches, report.rule) == (0, "rule")
    assert any(Mode.SELF_SPECULATION in made.sequence.tokens_by_mode for made in ended)


def test_a_request_that_may_not_run_a_plan_does_not_try_it() -> None:
    pinned = DecodingOptions(Mode.AR)
    _, _, ended = serve(Trial(DIFFUSION, 0.1, 0.1), AR, [pinned])
    assert {mode for made in ended for mode in made.sequence.tokens_by_mode} == {Mode.AR}
    _, _, ended = serve(Trial(DIFFUSION, 0.1, 0.1), AR, [LOSSLESS])
    assert Mode.DIFFUSION not in {mode for made in ended for mode in made.sequence.tokens_by_mode}


def test_a_new_plan_ends_the_trial() -> None:
    runner = Timed()
    engine = Engine(runner, clock=runner.clock)
    engine.set_plan(AR, "rule")
    engine.set_trial(Trial(SPECULATION, 0.1, 0.1))
    sequence = engine.submit("r", [5, 6, 7], SamplingParams(max_tokens=80, ignore_eos=True))
    while sequence.round_plan != SPECULATION:
        engine.step()
    engine.set_plan(DIFFUSION, "other")
    engine.set_trial(None)
    while sequence.round_plan == SPECULATION:
        engine.step()
    assert sequence.round_plan == DIFFUSION
    assert sequence.last_mode is Mode.DIFFUSION


def test_silence_earns_little() -> None:
    runner = Timed()
    engine = Engine(runner, clock=runner.clock)
    engine.set_plan(AR, "rule")
    engine.set_trial(Trial(SPECULATION, 1.0, 0.02))
    for number in range(10):
        engine.submit(str(number), [5, 6 + number], SamplingParams(max_tokens=60, ignore_eos=True))
        while engine.has_work:
            engine.step()
        runner.now_s += 1000.0
    assert len(runner.spans(Mode.SELF_SPECULATION)) <= 2


@pytest.mark.parametrize("silence_s", [0.01, 0.5, 2.0, 3600.0])
def test_a_trial_does_not_outlive_a_silence(silence_s: float) -> None:
    runner = Timed()
    engine = Engine(runner, clock=runner.clock)
    engine.set_plan(AR, "rule")
    engine.set_trial(Trial(SPECULATION, 0.1, 0.1))
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    begun = engine.submit("r", [5, 6, 7], sampling)
    while begun.round_plan != SPECULATION:
        engine.step()
    engine.cancel("r")
    engine.set_trial(None)
    runner.now_s += silence_s
    following = engine.submit("s", [5, 6, 7], sampling)
    while engine.has_work:
        engine.step()
    modes = {Mode.AR, Mode.SELF_SPECULATION} if silence_s < 1.0 else {Mode.AR}
    assert set(following.tokens_by_mode) == modes


@pytest.mark.parametrize("cancelled", [False, True])
def test_no_silence_is_a_forwards(cancelled: bool) -> None:
    runner = Timed()
    engine = Engine(runner, clock=runner.clock)
    for number in range(3):
        max_tokens = 100 if cancelled else 5
        engine.submit(str(number), [5, 6], SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        for _ in range(5):
            engine.step()
        engine.cancel(str(number))
        assert not engine.has_work
        runner.now_s += 60.0
    assert len(engine.forwards) == 15
    assert max(forward.ms for forward in engine.forwards) == pytest.approx(1000.0 * STEP_S)


def test_what_a_forward_costs_lasts_to_the_next_one_but_not_through_silence() -> None:
    runner = Timed()
    engine = Engine(runner, clock=runner.clock)
    engine.submit("r", [5, 6], SamplingParams(max_tokens=3, ignore_eos=True), DecodingOptions(Mode.AR))
    while engine.has_work:
        engine.step()
        runner.now_s += 0.005  # tokens are sent
    runner.now_s += 10.0
    engine.submit("s", [5, 7], SamplingParams(max_tokens=2, ignore_eos=True), DecodingOptions(Mode.AR))
    engine.step()
    took_ms = [forward.ms for forward in engine.forwards]
    assert took_ms == pytest.approx([25.0, 25.0, 20.0])


def test_without_a_trial_nothing_is_tried() -> None:
    engine, _, _ = serve(None, AR, [DecodingOptions()], seconds=5.0)
    assert set(engine.scheduler.counters.forwards_by_mode) == {Mode.AR}


def test_a_mixture_of_modes_is_no_modes_forward() -> None:
    engine, _, _ = serve(None, AR, [DecodingOptions(), DecodingOptions(Mode.AR)], seconds=2.0)
    assert {forward.mode for forward in engine.forwards} <= {None, Mode.AR}
    engine, _, _ = serve(
        None, AR, [DecodingOptions(), DecodingOptions(Mode.SELF_SPECULATION, 2)], seconds=2.0
    )
    num_mixed = sum(forward.mode is None for forward in engine.forwards)
    assert num_mixed > 0.9 * len(engine.forwards)


def test_rounds_are_told_of_as_they_were_asked_for() -> None:
    """A draft cut by max_tokens counts as of its plan's block; one that the request's end cuts too."""
    engine, _, _ = serve(None, SPECULATION, [DecodingOptions()], seconds=0.5)
    made = list(engine.scheduler.counters.rounds)
    assert {round_made.plan for round_made in made} == {SPECULATION}


def test_the_load_tells_of_what_runs() -> None:
    engine = Engine(ScriptedRunner(num_pages=400), EngineConfig(max_running=3))
    kinds = [DecodingOptions(), LOSSLESS, DecodingOptions(Mode.DIFFUSION), DecodingOptions(Mode.AR)]
    for number, decoding in enumerate(kinds):
        engine.submit(str(number), [3 + number] * 10, SamplingParams(max_tokens=40), decoding)
    engine.step()
    load = engine.snapshot("r")
    assert (load.num_running, load.num_waiting, load.num_auto, load.num_lossless) == (3, 1, 2, 1)
    assert load.pinned_by_mode == {Mode.DIFFUSION: 1, Mode.AR: 1}
    assert (load.mean_context, load.mean_remaining) == (10.0, 39.0)
    assert (load.page_size, load.max_step_tokens) == (4, 512)
