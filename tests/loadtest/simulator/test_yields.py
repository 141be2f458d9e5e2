import math

import numpy
import pytest

from loadtest.simulator.yields import NUM_CHANCES, Rounds, load_acceptance, mean_chance, tokens_a_round
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
    chances = (drawn + 0.5) / NUM_CHANCES
    assert numpy.mean((1 - chances**32) / (1 - chances)) == pytest.approx(5.07, rel=0.03)
    index = numpy.arange(NUM_CHANCES)
    assert acceptance.weights(acceptance.means["writing"]) @ index == pytest.approx(drawn.mean(), rel=0.01)


def rounds_one_by_one(rng, chance, num_tokens, block_length):
    """The tokens, the forwards and the rows until num_tokens are there, the first round having a draft."""
    made = forwards = rows = 0
    has_draft = True
    while made < num_tokens:
        verified = min(int(rng.geometric(1.0 - chance)), block_length) if has_draft else 1
        rows += (block_length if has_draft else 1) + block_length
        has_draft = not has_draft or verified == block_length
        made += verified
        forwards += 1
    return made, forwards, rows


@pytest.mark.parametrize("chance", [0.3, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("num_tokens", [3, 20, 150])
@pytest.mark.parametrize("block_length", [4, 16, 32])
def test_forwards_are_those_of_rounds_drawn_one_by_one(chance, num_tokens, block_length):
    rng = numpy.random.default_rng(5)
    index = int(chance * NUM_CHANCES)
    own = (index + 0.5) / NUM_CHANCES
    counts = [rounds_one_by_one(rng, own, num_tokens, block_length)[1] for _ in range(3000)]
    model = Rounds(DecodePlan(Mode.SELF_SPECULATION, block_length), 2.5)
    drawn = [model.forwards(index, num_tokens, luck) for luck in rng.standard_normal(3000)]
    assert numpy.mean(drawn) == pytest.approx(numpy.mean(counts), rel=0.08, abs=0.25)
    assert min(drawn) >= math.ceil(num_tokens / block_length)
    if num_tokens == 150:
        assert numpy.mean(drawn) == pytest.approx(numpy.mean(counts), rel=0.02)
        assert numpy.std(drawn) == pytest.approx(numpy.std(counts), rel=0.15, abs=0.3)


@pytest.mark.parametrize("chance", [0.5, 0.9, 0.99])
def test_tokens_and_rows_of_a_forward_are_those_of_many_rounds(chance):
    model, index = Rounds(DecodePlan(Mode.SELF_SPECULATION, 8), 2.5), int(chance * NUM_CHANCES)
    made, forwards, rows = rounds_one_by_one(
        numpy.random.default_rng(2), (index + 0.5) / NUM_CHANCES, 100_000, 8
    )
    assert model.paces[index] == pytest.approx(made / forwards, rel=0.02)
    assert model.rows[index] == pytest.approx(rows / forwards, rel=0.02)


def test_ar_is_a_forward_a_token():
    assert Rounds(DecodePlan(Mode.AR), 2.57).forwards(100, 77.0, 1.3) == 77.0
    assert Rounds(DecodePlan(Mode.AR), 2.57).rows[100] == 1.0


def test_a_block_of_diffusion_takes_the_published_forwards_less_the_one_that_begins_the_next():
    """32 tokens in 32 / 2.57 forwards as published, each of 32 rows: a forward less, with the same rows."""
    rounds, forwards = Rounds(DecodePlan(Mode.DIFFUSION, 32), 2.57), 32 / 2.57 - 1
    assert rounds.paces[100] == pytest.approx(32 / forwards)
    assert rounds.rows[100] * forwards == pytest.approx(32 * 32 / 2.57)
    assert rounds.forwards(100, 320.0, 0.0) == pytest.approx(10 * forwards)


def test_requests_count_by_their_share_of_those_that_run():
    rounds, running = Rounds(DecodePlan(Mode.SELF_SPECULATION, 8), 2.5), numpy.zeros(NUM_CHANCES)
    running[[500, 1900]] = 3.0, 1.0
    mean = rounds.mean_of(running)
    assert mean.tokens_per_forward == pytest.approx((3 * rounds.paces[500] + rounds.paces[1900]) / 4)
    assert mean.rows_per_forward == pytest.approx((3 * rounds.rows[500] + rounds.rows[1900]) / 4)


def test_the_logits_a_plan_wants():
    """Of a verify of 8 and 8 masks behind all but the seed's; of 32 positions that are fixed bit by bit half
    are masked on average."""
    assert Rounds(DecodePlan(Mode.AR), 2.5).wanted(1.0) == 1.0
    assert Rounds(DecodePlan(Mode.DIFFUSION, 32), 2.5).wanted(35.0) == 16.0
    assert Rounds(DecodePlan(Mode.SELF_SPECULATION, 8), 2.5).wanted(16.0) == 15.0
