"""Steps that are begun before the output of the one before is known."""

import random
from dataclasses import replace
from itertools import accumulate
from operator import mul

import pytest

from policies.modes import DecodePlan, Mode
from policies.policy import Trial
from replicas.config import EngineConfig
from replicas.engine.ahead import Worth
from replicas.engine.batch import ScheduledBatch, Segment, SegmentOutput
from replicas.engine.decoders.self_speculation import num_worth_verifying
from replicas.engine.engine import Engine
from replicas.engine.grammar import GrammarFailed
from replicas.engine.sequence import Progress
from replicas.errors import ErrorCode
from replicas.messages import FinishReason, SamplingParams
from tests.replicas.engine.scripted import (
    PINNED,
    Device,
    ScriptedGrammar,
    ScriptedRunner,
    expected,
    naive_ar,
    tokens_of,
)
from tests.replicas.engine.test_crowd import JSON
from tests.replicas.engine.test_engine import drain
from tests.replicas.engine.test_isolate import GuiltyRunner
from tests.thorough import num_cases

ENDLESS = SamplingParams(max_tokens=60, ignore_eos=True)


def on_device(num_pages: int = 400, page_size: int = 4, max_context: int = 96) -> Engine:
    return Engine(Device(ScriptedRunner(num_pages, page_size, max_context)))


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("concurrency", [1, 16, 64])
@pytest.mark.parametrize("mode", ["ar", "self_speculation"])
def test_nearly_all_steps_are_begun_ahead(mode: str, concurrency: int, page_size: int) -> None:
    """With prompts that come in chunks, and arrivals: those that end are followed by others, one late."""
    rng = random.Random(concurrency)
    runner = ScriptedRunner(num_pages=12000 // page_size, page_size=page_size, max_context=160)
    engine = Engine(Device(runner), EngineConfig(max_running=concurrency, max_prefill_tokens=40))
    prompts: dict[str, list[int]] = {}
    seen: dict[str, list[int]] = {}

    def submit() -> None:
        name = str(len(prompts))
        prompts[name] = [rng.randint(3, 60) for _ in range(rng.randint(1, 90))]
        sampling = SamplingParams(max_tokens=min(60, 8 + int(rng.expovariate(1 / 25))))
        engine.submit(name, prompts[name], sampling, PINNED[mode])

    for _ in range(concurrency):
        submit()
    for _ in range(120):
        for made in engine.step():
            seen.setdefault(made.sequence.request_id, []).extend(made.token_ids)
            if made.ended:
                submit()
        engine.check_integrity()
    counters = engine.scheduler.counters
    assert counters.num_steps == 120
    least = 0.95 if concurrency > 1 else 0.9  # all of a lone request's but the first
    assert counters.num_ahead >= least * counters.num_steps
    assert counters.num_in_vain <= 0.1 * counters.num_segments
    for name, tokens in seen.items():
        assert tokens == naive_ar(prompts[name], 60)[: len(tokens)]


def test_a_runner_that_does_not_run_ahead_is_asked_one_step_at_a_time() -> None:
    engine = Engine(ScriptedRunner())
    engine.submit("r", [5, 6, 7], ENDLESS, PINNED["self_speculation"])
    drain(engine)
    counters = engine.scheduler.counters
    assert (counters.num_ahead, counters.num_in_vain) == (0, 0)


@pytest.mark.parametrize("kind", ["ar", "self_speculation"])
def test_a_cancel_acts_at_once_and_its_pages_are_the_next_ones(kind: str) -> None:
    """The device still runs a step of it then."""
    engine = on_device(num_pages=24)
    engine.submit("a", [5] * 30, ENDLESS, PINNED[kind])
    for _ in range(6):
        engine.step()
    assert engine.cancel("a") is not None
    assert engine.scheduler.pages_used == 0
    assert not engine.has_work
    engine.submit("b", [6] * 30, ENDLESS, PINNED[kind])
    assert tokens_of(drain(engine)["b"]) == naive_ar([6] * 30, 60, ignore_eos=True)
    assert engine.scheduler.counters.num_in_vain >= 1


@pytest.mark.parametrize("kind", ["ar", "self_speculation"])
def test_others_go_on_beside_one_that_is_cancelled_or_stops(kind: str) -> None:
    engine = on_device()
    for k in range(6):
        engine.submit(str(k), [5 + k, 9], replace(ENDLESS, ignore_eos=k == 0), PINNED[kind])
    seen: dict[str, list[int]] = {}
    for number in range(100):
        if number == 9:
            assert engine.cancel("5") is not None
        for made in engine.step():
            assert made.sequence.request_id != "5" or number < 9
            seen.setdefault(made.sequence.request_id, []).extend(made.token_ids)
        engine.check_integrity()
    assert not engine.has_work
    for k in range(5):
        assert seen[str(k)] == naive_ar([5 + k, 9], 60, ignore_eos=k == 0)


@pytest.mark.parametrize("num_tokens", range(1, 12))
@pytest.mark.parametrize("kind", ["ar", "self_speculation"])
def test_no_step_is_begun_past_max_tokens_in_ar(kind: str, num_tokens: int) -> None:
    engine = on_device()
    engine.submit("r", [5, 6, 7], replace(ENDLESS, max_tokens=num_tokens), PINNED[kind])
    made = drain(engine)["r"]
    assert tokens_of(made) == naive_ar([5, 6, 7], num_tokens, ignore_eos=True)
    assert made[-1].reason is FinishReason.LENGTH
    counters = engine.scheduler.counters
    if kind == "ar":
        assert (counters.num_steps, counters.num_ahead) == (num_tokens, num_tokens - 1)


@pytest.mark.parametrize("kind", ["ar", "self_speculation"])
def test_a_sequence_runs_to_the_end_of_the_context(kind: str) -> None:
    engine = on_device()
    sequence = engine.submit("r", [5, 6, 7], SamplingParams(ignore_eos=True), PINNED[kind])
    drain(engine)
    assert sequence.tokens[3:] == naive_ar([5, 6, 7], 93, ignore_eos=True)


def test_a_grammar_holds_up_its_own_request_alone() -> None:
    """It takes part in every second step, and the others in each."""
    engine = on_device()
    plain = [engine.submit(str(k), [5 + k], ENDLESS, PINNED["ar"]) for k in range(3)]
    sampling = SamplingParams(max_tokens=60, response_format=JSON)
    formed = engine.submit("form", [9], sampling, PINNED["ar"], grammar=ScriptedGrammar(60))
    for _ in range(21):
        engine.step()
    assert [sequence.num_completion_tokens for sequence in plain] == [21] * 3
    assert formed.num_forwards == 10  # behind its prompt's
    assert engine.scheduler.counters.num_ahead == 20
    drain(engine)
    assert formed.tokens[1:] == naive_ar([9], 60, grammar=ScriptedGrammar(60))


def test_where_most_wait_for_the_host_no_step_is_begun_ahead() -> None:
    """So that none of them takes part in every second step only."""
    engine = on_device()
    engine.submit("plain", [5], ENDLESS, PINNED["ar"])
    others = [engine.submit(str(k), [6 + k], ENDLESS, PINNED["diffusion"]) for k in range(2)]
    for _ in range(12):
        engine.step()
    assert engine.scheduler.counters.num_ahead == 0
    assert min(sequence.num_forwards for sequence in others) == 11


def test_a_plan_is_taken_a_step_later_and_a_trial_as_long_as_it_is_to_be() -> None:
    now_s = 0.0
    runner = Device(ScriptedRunner(num_pages=400, max_context=300))
    engine = Engine(runner, clock=lambda: now_s)
    sequence = engine.submit("r", [5, 6, 7], SamplingParams(max_tokens=250, ignore_eos=True))
    for plan in (DecodePlan(Mode.SELF_SPECULATION, 8), DecodePlan(Mode.AR), DecodePlan(Mode.DIFFUSION, 4)):
        engine.set_plan(plan, f"to {plan.mode}")
        for _ in range(2):
            engine.step()
        assert sequence.last_mode is plan.mode
        for _ in range(6):
            engine.step()
    engine.set_plan(DecodePlan(Mode.AR), "back")
    engine.set_trial(Trial(DecodePlan(Mode.SELF_SPECULATION, 6), 0.1, 0.1))
    while engine.has_work:
        engine.step()
        engine.check_integrity()
        now_s += 0.05
    assert sequence.num_completion_tokens == 250
    assert engine.scheduler.trials.num_forwards >= 12
    assert sequence.last_mode is Mode.AR
    assert engine.scheduler.counters.tokens_by_mode[Mode.SELF_SPECULATION] > 0


@pytest.mark.parametrize("fails_early", [True, False])
@pytest.mark.parametrize("raises", [True, False])
def test_a_crowd_with_several_at_fault_equals_brute_force(raises: bool, fails_early: bool) -> None:
    """Whether a forward fails when it is begun or later, what was begun behind it is scheduled anew."""
    rng = random.Random(3)
    for _ in range(num_cases(12)):
        runner = GuiltyRunner(raises, num_pages=rng.choice((30, 60, 400)))
        config = EngineConfig(max_running=rng.choice((3, 12)), max_step_tokens=rng.choice((192, 512)))
        engine = Engine(Device(runner, fails_early), config)
        asked: dict[str, tuple[str, list[int], bool]] = {}
        for number in range(14):
            kind = rng.choice(["ar", "ar", "self_speculation", "self_speculation", "diffusion"])
            prompt = [3 + rng.randrange(4) for _ in range(rng.choice((1, 4, 30)))]
            sequence = engine.submit(str(number), prompt, SamplingParams(max_tokens=25), PINNED[kind])
            is_guilty = rng.random() < 0.3
            asked[str(number)] = (kind, prompt, is_guilty)
            if is_guilty:
                after = rng.choice((0, 5, 12))
                runner.guilty[sequence.seq_id] = lambda s, after=after: s.start >= s.prompt_len + after
        seen = drain(engine)
        for name, (kind, prompt, is_guilty) in asked.items():
            alone = expected(kind, prompt, 25, 96)
            [last] = [made for made in seen[name] if made.ended]
            assert last.error in ((None, ErrorCode.INTERNAL) if is_guilty else (None,))
            got = tokens_of(seen[name])
            assert got == (alone if last.error is None else alone[: len(got)])
        assert engine.scheduler.pages_used == 0


class Uncertain(ScriptedRunner):
    """Now and then nothing can be sampled from a segment's later rows."""

    def __init__(self, seed: int):
        super().__init__(num_pages=400)
        self._rng = random.Random(seed)
        self.num_cut = 0

    def run(self, batch: ScheduledBatch) -> list[SegmentOutput]:
        return [
            self._cut(segment, output)
            for segment, output in zip(batch.segments, super().run(batch), strict=True)
        ]

    def _cut(self, segment: Segment, output: SegmentOutput) -> SegmentOutput:
        if len(output.token_ids) < 2 or self._rng.random() < 0.8:
            return output
        self.num_cut += 1
        count = self._rng.randrange(1, len(output.token_ids))
        return SegmentOutput(output.token_ids[:count], output.probs[:count])


@pytest.mark.parametrize("seed", range(5))
def test_what_follows_an_output_that_is_not_whole_is_run_again(seed: int) -> None:
    runner = Uncertain(seed)
    engine = Engine(Device(runner))
    for k in range(5):
        engine.submit(str(k), [5 + k] * (3 + k), ENDLESS, PINNED["self_speculation"])
    seen = drain(engine)
    assert runner.num_cut > 0
    assert engine.scheduler.counters.num_in_vain > 0
    for k in range(5):
        assert tokens_of(seen[str(k)]) == naive_ar([5 + k] * (3 + k), 60, ignore_eos=True)


def test_the_tokens_worth_verifying_are_those_of_most_use() -> None:
    """Against the definition, in which values that are nearly equal are equal."""
    rng = random.Random(4)
    for _ in range(num_cases(200)):
        probs = [rng.uniform(rng.choice((0.0, 0.8, 0.99)), 1.0) for _ in range(rng.randrange(40))]
        survivals = list(accumulate(probs, mul, initial=1.0))
        expected_of = list(accumulate(survivals[1:], initial=0.0))
        values = [e - (1.0 - s) * expected_of[-1] for e, s in zip(expected_of, survivals, strict=True)]
        assert values[num_worth_verifying(probs)] >= max(values) - 1e-3
    assert num_worth_verifying([1.0] * 7) == 7
    assert num_worth_verifying([]) == 0


def test_rows_are_had_for_what_was_worth_verifying_and_half_as_much_more() -> None:
    step = Segment(0, 4, (7, *[1] * 16), (0,), 1, True, (0, *range(2, 17)), SamplingParams())
    verify = replace(step, token_ids=(7, 8, 9, *[1] * 16), num_causal=3, wanted=(0, 1, 2, *range(4, 19)))
    worth = Worth()
    assert (worth.most(step), worth.most(verify)) == (15, 15)
    worth.note(step, True, 4)
    assert (worth.most(step), worth.most(verify)) == (7, 15)
    found = []
    for is_accepted in (False, False, False, False, True, True, True):
        worth.note(verify, is_accepted, worth.most(verify) if is_accepted else 0)
        found.append(worth.most(verify))
    assert found == [11, 8, 7, 5, 8, 13, 15]
    assert worth.most(replace(verify, wanted=(0, 1, 2))) == 0


def test_a_chunk_of_a_prompt_is_computed_once_whatever_fails() -> None:
    runner = ScriptedRunner(num_pages=400)
    engine = Engine(Device(runner), EngineConfig(max_prefill_tokens=8, max_step_tokens=192))
    first = engine.submit("a", [5, 6], ENDLESS, PINNED["ar"])
    engine.step()
    engine.submit("b", [7 + k % 9 for k in range(60)], SamplingParams(max_tokens=5), PINNED["ar"])
    for number in range(6):
        if number == 3:
            runner.fail_next = RuntimeError("once")
        engine.step()
        engine.check_integrity()
    seen = drain(engine)
    assert tokens_of(seen["b"]) == naive_ar([7 + k % 9 for k in range(60)], 5)
    assert first.tokens[2:] == naive_ar([5, 6], 60, ignore_eos=True)


@pytest.mark.parametrize("on_a_device", [False, True])
def test_a_grammar_that_fails_while_its_prompt_is_under_way_ends_its_request_alone(on_a_device: bool) -> None:
    """The chunk before the one that the grammar fails for is committed first."""

    class Failing(ScriptedGrammar):
        def masks(self, draft):
            raise GrammarFailed("too complex")

    runner = ScriptedRunner(num_pages=400)
    engine = Engine(Device(runner) if on_a_device else runner, EngineConfig(max_prefill_tokens=8))
    engine.submit("good", [5, 6], ENDLESS, PINNED["ar"])
    engine.step()
    prompt = [7 + k % 9 for k in range(21)]
    form = SamplingParams(max_tokens=9, response_format=JSON)
    engine.submit("bad", prompt, form, PINNED["ar"], grammar=Failing(9))
    seen: dict[str, list[Progress]] = {"good": [], "bad": []}
    while engine.has_work:
        for made in engine.step():
            seen[made.sequence.request_id].append(made)
        engine.check_integrity()
    assert [made.error for made in seen["bad"]] == [ErrorCode.INTERNAL]
    assert seen["good"][-1].error is None
    again = engine.submit("again", prompt, SamplingParams(max_tokens=5), PINNED["ar"])
    assert tokens_of(drain(engine)["again"]) == naive_ar(prompt, 5)
    assert again.num_reused >= 8
