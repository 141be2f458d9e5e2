"""How many prompt tokens a step takes: against brute force, and by the forwards the engine then runs."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.cost import ForwardStats, StepCost
from policies.modes import Mode
from replicas.config import EngineConfig
from replicas.engine.batch import ScheduledBatch
from replicas.engine.decoders.round import SegmentRequest
from replicas.engine.engine import Engine
from replicas.engine.prefill import MIN_TOKENS, PrefillBudget
from replicas.engine.sequence import Sequence
from replicas.messages import DecodingOptions, SamplingParams
from tests.replicas.engine.scripted import ScriptedRunner, naive_ar
from tests.thorough import examples

COST = StepCost((1, 32, 512), (4.0, 8.0, 80.0), segment_ms=0.2, cached_ms=1.0)


def sequence_of(num_tokens: int, num_cached: int) -> Sequence:
    sequence = Sequence(0, "r", [5] * num_tokens, 10, SamplingParams(), DecodingOptions())
    sequence.num_cached = num_cached
    return sequence


@given(seed=st.integers(0, 10**9))
@examples(70)
def test_the_bound_in_ms_takes_as_many_tokens_as_brute_force_finds(seed: int) -> None:
    rng = random.Random(seed)
    knot_ms = sorted(rng.uniform(1, 60) for _ in range(4))
    cost = StepCost((1, 8, 64, 512), tuple(knot_ms), rng.uniform(0, 1), rng.uniform(0, 3))
    rounds = {
        sequence_of(200, rng.randint(0, 199)): SegmentRequest((3,) * rng.randint(1, 16), True, False, ())
        for _ in range(rng.randint(1, 8))
    }
    most, max_ms = rng.randint(1, 120), rng.uniform(1, 90)
    budget = PrefillBudget(
        EngineConfig(max_prefill_tokens=most, max_step_ms=max_ms), cost, rng.randint(most, 512), rounds
    )
    num_tokens = sum(len(request.token_ids) for request in rounds.values())
    num_cached = sum(sequence.num_cached for sequence in rounds)
    num_segments = len(rounds)
    least = MIN_TOKENS
    for _ in range(4):
        sequence = sequence_of(rng.randint(1, 200), 0)
        sequence.num_cached = rng.randrange(sequence.num_prompt_tokens)
        wanted = 0
        while wanted < most:
            more = num_tokens + wanted + 1, num_segments + 1, num_cached + sequence.num_cached
            if cost.ms(*more) > max_ms:
                break
            wanted += 1
        wanted = max(wanted, min(least, most))
        wanted = min(wanted, sequence.num_prompt_tokens - sequence.num_cached)
        request = budget.take(sequence)
        assert (0 if request is None else len(request.token_ids)) == wanted
        if request is not None:
            num_tokens, num_segments = num_tokens + wanted, num_segments + 1
            num_cached, most, least = num_cached + sequence.num_cached, most - wanted, 0


class Costed(ScriptedRunner):
    """What its forwards take by COST, in order."""

    def __init__(self) -> None:
        super().__init__(num_pages=600, max_context=900)
        self.forwards: list[ForwardStats] = []

    def run(self, batch: ScheduledBatch):
        num_cached = sum(segment.start for segment in batch.segments)
        shape = batch.num_tokens, len(batch.segments), num_cached
        self.forwards.append(ForwardStats(*shape, COST.ms(*shape)))
        return super().run(batch)


def crowd_and_a_long_prompt(max_step_ms: float | None) -> tuple[Costed, int]:
    """The runner, and how many steps the prompt of 700 took beside 8 streams, which go on at each of them."""
    runner = Costed()
    engine = Engine(runner, EngineConfig(max_prefill_tokens=512, max_step_ms=max_step_ms))
    engine.set_step_cost(COST)
    sampling = SamplingParams(max_tokens=200, ignore_eos=True)
    streams = [engine.submit(f"s{k}", [5 + k, 9], sampling) for k in range(8)]
    while any(stream.num_completion_tokens == 0 for stream in streams):
        engine.step()
    runner.forwards.clear()
    long = engine.submit("long", [6] * 700, SamplingParams(max_tokens=4))
    while long.num_completion_tokens == 0:
        made = engine.step()
        assert {progress.sequence for progress in made} >= set(streams)
        engine.check_integrity()
    num_steps = len(runner.forwards)
    while engine.has_work:
        engine.step()
    assert long.tokens[700:] == naive_ar([6] * 700, 4)
    return runner, num_steps


@pytest.mark.parametrize("max_step_ms", [14.0, 25.0])
def test_a_long_prompt_keeps_the_steps_of_running_streams_within_the_bound(max_step_ms: float) -> None:
    runner, num_steps = crowd_and_a_long_prompt(max_step_ms)
    slowest = [forward.ms for forward in runner.forwards[:num_steps]]
    assert max(slowest) <= max_step_ms
    assert min(slowest[:-1]) > 0.95 * max_step_ms, "the bound is made use of"
    unbounded, few = crowd_and_a_long_prompt(None)
    assert few < num_steps
    assert max(forward.ms for forward in unbounded.forwards[:few]) > 2 * max_step_ms


def test_where_the_streams_alone_take_longer_prompts_go_on_by_little() -> None:
    runner, num_steps = crowd_and_a_long_prompt(1.0)
    assert num_steps == -(-700 // MIN_TOKENS)
    assert {forward.num_tokens for forward in runner.forwards[: num_steps - 1]} == {8 + MIN_TOKENS}


def test_a_prompt_alone_delays_nobody() -> None:
    runner = Costed()
    engine = Engine(runner, EngineConfig(max_step_tokens=512, max_prefill_tokens=16, max_step_ms=1.0))
    engine.set_step_cost(COST)
    engine.submit("long", [6] * 700, SamplingParams(max_tokens=1))
    while engine.has_work:
        engine.step()
    assert [forward.num_tokens for forward in runner.forwards] == [512, 188]


def test_a_prompt_that_was_preempted_did_not_find_anothers_pages() -> None:
    """Its own it finds again, which is no reuse to tell a client of."""
    limits = EngineConfig(max_step_tokens=192, max_prefill_tokens=1, max_running=4)
    engine = Engine(ScriptedRunner(num_pages=130, page_size=4, max_context=512), limits)
    engine.submit("a", [5, 6, 7], SamplingParams(max_tokens=440, ignore_eos=True), DecodingOptions(Mode.AR))
    for _ in range(340):
        engine.step()
    prompt = [9 + place % 40 for place in range(170)]
    late = engine.submit("b", prompt, SamplingParams(max_tokens=3, ignore_eos=True), DecodingOptions(Mode.AR))
    while engine.has_work:
        engine.step()
    assert late.num_preemptions == 1
    assert late.num_reused == 0
