"""The oracles against brute force over a model whose guesses turn wrong, or right, as others are fixed."""

from functools import cache
from itertools import combinations

import pytest

from policies.modes import DecodePlan, Mode
from replicas.config import EngineConfig
from replicas.engine.batch import Runner
from replicas.engine.engine import Engine
from replicas.engine.sequence import Sequence
from replicas.messages import DecodingOptions, SamplingParams
from tests.replicas.engine.scripted import MASK, ScriptedRunner, denoise, naive_ar
from training.speed_of_light import (
    BLOCK_LENGTHS,
    ORACLE,
    SPECULATING_ORACLE,
    WAYS,
    Oracle,
    Reached,
    measure,
    plot,
    table,
)

MAX_TOKENS = 30
PROMPTS = [[3 + number, 7, 50 - number, 11] for number in range(40)]
FINALS = [tuple(naive_ar(prompt, MAX_TOKENS)) for prompt in PROMPTS]


class Answer:
    def __init__(self, sequence: Sequence):
        self.tokens = tuple(sequence.tokens[sequence.num_prompt_tokens :])
        self.num_forwards = sequence.num_forwards


def decode(runner: Runner, plan: DecodePlan) -> list[Answer]:
    engine = Engine(runner, EngineConfig(max_running=4, max_waiting=len(PROMPTS)))
    block_length = None if plan.mode is Mode.AR else plan.block_length
    options = DecodingOptions(plan.mode, block_length, plan.threshold, factor=plan.factor, risk=plan.risk)
    sampling = SamplingParams(max_tokens=MAX_TOKENS)
    sequences = [engine.submit(str(n), prompt, sampling, options) for n, prompt in enumerate(PROMPTS)]
    while engine.has_work:
        engine.step()
    return [Answer(sequence) for sequence in sequences]


class Block:
    """One block of an answer, by the scripted model itself."""

    def __init__(self, number: int, first: int, length: int):
        self._prefix = (*PROMPTS[number], *FINALS[number][:first])
        self._final = FINALS[number][first : first + length]
        self._length = length

    def right(self, fixed: frozenset[int], is_first: bool) -> frozenset[int]:
        """The places that a denoising may fix; the first one that is left where it is right nowhere."""
        seen = [self._final[0], *[MASK] * (self._length - 1)]
        for place in fixed:
            seen[place] = self._final[place]
        if is_first:
            seen[0] = MASK
        guess = denoise(self._prefix, tuple(seen), adapter=False)
        left = [place for place in range(1, len(self._final)) if place not in fixed]
        found = [place for place in left if guess[place][0] == self._final[place]]
        return frozenset(found or left[:1])

    def greedy(self) -> int:
        """The denoisings of who always fixes all that is right."""
        fixed: frozenset[int] = frozenset()
        count = 0
        while len(fixed) < len(self._final) - 1:
            fixed |= self.right(fixed, is_first=count == 0)
            count += 1
        return count

    def fewest(self) -> int:
        """The fewest denoisings, over every choice of what to fix."""

        @cache
        def left(fixed: frozenset[int], is_first: bool) -> int:
            if len(fixed) == len(self._final) - 1:
                return 0
            right = self.right(fixed, is_first)
            choices = (c for size in range(1, len(right) + 1) for c in combinations(sorted(right), size))
            return 1 + min(left(fixed | frozenset(choice), False) for choice in choices)

        return left(frozenset(), True)


def blocks(number: int, length: int) -> list[Block]:
    return [Block(number, first, length) for first in range(0, len(FINALS[number]), length)]


def num_forwards(denoisings: list[int]) -> int:
    """Each block's first denoising is done in the forward before, which commits all blocks but the last."""
    return len(denoisings) - 1 + sum(max(0, count - 1) for count in denoisings)


@pytest.mark.parametrize("length", [2, 5, 7])
def test_the_oracle_of_diffusion_says_what_ar_says_in_the_forwards_of_who_fixes_all_that_is_right(length):
    oracle = Oracle(ScriptedRunner(), FINALS)
    answers = decode(oracle, WAYS[ORACLE](length))
    assert [answer.tokens for answer in answers] == FINALS
    for number, answer in enumerate(answers):
        assert answer.num_forwards == num_forwards([block.greedy() for block in blocks(number, length)])
    assert oracle.num_told > 0


def test_no_choice_passes_the_bound_and_the_oracle_is_the_optimum_of_up_to_two_denoisings():
    length = 7
    both = [
        (block.greedy(), block.fewest()) for number in range(len(PROMPTS)) for block in blocks(number, length)
    ]
    assert all(fewest == greedy for greedy, fewest in both if greedy <= 2)
    assert all(2 <= fewest <= greedy for greedy, fewest in both if greedy > 2)
    assert any(fewest < greedy for greedy, fewest in both), "the model is to be one that greed fails on"
    [row] = [row for row in measure(ScriptedRunner(), decode, (length,)) if row.way == ORACLE]
    at_best = sum(num_forwards([block.fewest() for block in blocks(n, length)]) for n in range(len(PROMPTS)))
    num_tokens = sum(len(final) - 1 for final in FINALS)
    assert row.at_most is not None
    assert row.tokens_per_forward < num_tokens / at_best <= row.at_most
    assert row.at_most == pytest.approx(num_tokens / (at_best - sum(f - 2 for _, f in both if f > 2)))


@pytest.mark.parametrize("length", [4, 8])
def test_the_oracle_of_self_speculation_verifies_drafts_just_as_far_as_they_are_right(length):
    answers = decode(Oracle(ScriptedRunner(), FINALS, speculates=True), WAYS[SPECULATING_ORACLE](length))
    for prompt, final, answer in zip(PROMPTS, FINALS, answers, strict=True):
        place = count = 0  # of the seed
        num_masks = length
        while place < len(final) - 1:
            guess = denoise((*prompt, *final[:place]), (MASK,) * num_masks, adapter=True)
            drafted = zip(range(1, num_masks), final[place + 1 :], strict=False)
            is_right = [guess[at][0] == token for at, token in drafted]
            place += (*is_right, False).index(False) + 1
            num_masks = min(length, MAX_TOKENS - place - 1)
            count += 1
        assert (answer.tokens, answer.num_forwards) == (final, count)


def test_ways_stand_beside_one_another_by_block(tmp_path):
    rows = [
        Reached(way, block, 2.5 * block / 8, 0.975, at_most=4.0 if way == ORACLE else None, num_told=3)
        for block in BLOCK_LENGTHS
        for way in WAYS
    ]
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(WAYS) + 2
    assert "| self_speculation | 2.50 (97.5 %) | 5.00 (97.5 %) | 10.00 (97.5 %) |" in lines
    assert "| no choice of positions passes | 4.00 | 4.00 | 4.00 |" in lines
    plot(rows, tmp_path / "light.png")
    assert (tmp_path / "light.png").stat().st_size > 10_000
