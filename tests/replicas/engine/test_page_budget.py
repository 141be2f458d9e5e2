"""Where pages are short nobody is let in only to be preempted at once, and nobody waits for ever."""

import random

import pytest

from policies.modes import DecodePlan, Mode
from replicas.config import EngineConfig
from replicas.engine.blocks import PagePool
from replicas.engine.engine import Engine
from replicas.engine.page_budget import PageBudget
from replicas.engine.sequence import ActivePlan, Sequence, Status
from replicas.messages import DecodingOptions, SamplingParams
from tests.replicas.engine.scripted import PINNED, ScriptedRunner, expected, naive_ar, tokens_of

MODES = {
    "ar": DecodingOptions(Mode.AR),
    "self_speculation": DecodingOptions(Mode.SELF_SPECULATION, 16),
    "diffusion": DecodingOptions(Mode.DIFFUSION, 32, 0.9),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_pages", [60, 90, 120])
def test_short_pages_cause_no_preemption_thrash(mode: str, num_pages: int) -> None:
    """16 sequences of 35 pages each, where 2 or 3 of them fit. Who came back as soon as its prompt fitted
    was preempted up to 138 times."""
    runner = ScriptedRunner(num_pages=num_pages, page_size=4, max_context=200)
    engine = Engine(runner, EngineConfig(max_running=64))
    sampling = SamplingParams(max_tokens=100, ignore_eos=True)
    prompts = [[3 + (k * 31 + j * j) % 57 for j in range(40)] for k in range(16)]
    sequences = [engine.submit(str(k), prompt, sampling, MODES[mode]) for k, prompt in enumerate(prompts)]
    while engine.has_work:
        engine.step()
    assert sum(sequence.num_preemptions for sequence in sequences) <= 2 * len(sequences)
    assert engine.scheduler.counters.num_tokens == 100 * len(sequences)
    # Who runs beside the first is not held back either: batches stay as large as they were.
    assert runner.num_forwards <= {60: 720, 90: 475, 120: 365}[num_pages]
    if mode != "diffusion":
        assert [sequence.tokens[40:] for sequence in sequences] == [
            naive_ar(prompt, 100, ignore_eos=True) for prompt in prompts
        ]


@pytest.mark.parametrize("seed", range(40))
def test_ranks_are_kept_and_all_come_to_their_end(seed: int) -> None:
    """Nobody overtakes one that waits, the first of those that run is never preempted, and each gets its
    own tokens, whatever the priorities and however few the pages."""
    rng = random.Random(seed)
    engine = Engine(
        ScriptedRunner(num_pages=rng.randint(24, 60)),
        EngineConfig(
            max_running=rng.randint(2, 12),
            max_waiting=100,
            max_step_tokens=rng.randint(192, 260),
        ),
        clock=lambda: 0.0,
    )
    engine.set_plan(DecodePlan(Mode.DIFFUSION, rng.randint(2, 32)), "test")
    wanted, made, num_steps = {}, {}, 0
    names = [f"{rng.choice(list(PINNED))}-{number}" for number in range(30)]
    scheduler = engine.scheduler
    while names or engine.has_work:
        if names and rng.random() < 0.3:
            name = names.pop()
            kind = name.partition("-")[0]
            prompt = [3 + len(names), *(rng.randint(3, 60) for _ in range(rng.randint(1, 30)))]
            max_tokens = rng.randint(1, 60)
            engine.submit(
                name,
                prompt,
                SamplingParams(max_tokens=max_tokens),
                PINNED[kind],
                priority=rng.choice((0, 0, -2, 3)),
            )
            wanted[name] = expected(kind, prompt, max_tokens, 96)
        waited = list(scheduler.waiting)
        first = scheduler.running[0] if scheduler.running else None
        num_before = first.num_preemptions if first is not None else 0
        for progress in engine.step():
            made.setdefault(progress.sequence.request_id, []).append(progress)
        engine.check_integrity()
        num_steps += 1
        assert num_steps < 5000, "somebody waits for ever"
        let_in = [s.rank for s in waited if s.status is not Status.WAITING]
        left = [s.rank for s in waited if s.status is Status.WAITING]
        assert not let_in or not left or max(let_in) < min(left)
        if first is not None and not any(rank < first.rank for rank in let_in):
            assert first.num_preemptions == num_before
    assert {name: tokens_of(progress) for name, progress in made.items()} == wanted


def test_room_is_that_of_a_round_for_each_up_to_the_one_that_asks() -> None:
    assert {answer for seed in range(40) for answer in answers_as_by_brute_force(seed)} == {True, False}


def answers_as_by_brute_force(seed: int) -> list[bool]:
    """Whether each that waits has room, beside some that run."""
    rng = random.Random(seed)
    spec = ScriptedRunner().spec
    block_length = rng.randint(2, 16)
    active = ActivePlan(DecodePlan(Mode.DIFFUSION, block_length), "test")

    def a_sequence(number: int) -> Sequence:
        prompt = [3] * rng.randint(1, 40)
        sequence = Sequence(number, str(number), prompt, 50, SamplingParams(), DecodingOptions())
        sequence.rank = (0.0, number)
        return sequence

    def missing(sequence: Sequence) -> int:
        end = min(len(sequence.tokens) + block_length, spec.max_context)
        return max(0, -(-end // spec.page_size) - len(sequence.pages))

    everybody = [a_sequence(number) for number in range(12)]
    running = [sequence for sequence in everybody if rng.random() < 0.5]
    pool = PagePool(spec.num_pages, spec.page_size)
    for sequence in running:
        sequence.pages = pool.allocate(rng.randint(0, 9)) or []
    budget = PageBudget(pool, spec, active, running)
    promised = list(running)
    answers = []
    for sequence in everybody:
        if sequence in running:
            continue
        needed = sum(missing(other) for other in promised if other.rank <= sequence.rank) + missing(sequence)
        answers.append(needed <= pool.num_free)
        assert budget.has_room(sequence) is answers[-1]
        if answers[-1]:
            budget.promise(sequence)
            promised.append(sequence)
    return answers


def test_who_comes_first_waits_for_no_round_of_those_behind_it() -> None:
    """It will take their pages."""
    config = EngineConfig(overlap_blocks=False)  # no block has taken its pages with the prompt
    engine = Engine(ScriptedRunner(num_pages=30), config, clock=lambda: 0.0)
    sampling = SamplingParams(max_tokens=50, ignore_eos=True)
    for number in range(3):
        engine.submit(str(number), [3 + number] * 24, sampling, MODES["diffusion"], priority=1)
    engine.step()
    assert len(engine.scheduler.running) == 2
    urgent = engine.submit("urgent", [9] * 8, sampling, MODES["ar"], priority=-1)
    engine.step()
    assert urgent.status is Status.RUNNING
    assert engine.scheduler.running[0] is urgent
