"""Whatever else runs, a request's tokens are those it gets alone: random crowds against brute force."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.cost import StepCost
from policies.modes import DecodePlan, Mode
from replicas.answer_forms import JsonFormat, ThinkingBudget
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.engine.grammar import Grammar
from replicas.engine.sequence import Progress, Sequence
from replicas.messages import DecodingOptions, SamplingParams
from replicas.tools.thinking_budget import BudgetedGrammar, SpelledMarks
from tests.replicas.engine.scripted import (
    PINNED,
    Device,
    ScriptedGrammar,
    ScriptedRunner,
    expected,
    formed_diffusion,
    naive_ar,
    tokens_of,
)
from tests.thorough import examples

MAX_CONTEXT = 96
JSON = JsonFormat("{}")
CONSTRAINED = {
    "auto with a grammar": DecodingOptions(),
    "speculation with a grammar": DecodingOptions(Mode.SELF_SPECULATION, block_length=7),
    "diffusion with a grammar": PINNED["diffusion"],
    "factored with a grammar": PINNED["factored"],
    "capped with a grammar": PINNED["capped"],
    "sampled with a grammar": PINNED["sampled"],
}
BUDGETED = {
    "auto with a budget": DecodingOptions(),
    "speculation with a budget": DecodingOptions(Mode.SELF_SPECULATION, block_length=7),
}
MARKS = SpelledMarks(b"\n", bytes((10, 23, 37)), (10, 23, 37), b"", lambda token: bytes((token,)))
COSTS = (
    StepCost((1, 512), (10.0, 10.001)),
    StepCost((1, 512), (0.1, 51.2)),
    StepCost((1, 32, 512), (4.0, 8.0, 80.0), segment_ms=0.2, cached_ms=1.0),
)


class Crowd:
    """An engine, what was asked of it, and what each must get; the books are checked at every turn."""

    def __init__(
        self, rng: random.Random, num_pages: int, step_tokens: int, page_size: int, runs_ahead: bool
    ):
        self.rng = rng
        self.overlaps_blocks = rng.random() < 0.7
        self.runner = ScriptedRunner(num_pages=num_pages, page_size=page_size, max_context=MAX_CONTEXT)
        self.engine = Engine(
            Device(self.runner) if runs_ahead else self.runner,
            EngineConfig(
                max_running=rng.randint(1, 12),
                max_waiting=1000,
                max_step_tokens=step_tokens,
                max_prefill_tokens=rng.randint(1, 60),
                max_step_ms=rng.choice((None, 6.0, 12.0)),
                overlap_blocks=self.overlaps_blocks,
            ),
        )
        self.engine.set_step_cost(rng.choice(COSTS))
        self.prefixes = [[rng.randint(3, 60) for _ in range(30)] for _ in range(2)]
        self.wanted: dict[str, list[int]] = {}
        self.seen: dict[str, list[Progress]] = {}
        self.sequences: list[Sequence] = []

    def submit(self, number: int) -> None:
        """A request of one choice or several, in any mode, with a grammar or without."""
        rng = self.rng
        shared = rng.choice(self.prefixes)[: rng.randint(0, 30)]
        prompt = shared + [rng.randint(3, 60) for _ in range(rng.randint(1, 20))]
        max_tokens = rng.randint(1, MAX_CONTEXT - len(prompt))
        kind = rng.choice([*PINNED, *CONSTRAINED, *BUDGETED])
        decoding = (PINNED | CONSTRAINED | BUDGETED)[kind]
        priority = rng.choice((0, 0, -1, 5))
        for choice in range(rng.choice((1, 1, 1, 4))):
            name = f"{kind}-{number}-{choice}"
            grammar: Grammar | None = None
            sampling = SamplingParams(max_tokens=max_tokens, seed=choice)
            if kind in PINNED:
                self.wanted[name] = expected(kind, prompt, max_tokens, MAX_CONTEXT, self.overlaps_blocks)
            elif kind in BUDGETED:
                budget, begins = rng.randint(0, 20), rng.random() < 0.8
                grammar, naive = (BudgetedGrammar(None, MARKS, budget, begins) for _ in range(2))
                self.wanted[name] = naive_ar(prompt, max_tokens, grammar=naive)
                bound = ThinkingBudget(budget)
                sampling = SamplingParams(max_tokens=max_tokens, seed=choice, thinking_token_budget=bound)
            else:
                num_tokens = rng.randint(1, 40)
                grammar = ScriptedGrammar(num_tokens)
                if decoding.mode is Mode.DIFFUSION:
                    self.wanted[name] = formed_diffusion(
                        prompt, max_tokens, decoding, num_tokens, MAX_CONTEXT, self.overlaps_blocks
                    )
                else:
                    self.wanted[name] = naive_ar(prompt, max_tokens, grammar=ScriptedGrammar(num_tokens))
                sampling = SamplingParams(max_tokens=max_tokens, seed=choice, response_format=JSON)
            if rng.random() < 0.2:
                sampling = replace(sampling, logprobs=0)
            self.sequences.append(
                self.engine.submit(name, list(prompt), sampling, decoding, priority=priority, grammar=grammar)
            )
            self.engine.check_integrity()

    def cancel(self) -> None:
        """One request, or all choices of one."""
        name = self.rng.choice(list(self.wanted))
        stem = name.rpartition("-")[0] + "-"
        for other in [name] if self.rng.random() < 0.5 else [n for n in self.wanted if n.startswith(stem)]:
            if self.engine.cancel(other) is not None:
                del self.wanted[other]
            self.engine.check_integrity()

    def change_plan(self) -> None:
        mode = self.rng.choice(list(Mode))
        length = 1 if mode is Mode.AR else self.rng.randint(2, 16)
        self.engine.set_plan(DecodePlan(mode, length), "test")
        self.engine.check_integrity()

    def step(self) -> None:
        for made in self.engine.step():
            self.seen.setdefault(made.sequence.request_id, []).append(made)
        self.engine.check_integrity()

    def check(self) -> None:
        assert not self.engine.has_work
        assert self.engine.scheduler.pages_used == 0
        for name, tokens in self.wanted.items():
            assert tokens_of(self.seen[name]) == tokens, name
            assert sum(made.ended for made in self.seen[name]) == 1
            assert self.seen[name][-1].ended


def run_crowd(
    seed: int, num_pages: int, step_tokens: int, page_size: int = 4, runs_ahead: bool = False
) -> Crowd:
    """num_pages: of 4 tokens; so many tokens are in as many pages as they need"""
    rng = random.Random(seed)
    num_pages = max(4 * num_pages, MAX_CONTEXT + page_size) // page_size
    crowd = Crowd(rng, num_pages, step_tokens, page_size, runs_ahead)
    to_come = 20
    for _ in range(5000):
        if to_come and rng.random() < 0.4:
            to_come -= 1
            crowd.submit(to_come)
        if rng.random() < 0.05 and crowd.wanted:
            crowd.cancel()
        if rng.random() < 0.2:
            crowd.change_plan()
        crowd.step()
        if not crowd.engine.has_work and not to_come:
            break
    assert crowd.runner.most_tokens <= step_tokens
    crowd.check()
    return crowd


CROWDS = {
    "seed": st.integers(0, 10**9),
    "num_pages": st.integers(24, 60),
    "step_tokens": st.integers(192, 260),
    "page_size": st.sampled_from((1, 4, 16, 64)),
}


@examples(20)
@given(**CROWDS)
def test_a_crowd_gets_what_each_would_alone(
    seed: int, num_pages: int, step_tokens: int, page_size: int
) -> None:
    """Arrivals, modes, grammars, choices, cancels and plan changes on a pool too small for all of them."""
    run_crowd(seed, num_pages, step_tokens, page_size)


@examples(30)
@given(**CROWDS)
def test_a_crowd_of_which_steps_are_begun_ahead_gets_the_same(
    seed: int, num_pages: int, step_tokens: int, page_size: int
) -> None:
    run_crowd(seed, num_pages, step_tokens, page_size, runs_ahead=True)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_crowds_meet_what_they_are_for(runs_ahead: bool) -> None:
    """Preemptions, prefixes reused, drafts cut by grammars: all of it happens in some crowds."""
    crowds = [run_crowd(seed, 24, 192, runs_ahead=runs_ahead) for seed in range(16)]
    counters = [crowd.engine.scheduler.counters for crowd in crowds]
    num_ahead = sum(made.num_ahead for made in counters)
    assert (num_ahead > sum(made.num_steps for made in counters) / 8) == runs_ahead
    assert any(made.num_in_vain > 0 for made in counters) == runs_ahead
    sequences = [sequence for crowd in crowds for sequence in crowd.sequences]
    constrained = [sequence for sequence in sequences if sequence.grammar is not None]
    assert sum(sequence.num_preemptions for sequence in sequences) > 10
    assert sum(sequence.num_preemptions for sequence in constrained) > 0
    assert sum(sequence.num_reused for sequence in sequences) > 100
    assert sum(sequence.num_switches for sequence in sequences) > 50
    assert sum(sequence.tokens_by_mode[Mode.SELF_SPECULATION] for sequence in constrained) > 100
    budgeted = [sequence for sequence in constrained if sequence.sampling.thinking_token_budget is not None]
    ends = [bytes(sequence.tokens[sequence.num_prompt_tokens :]).find(MARKS.end) for sequence in budgeted]
    assert sum(end >= 0 for end in ends) > 10
    assert sum(sequence.tokens_by_mode[Mode.DIFFUSION] for sequence in constrained) > 100
    assert any(sequence.grammar.is_complete for sequence in constrained if sequence.grammar is not None)
