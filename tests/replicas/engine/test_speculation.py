"""Sizes of drafts and of what is verified: against brute force; nothing but speed depends on them."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.cost import StepCost
from policies.modes import DecodePlan, Mode
from replicas.engine.engine import Engine
from replicas.engine.speculation import NUM_TRIED, Acceptance, Calibration, Speculation, Traffic
from replicas.messages import DecodingOptions, SamplingParams
from tests.replicas.engine.scripted import ScriptedRunner, naive_ar

FLAT = StepCost((1, 512), (10.0, 10.001))
"""Tokens are free, as where memory bounds a forward."""
STEEP = StepCost((1, 512), (0.1, 51.2))
"""Every token costs the same, as where arithmetic does."""


def traffic(num_speculating: int = 1, num_other_tokens: int = 0) -> Traffic:
    return Traffic(num_speculating, num_other_tokens, num_speculating + num_other_tokens, 0)


@given(seed=st.integers(0, 10**9))
@settings(max_examples=100, deadline=None)
def test_the_slots_chosen_are_the_best_that_brute_force_finds(seed: int) -> None:
    rng = random.Random(seed)
    knot_ms = sorted(rng.uniform(1, 20) for _ in range(4))
    speculation = Speculation(cost=StepCost((1, 4, 16, 64), tuple(knot_ms)))
    drafts = [sorted((rng.random() for _ in range(rng.randint(1, 5))), reverse=True) for _ in range(4)]
    beside = traffic(len(drafts), rng.randint(0, 5))
    num_slots = sum(map(len, drafts))
    assert num_slots <= NUM_TRIED  # so that every number of slots is tried
    most = rng.randint(0, num_slots)
    kept = speculation.num_slots(drafts, most, beside)
    assert sum(kept) <= most

    def rate(counts: tuple[int, ...]) -> float:
        base = beside.num_speculating + beside.num_other_tokens
        expected = len(drafts) + sum(sum(draft[:count]) for draft, count in zip(drafts, counts, strict=True))
        ms = speculation.cost.ms(base + num_slots) + speculation.cost.ms(base + sum(counts))
        return expected / ms

    all_counts: list[tuple[int, ...]] = [()]
    for draft in drafts:
        all_counts = [(*counts, count) for counts in all_counts for count in range(len(draft) + 1)]
    best = max(rate(counts) for counts in all_counts if sum(counts) <= most)
    assert rate(tuple(kept)) == pytest.approx(best)


def test_many_slots_are_cut_to_the_budget_and_never_out_of_order() -> None:
    drafts = [[0.9**j for j in range(1, 32)] for _ in range(32)]
    kept = Speculation(cost=FLAT).num_slots(drafts, 100, traffic(32))
    assert sum(kept) == 100
    assert max(kept) - min(kept) <= 1  # they are equally likely


def test_free_tokens_are_all_verified_and_dear_ones_where_they_survive() -> None:
    drafts = [[0.99, 0.98], [0.5, 0.01]]
    assert Speculation(cost=FLAT).num_slots(drafts, 9, traffic(2)) == [2, 2]
    assert Speculation(cost=STEEP).num_slots(drafts, 9, traffic(2)) == [2, 1]
    assert Speculation(is_adaptive=False).num_slots(drafts, 0, traffic(2)) == [2, 2]


def test_blocks_grow_with_acceptance_and_shrink_with_what_tokens_cost() -> None:
    def length(num_accepted: int, num_refused: int, cost: StepCost, num_sequences: int = 1) -> int:
        own = Acceptance(num_accepted, num_refused)
        return Speculation(cost=cost).block_length(own, 32, traffic(num_sequences))

    assert length(100, 0, FLAT) == 32
    assert length(0, 100, FLAT) == 1
    lengths = [length(num, 10, FLAT) for num in (2, 10, 40, 200, 2000)]
    assert all(shorter <= longer for shorter, longer in pairwise(lengths))
    assert length(100, 10, FLAT) > length(100, 10, STEEP)
    bent = StepCost((1, 64, 512), (10.0, 11.0, 80.0))
    assert length(60, 10, bent, 1) > length(60, 10, bent, 32)
    assert Speculation(is_adaptive=False, cost=STEEP).block_length(Acceptance(0, 100), 32, traffic()) == 32


def test_blocks_are_shorter_where_texts_end_soon() -> None:
    """What is accepted past an end of text brings nothing."""
    lengths = []
    for text_len in (5, 20, 1000):
        speculation = Speculation(cost=StepCost((1, 512), (2.0, 104.0)))
        for _ in range(4000):
            speculation.note_text(text_len, has_ended=True)
        lengths.append(speculation.block_length(Acceptance(500.0, 0.0), 32, traffic()))
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == 32


def test_the_engine_notes_how_texts_end() -> None:
    engine = Engine(ScriptedRunner(num_pages=200), adaptive_speculation=True)
    sequences = [
        engine.submit(f"r{k}", [5 + k, 9], SamplingParams(max_tokens=30), DecodingOptions(lossless=True))
        for k in range(8)
    ]
    while engine.has_work:
        engine.step()
    ended = sum(sequence.num_completion_tokens < 30 for sequence in sequences)
    texts = engine.scheduler.speculation.texts
    assert ended > 0
    assert 0.5 * ended < texts.refused <= ended
    assert texts.accepted <= sum(sequence.num_completion_tokens for sequence in sequences)


@pytest.mark.parametrize("cost", [FLAT, STEEP])
def test_a_round_cut_short_says_so(cost: StepCost) -> None:
    """Of what it left out nothing is known, so a yield must not count it as refused."""
    engine = Engine(ScriptedRunner(num_pages=200), adaptive_speculation=True)
    engine.set_step_cost(cost)
    engine.set_plan(DecodePlan(Mode.SELF_SPECULATION, 32), "test")
    for k in range(8):
        engine.submit(f"r{k}", [5 + k, 9], SamplingParams(max_tokens=90, ignore_eos=True))
    while engine.has_work:
        engine.step()
    rounds = list(engine.scheduler.rounds)
    assert all(2 <= made.plan.block_length <= 32 for made in rounds)
    assert all(1 <= made.tokens <= made.plan.block_length for made in rounds)
    if cost is FLAT:
        assert any(made.plan.block_length < 32 for made in rounds)
    else:  # drafts don't pay, and single tokens are no rounds of speculation
        assert sum(made.tokens for made in rounds) < 8 * 89 / 4


def test_what_was_given_up_is_tried_again() -> None:
    speculation, own = Speculation(cost=FLAT), Acceptance(0.0, 50.0)
    num_waited = 0
    while speculation.block_length(own, 16, traffic()) == 1:
        num_waited += 1
        assert num_waited < 100
    assert num_waited > 3


def test_confidences_are_calibrated_to_what_agrees() -> None:
    rng = random.Random(1)
    calibration = Calibration()
    for _ in range(6000):
        confidence = rng.random()
        calibration.observe(confidence, rng.random() < confidence**3)  # overconfident
    for confidence in (0.2, 0.5, 0.8, 0.95):
        assert calibration.chance(confidence) == pytest.approx(confidence**3, abs=0.12)
    assert 0.0 < calibration.chance(0.0) < calibration.chance(1.0) < 1.0


def test_acceptance_counts_censored_runs() -> None:
    own = Acceptance()
    for num_accepted in (3, 3, 3, 0):
        own.add(num_accepted, was_refused=num_accepted == 0, forget=1.0)
    assert own.chance(prior=0.5, weight=0.0) == 0.9


@pytest.mark.parametrize("cost", [FLAT, STEEP])
def test_only_the_number_of_forwards_and_tokens_depends_on_it(cost: StepCost) -> None:
    rng = random.Random(3)
    prompts = {f"r{k}": [rng.randint(3, 60) for _ in range(rng.randint(1, 20))] for k in range(12)}
    num_tokens = {}
    for is_adaptive in (True, False):
        runner = ScriptedRunner(num_pages=200)
        engine = Engine(runner, max_running=8, adaptive_speculation=is_adaptive)
        engine.set_step_cost(cost)
        engine.set_plan(DecodePlan(Mode.SELF_SPECULATION, 16), "test")
        made: dict[str, list[int]] = {name: [] for name in prompts}
        for name, prompt in prompts.items():
            options = (
                DecodingOptions(lossless=True) if name != "r3" else DecodingOptions(Mode.SELF_SPECULATION, 9)
            )
            engine.submit(name, prompt, SamplingParams(max_tokens=60), options)
        total = 0
        while engine.has_work:
            runner.most_tokens = 0
            for progress in engine.step():
                made[progress.sequence.request_id] += progress.token_ids
            total += runner.most_tokens
            engine.check_integrity()
        assert made == {name: naive_ar(prompt, 60) for name, prompt in prompts.items()}
        num_tokens[is_adaptive] = total
    if cost is STEEP:
        assert num_tokens[True] < num_tokens[False]
