"""What running completions still come to: foretold over simulated traffic, where the truth is known."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from policies.cost import UNMEASURED, ReplicaCosts, RoundYield
from policies.forecast import forecast
from policies.modes import DecodePlan, Mode
from replicas.engine.engine import Engine
from replicas.engine.lengths import CompletionLengths
from replicas.messages import DecodingOptions, SamplingParams
from tests.replicas.engine.scripted import ScriptedRunner

Draw = Callable[[random.Random], int]

ENDLESS = 10**6
KINDS: dict[str, tuple[Draw, Draw]] = {
    "as if by a coin": (lambda rng: 1 + int(rng.expovariate(0.01)), lambda rng: 2000),
    "all alike": (lambda rng: 100, lambda rng: 2000),
    "any length to 200": (lambda rng: rng.randint(1, 200), lambda rng: 2000),
    "many short, few long": (lambda rng: rng.choice((10, 10, 10, 400)), lambda rng: 2000),
    "lognormal": (lambda rng: 1 + int(rng.lognormvariate(4, 1)), lambda rng: 2000),
    "all cut": (lambda rng: ENDLESS, lambda rng: 128),
    "cut at many lengths": (lambda rng: ENDLESS, lambda rng: rng.choice((16, 64, 512))),
    "half cut short": (lambda rng: 1 + int(rng.expovariate(0.01)), lambda rng: rng.choice((16, 2000))),
    "often cut": (lambda rng: 1 + int(rng.expovariate(0.01)), lambda rng: 128),
}


def foretold_and_true(draw: Draw, draw_most: Draw, seed: int, num_at_once: int = 32) -> tuple[float, float]:
    """The mean over time, a token of each running text a step, texts arriving at random."""
    rng = random.Random(seed)
    lengths = CompletionLengths()
    usual = sum(min(draw(rng), draw_most(rng)) for _ in range(2000)) / 2000
    running: list[tuple[int, int, int]] = []  # so far, in the end, at most
    foretold = true = 0.0
    for step in range(4000):
        for _ in range(4):
            if rng.random() < num_at_once / usual / 4:
                most = draw_most(rng)
                running.append((0, min(draw(rng), most), most))
        running = [(so_far + 1, end, most) for so_far, end, most in running]
        for so_far, end, most in running:
            if so_far == end:
                lengths.note(end, end < most)
        running = [text for text in running if text[0] < text[1]]
        if step > 1000 and step % 7 == 0 and running:
            foretold += sum(lengths.remaining(so_far, most - so_far) for so_far, _, most in running)
            true += sum(end - so_far for so_far, end, _ in running)
    return foretold, true


@pytest.mark.parametrize("kind", KINDS)
def test_the_forecast_is_not_biased(kind: str) -> None:
    """The mean length, as it was once foretold by, is twice the truth for texts that are all alike, and a
    third of it where few are long."""
    sums = [foretold_and_true(*KINDS[kind], seed) for seed in range(3)]
    foretold, true = (sum(part) for part in zip(*sums, strict=True))
    assert foretold == pytest.approx(true, rel=0.2)


def test_before_any_text_has_ended_each_is_expected_to_go_to_its_bound() -> None:
    lengths = CompletionLengths()
    assert lengths.remaining(0, 500) == 500.0
    lengths.note(64, is_whole=False)
    assert lengths.remaining(0, 500) == 500.0
    assert lengths.remaining(500, 7) == pytest.approx(7.0)


def test_more_is_never_foretold_than_may_come_nor_less_than_nothing() -> None:
    rng = random.Random(5)
    lengths = CompletionLengths()
    for _ in range(5000):
        lengths.note(rng.choice((1, 1, 2, 50, 51, 4000, 1 << 20)), rng.random() < 0.9)
        so_far, most = rng.choice((0, 1, 49, 50, 3999, 1 << 21)), rng.choice((1, 2, 60, 1 << 20))
        assert 0.0 < lengths.remaining(so_far, most) <= most


def test_old_lengths_are_forgotten() -> None:
    lengths = CompletionLengths()
    for length in (1000, 10):
        for _ in range(400):
            lengths.note(length, is_whole=True)
        assert lengths.remaining(1, 4000) == pytest.approx(length, rel=0.25)


def test_an_engines_load_tells_of_it() -> None:
    """Of texts that end by themselves too."""
    now_s = 0.0
    engine = Engine(ScriptedRunner(num_pages=400, max_context=900), clock=lambda: now_s)
    for number in range(60):
        sampling = SamplingParams(max_tokens=800)
        sequence = engine.submit(
            str(number), [5 + number % 50, 60 + number], sampling, DecodingOptions(Mode.AR)
        )
        while engine.has_work:
            now_s += 1.0
            engine.step()
    load = engine.snapshot("r")
    assert load.mean_remaining is None
    engine.submit("r", [5, 6], SamplingParams(max_tokens=800, ignore_eos=True), DecodingOptions(Mode.AR))
    engine.step()
    remaining = engine.snapshot("r").mean_remaining
    assert remaining is not None
    assert 20 < remaining < 80  # an end of text comes once in forty
    assert sequence.num_completion_tokens < 800


def test_the_mean_is_of_whole_and_cut_completions_and_follows_them() -> None:
    lengths = CompletionLengths()
    assert lengths.mean is None
    lengths.note(10, is_whole=True)
    lengths.note(30, is_whole=False)
    assert lengths.mean == pytest.approx(20.0, rel=0.02)
    for _ in range(3000):
        lengths.note(100, is_whole=True)
    assert lengths.mean == pytest.approx(100.0)


@pytest.mark.parametrize("num_clients", [1, 2])
@pytest.mark.parametrize("max_tokens", [12, 96])
def test_forecasts_stay_where_they_are_while_completions_near_their_ends(
    num_clients: int, max_tokens: int
) -> None:
    """Clients that ask again at once, and look at every step: nothing changes but where their texts are."""
    plan = DecodePlan(Mode.DIFFUSION, 32)
    costs = ReplicaCosts(UNMEASURED, (RoundYield(plan, 32.0, 4.0, 50.0),))
    now_s = 0.0
    engine = Engine(ScriptedRunner(num_pages=400, max_context=900), clock=lambda: now_s)
    sampling, foretold, remaining = SamplingParams(max_tokens=max_tokens, ignore_eos=True), [], []
    for number in range(20 * num_clients):
        engine.submit(str(number), [5, 60 + number], sampling, DecodingOptions(Mode.DIFFUSION, 32))
        while len(engine.scheduler.running) + len(engine.scheduler.waiting) >= num_clients:
            now_s += 1.0
            engine.step()
            if number > 10 * num_clients and (load := engine.snapshot("r")).num_running == num_clients:
                load = replace(load, costs=costs, num_auto=num_clients, pinned_by_mode={}, mean_context=50.0)
                foretold.append(forecast(load, plan).tokens_per_s)
                remaining.append(load.mean_remaining)
    assert len(foretold) > 10
    assert len(set(remaining)) > 1
    assert max(foretold) == pytest.approx(min(foretold))
    num_forwards = 1 + (max_tokens - 1) / (min(32, max_tokens - 1) / 4)  # the prompt's, and those of rounds
    assert foretold[0] == pytest.approx(
        1000 * num_clients * max_tokens / num_forwards / UNMEASURED.ms(32 * num_clients)
    )
