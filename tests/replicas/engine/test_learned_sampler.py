"""The learned sampler against its definition, and what holds of every one."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.modes import MAX_BLOCK_LENGTH, MAX_RISK
from replicas.engine.decoders.learned_sampler import LearnedSampler, Weights, num_within
from tests.naive_sampler import SAMPLER, places_fixed, trust_in
from tests.thorough import examples

some = st.floats(-3.0, 3.0)
samplers = st.builds(
    LearnedSampler,
    st.builds(Weights, some, st.floats(0.0, 2.0), st.floats(-2.0, 0.0), some, some, some),
    st.just(0.02),
)
probabilities = st.sampled_from([0.0, 1e-9, 0.5, 1.0 - 1e-9, 1.0]) | st.floats(0.0, 1.0)


@st.composite
def denoisings(draw: st.DrawFn) -> tuple[int, dict[int, float], bool]:
    """A block's length, the probabilities of the guesses at some of its places, if its seed was hidden."""
    length = draw(st.integers(2, MAX_BLOCK_LENGTH))
    places = draw(st.sets(st.integers(1, length - 1), min_size=1))
    return length, {place: draw(probabilities) for place in sorted(places)}, draw(st.booleans())


@given(samplers, denoisings())
@examples(300)
def test_trust_is_as_defined(sampler, denoising):
    length, probs, is_seed_hidden = denoising
    odds = sampler.log_odds(length, tuple(probs), tuple(probs.values()), is_seed_hidden)
    trust = trust_in(sampler, *denoising)
    assert [1.0 / (1.0 + math.exp(-value)) for value in odds] == pytest.approx([*trust.values()], abs=1e-9)


@given(samplers, denoisings(), st.floats(0.0, 1.0), st.integers(0))
@examples(300)
def test_where_the_model_is_surer_of_one_none_is_trusted_less(sampler, denoising, share, which):
    length, probs, is_seed_hidden = denoising
    before = sampler.log_odds(length, tuple(probs), tuple(probs.values()), is_seed_hidden)
    place = [*probs][which % len(probs)]
    probs[place] += share * (1.0 - probs[place])
    after = sampler.log_odds(length, tuple(probs), tuple(probs.values()), is_seed_hidden)
    assert all(new >= old - 1e-9 for old, new in zip(before, after, strict=True))


@given(st.lists(st.floats(-40.0, 40.0)), st.floats(1e-6, MAX_RISK), st.floats(1.0, 9.0))
@examples(300)
def test_as_many_are_fixed_as_leave_the_wrong_ones_expected_within_the_risk(odds, risk, more):
    ranked = sorted(odds, reverse=True)
    doubts = [1.0 / (1.0 + math.exp(value)) for value in ranked]
    count = num_within(risk, ranked)
    assert sum(doubts[:count]) <= risk * (1.0 + 1e-9)
    assert count == len(ranked) or sum(doubts[: count + 1]) > risk * (1.0 - 1e-9)
    assert num_within(min(MAX_RISK, risk * more), ranked) >= count
    assert num_within(MAX_RISK, ranked[: MAX_BLOCK_LENGTH - 1]) == min(len(ranked), MAX_BLOCK_LENGTH - 1)


def test_no_guess_at_all():
    assert SAMPLER.log_odds(8, (), (), True) == []
    assert num_within(0.1, []) == 0
    assert places_fixed(SAMPLER, 0.1, 8, {}, True) == []
