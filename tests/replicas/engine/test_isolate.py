"""A forward that fails is blamed on whom it is to be blamed on: the others never notice."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from policies.modes import DecodePlan, Mode
from policies.policy import Trial
from replicas.answer_forms import JsonFormat
from replicas.config import EngineConfig
from replicas.engine.batch import RunnerLost, ScheduledBatch, Segment, SegmentOutput
from replicas.engine.engine import Engine
from replicas.engine.forwards import MAX_FAILED, MAX_FRUITLESS
from replicas.engine.grammar import GrammarFailed
from replicas.engine.isolate import failed, is_sticky, max_forwards, nobodys_segment, run_apart
from replicas.engine.sequence import Progress
from replicas.errors import ErrorCode
from replicas.messages import DecodingOptions, SamplingParams
from tests.replicas.engine.scripted import (
    PINNED,
    ScriptedGrammar,
    ScriptedRunner,
    expected,
    naive_ar,
    tokens_of,
)

SegmentTest = Callable[[Segment], bool]

KINDS: dict[str, tuple[DecodingOptions, SegmentTest]] = {
    "prefill": (PINNED["ar"], lambda s: not s.wanted),
    "first token": (PINNED["diffusion"], lambda s: s.start + s.num_causal == s.prompt_len),
    "ar": (PINNED["ar"], lambda s: s.start >= s.prompt_len + 3),
    "draft": (PINNED["self_speculation"], lambda s: s.adapter and s.start >= s.prompt_len),
    "verify": (PINNED["self_speculation"], lambda s: s.num_causal > 1 and s.start >= s.prompt_len),
    "denoise": (PINNED["diffusion"], lambda s: s.num_causal == 0),
    "commit": (PINNED["diffusion"], lambda s: s.start >= s.prompt_len and s.is_causal),
    "commit with a block behind": (PINNED["diffusion"], lambda s: 0 < s.num_causal < len(s.token_ids)),
}


class GuiltyRunner(ScriptedRunner):
    """Fails for segments that pass their sequence's test, once those before them have been run.

    raises: else their outputs say that nothing could be sampled. sick: what it raises whatever it is given.
    """

    def __init__(self, raises: bool = True, **limits: int):
        super().__init__(**limits)
        self.guilty: dict[int, SegmentTest] = {}
        self.raises = raises
        self.sick: Exception | None = None
        self.num_asked = 0

    def run(self, batch: ScheduledBatch) -> list[SegmentOutput]:
        self.num_asked += 1
        if self.sick is not None:
            raise self.sick
        outputs: list[SegmentOutput] = []
        for segment in batch.segments:
            if self.guilty.get(segment.seq_id, lambda _: False)(segment):
                if self.raises:
                    raise RuntimeError("this one can't be run")
                outputs.append(SegmentOutput((), (), failure="its logits are not finite"))
            else:
                outputs += super().run(ScheduledBatch((segment,)))
        return outputs


def drain(engine: Engine, max_steps: int = 5000) -> dict[str, list[Progress]]:
    seen: dict[str, list[Progress]] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            return seen
        for made in engine.step():
            seen.setdefault(made.sequence.request_id, []).append(made)
        engine.check_integrity()
    raise AssertionError(f"work left after {max_steps} steps")


def alike(count: int) -> ScheduledBatch:
    segment = replace(nobodys_segment(0), seq_id=0)
    return ScheduledBatch(tuple(replace(segment, seq_id=k, pages=(k,)) for k in range(count)))


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_segment_that_fails_ends_its_own_request_alone(kind: str, raises: bool) -> None:
    options, is_guilty = KINDS[kind]
    runner = GuiltyRunner(raises, num_pages=400, max_context=300)
    overlaps = kind != "commit"
    engine = Engine(runner, EngineConfig(max_step_tokens=192, overlap_blocks=overlaps))
    prompts = {name: [9 + number] * (5 + 7 * number) for number, name in enumerate(PINNED)}
    sampling = SamplingParams(max_tokens=40)
    for name, prompt in prompts.items():
        engine.submit(name, prompt, sampling, PINNED[name])
    prompt = [40 + k % 9 for k in range(150)]
    guilty = engine.submit("guilty", prompt, replace(sampling, ignore_eos=True), options)
    runner.guilty[guilty.seq_id] = is_guilty
    seen = drain(engine)
    assert [made.error for made in seen["guilty"] if made.ended] == [ErrorCode.INTERNAL]
    for name, prompt in prompts.items():
        assert tokens_of(seen[name]) == expected(name, prompt, 40, 300, overlaps)
        assert [made.error for made in seen[name]] == [None] * len(seen[name])
    assert engine.scheduler.pages_used == 0


@pytest.mark.parametrize("raises", [True, False])
def test_the_others_get_their_tokens_in_the_same_step(raises: bool) -> None:
    runner = GuiltyRunner(raises, num_pages=400)
    engine = Engine(runner)
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    sequences = [engine.submit(str(k), [5 + k, 6], sampling, PINNED["ar"]) for k in range(17)]
    engine.step()
    runner.guilty[sequences[11].seq_id] = lambda _: True
    runner.num_asked = 0
    progress = engine.step()
    assert [made.sequence for made in progress if made.ended] == [sequences[11]]
    assert {len(made.token_ids) for made in progress if not made.ended} == {1}
    assert len(progress) == 17
    assert runner.num_asked <= (2 + 2 * 5 if raises else 1)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 33, 64])
def test_one_at_fault_is_found_by_halving(count: int) -> None:
    plan = alike(count)
    for guilty in range(count):
        runner = GuiltyRunner(num_pages=count)
        runner.guilty[guilty] = lambda _: True
        outputs = run_apart(runner.run, plan, RuntimeError("whole"))
        assert [output is not None and output.failure is not None for output in outputs] == [
            index == guilty for index in range(count)
        ]
        assert runner.num_asked <= 2 * (count - 1).bit_length()


def test_many_at_fault_are_found_in_a_few_steps_and_nobody_else() -> None:
    """Against brute force: what is left open is run in the next step, which finds at least one more."""
    rng = random.Random(16)
    for _ in range(300):
        count = rng.randrange(1, 40)
        guilty = set(rng.sample(range(count), rng.randint(1, count)))
        left = list(alike(count).segments)
        blamed: set[int] = set()
        while guilty & {segment.seq_id for segment in left}:
            runner = GuiltyRunner(num_pages=count)
            runner.guilty = {number: lambda _: True for number in guilty}
            outputs = run_apart(runner.run, ScheduledBatch(tuple(left)), RuntimeError("whole"))
            assert runner.num_asked <= max_forwards(len(left))
            found = {s.seq_id for s, o in zip(left, outputs, strict=True) if o is not None and o.failure}
            assert found
            blamed |= found
            left = [segment for segment, output in zip(left, outputs, strict=True) if output is None]
        assert blamed == guilty


def test_segments_that_fail_only_together_are_nobodys_fault() -> None:
    """As where memory is short: halves fit."""

    class Short(ScriptedRunner):
        def run(self, batch: ScheduledBatch) -> list[SegmentOutput]:
            if batch.num_tokens > 24:
                raise MemoryError
            return super().run(batch)

    engine = Engine(Short(num_pages=400))
    prompts = {str(k): [5 + k] * 18 for k in range(9)}
    for name, prompt in prompts.items():
        engine.submit(name, prompt, SamplingParams(max_tokens=30), PINNED["self_speculation"])
    seen = drain(engine)
    for name, prompt in prompts.items():
        assert tokens_of(seen[name]) == expected("self_speculation", prompt, 30, 96)


def test_a_crowd_with_several_at_fault_equals_brute_force() -> None:
    rng = random.Random(2)
    for seed in range(60):
        runner = GuiltyRunner(bool(seed % 2), num_pages=rng.choice((30, 60, 400)))
        engine = Engine(
            runner, EngineConfig(max_running=rng.choice((3, 12)), max_step_tokens=rng.choice((192, 512)))
        )
        asked: dict[str, tuple[str, list[int]]] = {}
        guilty = set()
        for number in range(14):
            kind = rng.choice([*PINNED])
            prompt = [3 + rng.randrange(4) for _ in range(rng.choice((1, 4, 30)))]
            sequence = engine.submit(str(number), prompt, SamplingParams(max_tokens=25), PINNED[kind])
            asked[str(number)] = (kind, prompt)
            if rng.random() < 0.3:
                guilty.add(str(number))
                after = rng.choice((0, 5, 12))
                runner.guilty[sequence.seq_id] = lambda s, after=after: s.start >= s.prompt_len + after
        seen = drain(engine)
        for name, (kind, prompt) in asked.items():
            alone = expected(kind, prompt, 25, 96)
            got = tokens_of(seen[name])
            ends = [made for made in seen[name] if made.ended]
            assert len(ends) == 1
            if ends[0].error is None:
                assert got == alone
            else:
                assert name in guilty
                assert got == alone[: len(got)]
        assert engine.scheduler.pages_used == 0


def test_a_runner_that_runs_nothing_is_lost_and_no_request_is_blamed() -> None:
    runner = GuiltyRunner(num_pages=400)
    engine = Engine(runner)
    for k in range(8):
        engine.submit(str(k), [5 + k] * 9, SamplingParams(max_tokens=9), [*PINNED.values()][k % 5])
    engine.step()
    runner.sick, runner.num_asked = MemoryError("no memory"), 0
    for _ in range(MAX_FAILED - 1):
        assert engine.step() == []
        engine.check_integrity()
    with pytest.raises(RunnerLost, match="no memory"):
        engine.step()
    assert runner.num_asked == 2 * MAX_FAILED


@pytest.mark.parametrize("kind", PINNED)
def test_a_runner_that_recovers_in_time_has_cost_nobody_a_token(kind: str) -> None:
    runner = GuiltyRunner()
    engine = Engine(runner)
    engine.submit("r", [5, 6, 7], SamplingParams(max_tokens=40), PINNED[kind])
    progress = []
    number = 0
    while engine.has_work:
        number += 1
        runner.sick = MemoryError() if number % MAX_FAILED else None
        progress += engine.step()
        engine.check_integrity()
    assert tokens_of(progress) == expected(kind, [5, 6, 7], 40, 96)
    assert progress[-1].error is None


def test_a_device_that_is_broken_for_good_is_lost_at_once() -> None:
    runner = GuiltyRunner()
    engine = Engine(runner)
    engine.submit("r", [5, 6], SamplingParams(max_tokens=4))
    runner.sick = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RunnerLost, match="illegal memory access"):
        engine.step()


def test_which_errors_of_a_device_stay() -> None:
    accelerator_error = type("AcceleratorError", (RuntimeError,), {})
    out_of_memory = type("OutOfMemoryError", (RuntimeError,), {})
    assert is_sticky(accelerator_error("device-side assert triggered"))
    assert is_sticky(RuntimeError("CUDA error: unspecified launch failure"))
    assert not is_sticky(out_of_memory("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not is_sticky(accelerator_error("CUDA error: out of memory"))
    assert not is_sticky(IndexError("index 7 is out of bounds"))


def test_a_request_at_fault_that_comes_again_and_again_does_not_end_the_engine() -> None:
    """But where no request can be run at all the runner is at fault, though it can run nobody's segment."""
    runner = GuiltyRunner()
    engine = Engine(runner)
    for number in range(3 * MAX_FRUITLESS):
        if number % 20 == 19:
            engine.submit("good", [5, 6], SamplingParams(max_tokens=2))
            assert drain(engine)["good"][-1].error is None
        bad = engine.submit("bad", [5, 6], SamplingParams(max_tokens=2))
        runner.guilty[bad.seq_id] = lambda _: True
        assert [made.error for made in engine.step()] == [ErrorCode.INTERNAL]
    with pytest.raises(RunnerLost, match="no segment"):  # noqa: PT012
        for number in range(MAX_FRUITLESS):
            bad = engine.submit(str(number), [5, 6], SamplingParams(max_tokens=2))
            runner.guilty[bad.seq_id] = lambda _: True
            engine.step()


