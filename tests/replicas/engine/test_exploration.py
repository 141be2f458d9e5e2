"""Plans that are explored beside the one in force: seldom, by all at once, and changing no answer."""

import pytest

from policies.modes import DecodePlan, Mode
from policies.policy import ExploredPlans
from replicas.engine.engine import Engine
from replicas.engine.sequence import Progress
from replicas.messages import DecodingOptions, SamplingParams
from tests.replicas.engine.scripted import ScriptedRunner, naive_ar

AR = DecodePlan(Mode.AR)
SPECULATION = DecodePlan(Mode.SELF_SPECULATION, 6)
DIFFUSION = DecodePlan(Mode.DIFFUSION, 8, 0.7)
LOSSLESS = DecodingOptions(lossless=True)


def serve(
    explored_plans: ExploredPlans | None,
    plan: DecodePlan,
    decodings: list[DecodingOptions],
    num_each: int = 6,
) -> tuple[Engine, list[Progress]]:
    """Waves of one request of each kind of decoding, all answered."""
    engine = Engine(ScriptedRunner(num_pages=400), max_running=16)
    engine.set_plan(plan, "rule")
    engine.set_explored_plans(explored_plans)
    ended = []
    for wave in range(num_each):
        for number, decoding in enumerate(decodings):
            prompt = [3 + wave, 4 + number]
            sampling = SamplingParams(max_tokens=80, ignore_eos=True)
            engine.submit(f"{wave}-{number}", prompt, sampling, decoding)
        while engine.has_work:
            ended += [made for made in engine.step() if made.ended]
            engine.check_integrity()
    return engine, ended


def exploring_forwards(engine: Engine, plan: DecodePlan) -> int:
    return sum(made.forwards for made in engine.scheduler.counters.rounds if made.plan == plan)


@pytest.mark.parametrize("share", [0.02, 0.1])
def test_a_share_of_the_forwards_goes_into_them(share: float) -> None:
    engine, _ = serve(ExploredPlans((SPECULATION,), share), AR, [DecodingOptions()], num_each=40)
    num_forwards = sum(engine.scheduler.counters.forwards_by_mode.values())
    explored = engine.scheduler.counters.forwards_by_mode[Mode.SELF_SPECULATION]
    assert 0.5 * share <= explored / num_forwards <= share + 4 / num_forwards


def test_all_sequences_explore_together_so_that_the_cost_is_seen_as_it_would_be() -> None:
    engine, _ = serve(ExploredPlans((SPECULATION,), 0.02), AR, [DecodingOptions()] * 8, num_each=2)
    drafts = [f for f in engine.forwards if f.num_tokens == 8 * (1 + SPECULATION.block_length)]
    assert drafts
    assert all(forward.is_exploration for forward in drafts)


def test_an_exploration_of_self_speculation_verifies_a_draft() -> None:
    """A round without a draft brings one token whatever the plan, so that it would say nothing."""
    engine, _ = serve(ExploredPlans((SPECULATION,), 0.1), AR, [DecodingOptions()], num_each=40)
    made = [round_made for round_made in engine.scheduler.counters.rounds if round_made.plan == SPECULATION]
    assert {round_made.forwards for round_made in made} == {1, 2}  # a draft accepted whole, and one refused
    assert all(round_made.tokens >= round_made.forwards for round_made in made)
    assert sum(round_made.tokens for round_made in made) > 1.2 * sum(r.forwards for r in made)


def test_they_take_turns() -> None:
    other = DecodePlan(Mode.SELF_SPECULATION, 4)
    engine, _ = serve(
        ExploredPlans((SPECULATION, DIFFUSION, other), 0.1), AR, [DecodingOptions()], num_each=30
    )
    order = [made.plan for made in engine.scheduler.counters.rounds]
    assert len(order) >= 6
    assert order == [(SPECULATION, DIFFUSION, other)[index % 3] for index in range(len(order))]


def test_the_answer_is_the_same_and_no_switch_is_told_of() -> None:
    _, ended = serve(ExploredPlans((SPECULATION,), 0.1), AR, [LOSSLESS, DecodingOptions()])
    for made in ended:
        sequence = made.sequence
        prompt, tokens = sequence.tokens[:2], sequence.tokens[2:]
        assert tokens == naive_ar(prompt, 80, ignore_eos=True)
        report = sequence.report("r")
        assert (report.num_switches, report.rule) == (0, "rule")
    assert any(Mode.SELF_SPECULATION in made.sequence.tokens_by_mode for made in ended)


