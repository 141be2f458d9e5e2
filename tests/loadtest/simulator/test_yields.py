import math

import numpy
import pytest

from loadtest.simulator.yields import (
    NUM_CHANCES,
    Rounds,
    load_acceptance,
    mean_chance,
    tokens_a_round,
)
from policies.modes import DecodePlan, Mode

PUBLISHED = {8: 5.777, 16: 8.533, 32: 11.359}
"""accepted_by_block_8b in loadtest/data/acceptance.json"""


def test_one_spread_explains_the_published_growth_with_the_block():
    spread = load_acceptance().spread
    mean = mean_chance(PUBLISHED[32], 32, spread)
    for block, tokens in PUBLISHED.items():
        assert tokens_a_round(mean, spread, block) == pytest.approx(tokens, rel=0.02)


def test_every_category_has_its_published_acceptance():
    acceptance = load_acceptance()
    for name, tokens in {"coding": 8.57, "qa": 4.65, "multilingual": 10.06}.items():
        assert tokens_a_round(acceptance.means[name], acceptance.spread, 32) == pytest.approx(
            tokens, rel=1e-6
        )
    assert load_acceptance(scale=0.5).means["qa"] < acceptance.means["qa"]
    assert load_acceptance("14b").diffusion == 2.74


def test_drawn_requests_have_their_categorys_acceptance():
    acceptance = load_acceptance()
    rng = numpy.random.default_rng(1)
    category = numpy.full(40_000, acceptance.categories.index("writing"))
    drawn = acceptance.draw(category, rng)
    rounds = Rounds(DecodePlan(Mode.SELF_SPECULATION, 32), acceptance.diffusion)
    assert numpy.mean([2 * rounds.pace(int(index)) for index in drawn]) == pytest.approx(5.07, rel=0.03)


@pytest.mark.parametrize("chance", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("num_tokens", [3, 20, 150])
@pytest.mark.parametrize("block_length", [4, 16, 32])
def test_forwards_are_those_of_rounds_drawn_one_by_one(chance, num_tokens, block_length):
    rng = numpy.random.default_rng(5)
    counts = []
    for _ in range(3000):
        made = rounds = 0
        while made < num_tokens:
            made += min(int(rng.geometric(1.0 - chance)), block_length)
            rounds += 1
        counts.append(2 * rounds)
    model = Rounds(DecodePlan(Mode.SELF_SPECULATION, block_length), 2.5)
    index = int(chance * NUM_CHANCES)
    drawn = [model.forwards(index, num_tokens, luck) for luck in rng.standard_normal(3000)]
    assert numpy.mean(drawn) == pytest.approx(numpy.mean(counts), rel=0.08, abs=0.25)
    assert min(drawn) >= 2 * math.ceil(num_tokens / block_length)
    if num_tokens == 150:
        assert numpy.mean(drawn) == pytest.approx(numpy.mean(counts), rel=0.02)
        assert numpy.std(drawn) == pytest.approx(numpy.std(counts), rel=0.15)


def test_ar_is_a_forward_a_token_and_diffusion_as_published():
    assert Rounds(DecodePlan(Mode.AR), 2.57).forwards(100, 77.0, 1.3) == 77.0
    diffusion = Rounds(DecodePlan(Mode.DIFFUSION, 32), 2.57)
    assert diffusion.forwards(100, 257.0, 0.0) == pytest.approx(100.0)
    assert diffusion.pace(100) == 2.57


def test_the_logits_a_plan_wants():
    """A draft 7 and a verify 8 of 8; of 32 positions that are fixed bit by bit half are masked on average."""
    wanted = [
        Rounds(DecodePlan(mode, block), 2.5).wanted for mode, block in ((Mode.AR, 1), (Mode.DIFFUSION, 32))
    ]
    assert wanted == [1.0, 16.0]
    assert Rounds(DecodePlan(Mode.SELF_SPECULATION, 8), 2.5).wanted == 7.5