def test_the_one_at_fault_is_found_where_no_page_is_free() -> None:
    runner = GuiltyRunner(num_pages=24)
    engine = Engine(runner)
    full = SamplingParams(max_tokens=40, ignore_eos=True)
    names = {"one": [5] * 40, "two": [6] * 40}
    sequences = {name: engine.submit(name, prompt, full, PINNED["ar"]) for name, prompt in names.items()}
    while engine.scheduler.pages_used < 24:
        engine.step()
    runner.guilty[sequences["two"].seq_id] = lambda _: True
    progress = []
    while engine.has_work:
        progress += engine.step()
        engine.check_integrity()
    assert {made.sequence.request_id: made.error for made in progress if made.ended} == {
        "one": None,
        "two": ErrorCode.INTERNAL,
    }
    assert sequences["one"].num_completion_tokens == 40


@pytest.mark.parametrize("raises", [True, False])
def test_the_pages_of_a_failed_request_are_not_found_again(raises: bool) -> None:
    """Their content may be what is at fault."""
    runner = GuiltyRunner(raises)
    engine = Engine(runner)
    sampling = SamplingParams(max_tokens=9, ignore_eos=True)
    prompt = [5] * 16
    bad = engine.submit("bad", prompt, sampling, PINNED["ar"])
    runner.guilty[bad.seq_id] = lambda s: s.start > s.prompt_len
    drain(engine)
    again = engine.submit("again", prompt, sampling, PINNED["ar"])
    assert tokens_of(drain(engine)["again"]) == naive_ar(prompt, 9, ignore_eos=True)
    assert again.num_reused == 0


