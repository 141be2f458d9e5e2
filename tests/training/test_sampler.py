"""What is noted of guesses, and what is made of it."""

import math

import numpy as np
import pytest

from policies.modes import DecodePlan, Mode
from replicas.config import EngineConfig
from replicas.engine.decoders.learned_sampler import Weights
from replicas.engine.engine import Engine
from replicas.messages import DecodingOptions, SamplingParams
from tests.naive_sampler import SAMPLER, trust_in
from tests.replicas.engine.scripted import ScriptedRunner, denoise, naive_ar
from training.sampler import Guesses, Sampling, facts, fit, fit_sampler

PROMPTS = [[5 + number, 6, 7] for number in range(6)]


def test_the_facts_are_those_that_a_sampler_weighs():
    probs = {1: 0.9, 2: 0.0, 5: 1.0, 6: 0.4}
    for is_seed_hidden in (False, True):
        found = facts(8, tuple(probs), tuple(probs.values()), is_seed_hidden)
        weights = [getattr(SAMPLER.weights, name) for name in Weights.__dataclass_fields__]
        trust = trust_in(SAMPLER, 8, probs, is_seed_hidden)
        assert 1.0 / (1.0 + np.exp(-found @ weights)) == pytest.approx([*trust.values()])


def decode(runner, plan: DecodePlan) -> list[list[int]]:
    engine = Engine(runner, EngineConfig())
    block_length = None if plan.mode is Mode.AR else plan.block_length
    options = DecodingOptions(plan.mode, block_length, plan.threshold, factor=plan.factor, risk=plan.risk)
    made = [engine.submit(str(n), p, SamplingParams(max_tokens=30), options) for n, p in enumerate(PROMPTS)]
    while engine.has_work:
        engine.step()
    return [sequence.tokens[len(prompt) :] for sequence, prompt in zip(made, PROMPTS, strict=True)]


def test_guesses_are_noted_while_a_text_is_ars_and_whether_they_are_right():
    """By the book: the first denoising of each prompt's first block, in which every guess is noted."""
    runner = ScriptedRunner(num_pages=400)
    finals = [naive_ar(prompt, 30) for prompt in PROMPTS]
    guesses = Guesses(runner, finals)
    engine = Engine(guesses, EngineConfig())
    options = DecodingOptions(Mode.DIFFUSION, 8, factor=0.1)
    for number, prompt in enumerate(PROMPTS):
        engine.submit(str(number), prompt, SamplingParams(max_tokens=30), options)
    engine.step()
    rows = []
    for prompt, final in zip(PROMPTS, finals, strict=True):
        guess = denoise(tuple(prompt), (1,) * 8, adapter=False)
        probs = {place: guess[place][1] for place in range(1, 8)}
        told = facts(8, tuple(probs), tuple(probs.values()), True)
        rows += [
            (*told[place - 1], guess[place][0] == final[place]) for place in range(1, min(8, len(final)))
        ]
    noted = [(*row, right) for row, right in zip(np.concatenate(guesses.facts), guesses.right, strict=True)]
    assert len(rows) > 20
    assert np.array(noted, dtype=float) == pytest.approx(np.array(rows, dtype=float))


def test_what_strays_is_noted_no_more():
    """Whatever a denoising fixes here is soon not `ar`'s."""
    finals = [naive_ar(prompt, 30) for prompt in PROMPTS]
    guesses = Guesses(ScriptedRunner(num_pages=400), finals)
    texts = decode(guesses, DecodePlan(Mode.DIFFUSION, 8, threshold=0.01))
    assert texts != finals
    careful = Guesses(ScriptedRunner(num_pages=400), texts)
    assert decode(careful, DecodePlan(Mode.DIFFUSION, 8, threshold=0.01)) == texts
    assert len(guesses.right) < len(careful.right)


def test_a_runner_is_given_the_sampler_and_gone_by_it():
    plan = DecodePlan(Mode.DIFFUSION, 8, risk=0.7)
    with_sampler = decode(ScriptedRunner(num_pages=400), plan)
    assert decode(Sampling(ScriptedRunner(num_pages=400, sampler=None), SAMPLER), plan) == with_sampler


def test_a_fit_finds_the_odds_that_made_what_it_saw():
    inputs = np.repeat([[1.0, 0.0], [1.0, 1.0]], 1000, axis=0)
    right = np.concatenate([np.arange(1000) < 1000 * share for share in (0.2, 0.9)]).astype(float)
    found = 1.0 / (1.0 + np.exp(-fit(inputs, right).cumsum()))
    assert found == pytest.approx([0.2, 0.9], abs=1e-3)


def guessed(rng: np.random.Generator, honest: bool) -> tuple[np.ndarray, np.ndarray]:
    """Guesses that are right as often as their probability says, or the less often the surer."""
    rows, right = [], []
    for _ in range(1500):
        probs = rng.uniform(0.02, 0.98, size=7)
        rows.append(facts(8, range(1, 8), probs, bool(rng.integers(2))))
        right += [*(rng.random(7) < (probs if honest else 1.0 - probs))]
    return np.concatenate(rows), np.array(right, dtype=float)


def test_the_sampler_of_calibrated_guesses_trusts_them_as_far_as_the_model_does():
    sampler = fit_sampler(*guessed(np.random.default_rng(0), honest=True), risk=0.3)
    assert sampler.risk == 0.3
    assert sampler.weights.doubts <= 0.0
    [low, high] = sampler.log_odds(8, (1, 6), (0.2, 0.9), False)
    assert (low, high) == pytest.approx((math.log(0.25), math.log(9.0)), abs=0.4)


def test_guesses_that_are_wrong_where_they_are_sure_make_no_sampler():
    with pytest.raises(ValueError, match="don't tell which are right"):
        fit_sampler(*guessed(np.random.default_rng(0), honest=False), risk=0.3)