def test_a_request_that_may_not_run_a_plan_does_not_explore_it() -> None:
    pinned = DecodingOptions(Mode.AR)
    penalised = DecodingOptions(block_length=4)
    engine, ended = serve(ExploredPlans((DIFFUSION,), 0.1), AR, [LOSSLESS, pinned, penalised])
    assert {mode for made in ended for mode in made.sequence.tokens_by_mode} == {Mode.AR}
    assert exploring_forwards(engine, DIFFUSION) == 0


def test_an_exploration_that_is_cancelled_is_over() -> None:
    """Else whoever came next would explore the plan too, without credit."""
    engine = Engine(ScriptedRunner(num_pages=400))
    engine.set_plan(AR, "rule")
    engine.set_explored_plans(ExploredPlans((DecodePlan(Mode.DIFFUSION, 32),), 0.02))
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    first = engine.submit("first", [5, 6, 7], sampling)
    num_steps = 0
    while not engine.scheduler.exploration.explores(first):
        engine.step()
        num_steps += 1
    engine.cancel("first")
    explored = []
    for number in range(20):
        sequence = engine.submit(str(number), [5 + number, 6, 7], sampling)
        engine.step()
        engine.step()
        explored.append(engine.scheduler.exploration.explores(sequence))
        engine.cancel(str(number))
    assert not any(explored)
    # The credit comes back as fast as ever.
    again = engine.submit("again", [5, 6, 7], sampling)
    while not engine.scheduler.exploration.explores(again):
        engine.step()
        num_steps -= 1
    assert num_steps >= 0


def test_an_exploration_goes_on_while_another_request_is_in_it() -> None:
    engine = Engine(ScriptedRunner(num_pages=400))
    engine.set_plan(AR, "rule")
    engine.set_explored_plans(ExploredPlans((DecodePlan(Mode.DIFFUSION, 32),), 0.02))
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    two = [engine.submit(str(number), [5 + number, 6], sampling) for number in range(2)]
    while not all(engine.scheduler.exploration.explores(sequence) for sequence in two):
        engine.step()
    engine.cancel("0")
    late = engine.submit("late", [9, 6], sampling)
    engine.step()
    engine.step()
    assert engine.scheduler.exploration.explores(late)


def test_without_plans_to_explore_nothing_is_explored() -> None:
    engine, _ = serve(None, AR, [DecodingOptions()])
    assert set(engine.scheduler.counters.forwards_by_mode) == {Mode.AR}


def test_rounds_are_told_of_as_they_were_asked_for() -> None:
    """A draft cut by max_tokens counts as of its plan's block; one that the request's end cuts too."""
    engine, ended = serve(None, SPECULATION, [DecodingOptions()], num_each=1)
    made = list(engine.scheduler.counters.rounds)
    assert {round_made.plan for round_made in made} == {SPECULATION}
    (sequence,) = [progress.sequence for progress in ended]
    assert sum(round_made.tokens for round_made in made) == sequence.num_completion_tokens - 1
    assert sum(round_made.forwards for round_made in made) == sequence.num_forwards


def test_the_load_tells_of_what_runs() -> None:
    engine = Engine(ScriptedRunner(num_pages=400), max_running=3)
    kinds = [DecodingOptions(), LOSSLESS, DecodingOptions(Mode.DIFFUSION), DecodingOptions(Mode.AR)]
    for number, decoding in enumerate(kinds):
        engine.submit(str(number), [3 + number] * 10, SamplingParams(max_tokens=40), decoding)
    engine.step()
    load = engine.snapshot("r")
    assert (load.num_running, load.num_waiting, load.num_auto, load.num_lossless) == (3, 1, 2, 1)
    assert load.pinned_by_mode == {Mode.DIFFUSION: 1, Mode.AR: 1}
    assert (load.mean_context, load.mean_remaining) == (10.0, 39.0)
    assert (load.page_size, load.max_step_tokens) == (4, 512)