class RaisingGrammar(ScriptedGrammar):
    """Raises what no grammar should, or says that it can't go on, at one of its calls."""

    def __init__(self, at: str):
        super().__init__(20)
        self._at = at

    def masks(self, draft):
        if self._at == "masks" and len(self._accepted) > 3:
            raise RuntimeError("no mask")
        return super().masks(draft)

    def forced(self, tokens):
        if self._at == "forced" and len(self._accepted) > 3:
            raise GrammarFailed("too complex")
        return super().forced(tokens)

    def accept(self, token_id: int) -> None:
        super().accept(token_id)
        if self._at == "accept" and len(self._accepted) > 3:
            raise RuntimeError("not accepted")


@pytest.mark.parametrize(
    ("at", "mode"), [("masks", "ar"), ("accept", "ar"), ("accept", "diffusion"), ("forced", "diffusion")]
)
def test_a_grammar_that_raises_ends_its_own_request_alone(at: str, mode: str) -> None:
    engine = Engine(ScriptedRunner())
    sampling = SamplingParams(max_tokens=20)
    for name, kind in (("one", "ar"), ("two", "self_speculation")):
        engine.submit(name, [5, 6], sampling, PINNED[kind])
    engine.submit("bad", [5, 6], sampling, PINNED[mode], grammar=RaisingGrammar(at))
    seen = drain(engine)
    assert [made.error for made in seen["bad"] if made.ended] == [ErrorCode.INTERNAL]
    if at == "forced":
        assert seen["bad"][-1].message.endswith("can't go on: too complex")
    for name in ("one", "two"):
        assert tokens_of(seen[name]) == expected("ar", [5, 6], 20, 96)


