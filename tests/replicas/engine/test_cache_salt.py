"""What one tenant has asked costs another's prompt as much as if nobody had."""

import random

import pytest

from replicas.engine.blocks import PagePool
from replicas.engine.engine import Engine
from replicas.messages import SamplingParams
from tests.replicas.engine.scripted import ScriptedRunner, expected
from tests.replicas.engine.test_engine import PINNED, drain

PROMPT = [7 + k % 5 for k in range(41)]
FEW = SamplingParams(max_tokens=4)


def test_a_prompt_is_reused_under_its_own_salt_alone() -> None:
    engine = Engine(ScriptedRunner())
    reused = []
    for number, salt in enumerate(["", "one", "two", "one", "", "two", "0", "1"]):
        sequence = engine.submit(str(number), PROMPT, FEW, cache_salt=salt)
        drain(engine)
        engine.check_integrity()
        reused.append(sequence.num_reused)
    assert reused == [0, 0, 0, 40, 40, 40, 0, 0]


def test_a_salt_is_never_taken_for_a_page() -> None:
    """The keys of prefixes are numbers, and a salt may be any text."""
    pool = PagePool(8, 1)
    pages = pool.allocate(2)
    assert pages is not None
    number = pool.keep(pages[0], "a", (5,))
    pool.keep(pages[1], number, (6,))
    for salt in ("", str(number), repr(number), "b"):
        assert pool.find([6], salt)[0] == []
        assert pool.find([5, 6], salt)[0] == []
    assert pool.find([5, 6], "a")[0] == pages


def test_prompts_that_begin_alike_wait_for_no_other_tenants() -> None:
    runner = ScriptedRunner()
    engine = Engine(runner)
    sequences = [engine.submit(str(k), PROMPT, FEW, cache_salt=str(k % 2)) for k in range(6)]
    engine.step()
    assert runner.most_tokens == 2 * 41, "one of each tenant's"
    drain(engine)
    assert [sequence.num_reused for sequence in sequences] == [0, 0, 40, 40, 40, 40]


@pytest.mark.parametrize("seed", range(10))
def test_tenants_that_share_a_small_pool_get_what_each_gets_alone(seed: int) -> None:
    """Preempted, evicted and beside each other's equal prompts."""
    rng = random.Random(seed)
    engine = Engine(ScriptedRunner(num_pages=30))
    asked = []
    for number in range(12):
        kind = rng.choice(list(PINNED))
        prompt, max_tokens = PROMPT[: rng.randint(1, 41)], rng.randint(1, 30)
        salt = rng.choice("ab")
        sampling = SamplingParams(max_tokens=max_tokens)
        sequence = engine.submit(str(number), prompt, sampling, PINNED[kind], cache_salt=salt)
        asked.append((sequence, expected(kind, prompt, max_tokens, engine.spec.max_context)))
        if rng.random() < 0.5:
            engine.step()
            engine.check_integrity()
    drain(engine)
    for sequence, whole in asked:
        assert sequence.tokens[sequence.num_prompt_tokens :] == whole