def test_a_failed_forward_is_nothing_to_learn_a_cost_from() -> None:
    runner = GuiltyRunner()
    engine = Engine(runner)
    engine.submit("good", [5, 6], SamplingParams(max_tokens=9, ignore_eos=True), PINNED["ar"])
    bad = engine.submit("bad", [7, 6], SamplingParams(max_tokens=9, ignore_eos=True), PINNED["ar"])
    runner.guilty[bad.seq_id] = lambda s: s.start > 3
    num_steps = 0
    while engine.has_work:
        engine.step()
        num_steps += 1
    assert len(engine.forwards) == num_steps - 1


def test_a_trials_round_fails_alone_too() -> None:
    runner = GuiltyRunner(num_pages=400)
    engine = Engine(runner)
    engine.set_plan(DecodePlan(Mode.AR), "rule")
    engine.set_trial(Trial(DecodePlan(Mode.DIFFUSION, 8, 0.7), 0.1, 0.05))
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    engine.submit("good", [5, 6], sampling, DecodingOptions(lossless=True))
    bad = engine.submit("bad", [7, 6], sampling, DecodingOptions())
    runner.guilty[bad.seq_id] = lambda s: s.num_causal == 0
    seen = drain(engine)
    assert [made.error for made in seen["bad"] if made.ended] == [ErrorCode.INTERNAL]
    assert tokens_of(seen["good"]) == naive_ar([5, 6], 60, ignore_eos=True)


def test_what_is_said_of_a_failure_names_its_kind() -> None:
    assert failed(IndexError("x")).failure == "the model's forward failed (IndexError)"


def test_a_rule_that_fails_leaves_the_pages_that_others_share() -> None:
    """It is the request's own, and says nothing of their content."""

    class Failing(ScriptedGrammar):
        def num_allowed(self, tokens: Sequence[int]) -> int:
            raise GrammarFailed("too complex")

    engine = Engine(ScriptedRunner())
    prompt, sampling = [5] * 16, SamplingParams(max_tokens=9, ignore_eos=True)
    engine.submit("one", prompt, sampling, PINNED["ar"])
    drain(engine)
    form = SamplingParams(max_tokens=9, response_format=JsonFormat("{}"))
    engine.submit("bad", prompt, form, PINNED["diffusion"], grammar=Failing(30))
    assert drain(engine)["bad"][-1].error is ErrorCode.INTERNAL
    again = engine.submit("again", prompt, sampling, PINNED["ar"])
    drain(engine)
    assert again.num_reused >= 12
