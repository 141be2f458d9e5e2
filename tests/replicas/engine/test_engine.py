"""The engine against brute force: whatever else runs, a request's tokens are those it gets alone."""

from dataclasses import replace

import pytest

from policies.modes import DEFAULT_FACTOR, DecodePlan, Mode
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.engine.sequence import Progress
from replicas.errors import ErrorCode, TriadError
from replicas.messages import DecodingOptions, FinishReason, SamplingParams
from tests.naive_sampler import SAMPLER
from tests.replicas.engine.scripted import (
    EOS,
    PINNED,
    ScriptedRunner,
    expected,
    naive_ar,
    naive_diffusion,
    tokens_of,
)


def drain(engine: Engine, max_steps: int = 5000) -> dict[str, list[Progress]]:
    seen: dict[str, list[Progress]] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            return seen
        for made in engine.step():
            seen.setdefault(made.sequence.request_id, []).append(made)
        engine.check_integrity()
    raise AssertionError(f"work left after {max_steps} steps")


@pytest.mark.parametrize("kind", PINNED)
@pytest.mark.parametrize("prompt_len", [1, 3, 4, 23])
def test_alone_equals_naive(kind: str, prompt_len: int) -> None:
    for seed in range(20):
        prompt = [3 + (seed * 7 + k) % 50 for k in range(prompt_len)]
        engine = Engine(ScriptedRunner())
        engine.submit("r", prompt, SamplingParams(max_tokens=40), PINNED[kind])
        progress = drain(engine)["r"]
        assert tokens_of(progress) == expected(kind, prompt, 40, 96)
        assert [made.ended for made in progress] == [False] * (len(progress) - 1) + [True]
        last = FinishReason.STOP if tokens_of(progress)[-1] == EOS else FinishReason.LENGTH
        assert progress[-1].reason is last


def test_preemption_happens_and_changes_nothing() -> None:
    engine = Engine(
        ScriptedRunner(num_pages=24, page_size=4, max_context=96), EngineConfig(max_step_tokens=512)
    )
    prompts = {kind: [5 + index] * 20 for index, kind in enumerate(PINNED)}
    sequences = [
        engine.submit(kind, prompt, SamplingParams(max_tokens=70, ignore_eos=True), PINNED[kind])
        for kind, prompt in prompts.items()
        if PINNED[kind].mode is not Mode.DIFFUSION
    ]
    progress = drain(engine)
    assert sum(sequence.num_preemptions for sequence in sequences) > 0
    for name, made in progress.items():
        assert tokens_of(made) == naive_ar(prompts[name], 70, ignore_eos=True)


def test_mode_follows_the_plan_in_mid_request() -> None:
    engine = Engine(ScriptedRunner())
    sequence = engine.submit(
        "r", [5, 6, 7], SamplingParams(max_tokens=60, ignore_eos=True), DecodingOptions()
    )
    plans = [DecodePlan(Mode.SELF_SPECULATION, 8), DecodePlan(Mode.AR), DecodePlan(Mode.DIFFUSION, 4)]
    for plan in plans:
        engine.set_plan(plan, f"to {plan.mode}")
        for _ in range(8):
            engine.step()
        assert sequence.last_mode is plan.mode
        assert sequence.rule == f"to {plan.mode}"
    drain(engine)
    report = sequence.report("replica")
    assert report.num_switches == 2
    assert set(report.tokens_by_mode) == set(Mode)
    assert sum(report.tokens_by_mode.values()) == 60


def test_ar_makes_one_token_a_forward_and_speculation_more() -> None:
    for options, least in ((DecodingOptions(Mode.AR), 1.0), (DecodingOptions(Mode.SELF_SPECULATION, 8), 1.2)):
        engine = Engine(ScriptedRunner())
        total = forwards = 0
        for k in range(20):
            sampling = SamplingParams(max_tokens=60, ignore_eos=True)
            sequence = engine.submit(f"r{k}", [5 + k, 6, 7], sampling, options)
            drain(engine)
            total += sequence.num_completion_tokens - 1
            forwards += sequence.num_forwards
        assert total / forwards >= least
        if options.mode is Mode.AR:
            assert total == forwards


def test_a_crowd_of_long_blocks_does_not_starve_a_prompt() -> None:
    engine = Engine(ScriptedRunner(num_pages=600), EngineConfig(max_step_tokens=192))
    options = DecodingOptions(Mode.DIFFUSION, block_length=32)
    for k in range(20):
        engine.submit(f"r{k}", [5 + k] * 10, SamplingParams(max_tokens=80, ignore_eos=True), options)
    for _ in range(20):
        engine.step()
    late = engine.submit("late", [9] * 60, SamplingParams(max_tokens=4), DecodingOptions(Mode.AR))
    for _ in range(4):
        engine.step()
    assert late.num_completion_tokens > 0


@pytest.mark.parametrize("first", PINNED)
@pytest.mark.parametrize("second", PINNED)
def test_a_prefix_is_computed_once_whatever_the_modes(first: str, second: str) -> None:
    """The second turn of a chat repeats the first turn's prompt and answer."""
    engine = Engine(ScriptedRunner())
    prompt = [9, 8, 7, 6, 5, 4, 3, 10]
    one = engine.submit("one", prompt, SamplingParams(max_tokens=30, ignore_eos=True), PINNED[first])
    drain(engine)
    again = [*one.tokens, 20, 21]
    two = engine.submit("two", again, SamplingParams(max_tokens=20), PINNED[second])
    made = drain(engine)["two"]
    assert tokens_of(made) == expected(second, again, 20, 96)
    # All full pages but those of the last block: what diffusion had not committed when it ended.
    lost = 8 if PINNED[first].mode is Mode.DIFFUSION else 4
    assert len(one.tokens) - lost <= two.num_reused <= len(one.tokens)


def test_the_same_prompt_again_needs_one_token_of_prefill() -> None:
    runner = ScriptedRunner()
    engine = Engine(runner)
    for name in ("one", "two"):
        runner.most_tokens = 0
        engine.submit(name, [5] * 32, SamplingParams(max_tokens=1))
        drain(engine)
    assert runner.most_tokens == 4  # the last page again: its last logits are wanted


def test_prompts_that_begin_alike_are_computed_once_though_they_come_at_once() -> None:
    """As the choices of one request do."""
    runner = ScriptedRunner()
    engine = Engine(runner)
    prompt = [7 + k % 5 for k in range(41)]
    sequences = [engine.submit(str(k), prompt, SamplingParams(max_tokens=4)) for k in range(6)]
    unrelated = engine.submit("x", [9] * 20, SamplingParams(max_tokens=4))
    engine.step()
    assert runner.most_tokens == 61  # one of the six, and the one that has nothing to wait for
    assert unrelated.num_completion_tokens == 1
    progress = drain(engine)
    assert [sequence.num_reused for sequence in sequences] == [0, 40, 40, 40, 40, 40]
    assert all(tokens_of(progress[str(k)]) == naive_ar(prompt, 4) for k in range(1, 6))


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_lower_priority_goes_first_and_equals_in_their_order() -> None:
    engine = Engine(ScriptedRunner(), EngineConfig(max_running=1))
    for name, priority in (("first", 0), ("later", 2), ("equal", 0), ("urgent", -1), ("late", 2)):
        engine.submit(name, [5, 6], SamplingParams(max_tokens=3), priority=priority)
    ended = [name for name, made in drain(engine).items() if made[-1].ended]
    assert ended == ["urgent", "first", "equal", "later", "late"]


def test_no_priority_starves() -> None:
    """Urgent requests come for ever, faster than they are served; the patient one waits for 30 s of them."""
    clock = Clock()
    engine = Engine(ScriptedRunner(), EngineConfig(max_running=1), clock=clock)
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    ended: list[str] = []
    for k in range(100):
        engine.submit(f"urgent-{k}", [7, k % 50 + 3], sampling)
        if k == 0:
            engine.submit("patient", [5, 6], sampling, priority=3)
        ended += [made.sequence.request_id for made in engine.step() if made.ended]
        clock.now_s += 1.0
    assert ended.index("patient") == 30
    assert ended[:30] == [f"urgent-{k}" for k in range(30)]


def test_a_long_prompt_holds_up_running_streams_by_no_more_than_its_cap() -> None:
    runner = ScriptedRunner(num_pages=400, max_context=900)
    engine = Engine(runner, EngineConfig(max_step_tokens=512, max_prefill_tokens=24))
    streams = [
        engine.submit(f"s{k}", [5 + k, 9], SamplingParams(max_tokens=100, ignore_eos=True)) for k in range(4)
    ]
    while any(stream.num_completion_tokens == 0 for stream in streams):
        engine.step()
    long = engine.submit("long", [6] * 700, SamplingParams(max_tokens=4))
    num_steps = 0
    while long.num_completion_tokens == 0:
        runner.most_tokens = 0
        made = engine.step()
        num_steps += 1
        assert runner.most_tokens <= 4 + 24
        assert {progress.sequence for progress in made} >= set(streams)
    assert num_steps == -(-700 // 24)
    alone = Engine(
        ScriptedRunner(num_pages=400, max_context=900),
        EngineConfig(max_step_tokens=512, max_prefill_tokens=24),
    )
    lone = alone.submit("long", [6] * 700, SamplingParams(max_tokens=4))
    alone.step()
    alone.step()
    assert lone.num_completion_tokens == 1  # the cap is for steps that decode


DEFAULT = {"factor": DEFAULT_FACTOR}
FACTORED = DecodePlan(Mode.DIFFUSION, 8, factor=3.0)


@pytest.mark.parametrize(
    ("options", "plan", "sampler", "expected"),
    [
        (DecodingOptions(Mode.DIFFUSION, 8), FACTORED, None, DEFAULT),
        (DecodingOptions(Mode.DIFFUSION, 8), FACTORED, SAMPLER, {"risk": SAMPLER.risk}),
        (DecodingOptions(Mode.DIFFUSION, 8, factor=2.0), FACTORED, SAMPLER, {"factor": 2.0}),
        (DecodingOptions(Mode.DIFFUSION, 8, threshold=0.5), FACTORED, SAMPLER, {"threshold": 0.5}),
        (DecodingOptions(Mode.DIFFUSION, 8, risk=0.1), FACTORED, SAMPLER, {"risk": 0.1}),
        (DecodingOptions(), FACTORED, SAMPLER, {"factor": 3.0}),
        (DecodingOptions(threshold=0.5), FACTORED, None, {"threshold": 0.5}),
        (DecodingOptions(factor=2.0), FACTORED, None, {"factor": 2.0}),
        (DecodingOptions(risk=2.0), FACTORED, SAMPLER, {"risk": 2.0}),
        (DecodingOptions(), replace(FACTORED, factor=None, risk=1.5), SAMPLER, {"risk": 1.5}),
        (DecodingOptions(), replace(FACTORED, factor=None, risk=1.5), None, DEFAULT),
    ],
)
def test_diffusion_runs_as_the_request_says_else_the_plan_else_the_default(options, plan, sampler, expected):
    engine = Engine(ScriptedRunner(sampler=sampler))
    engine.set_plan(plan, "rule")
    sequence = engine.submit("r", [5, 6, 7], SamplingParams(max_tokens=40), options)
    drain(engine)
    bounds = {"threshold": 0.0, **expected}
    alone = naive_diffusion([5, 6, 7], 40, 8, max_context=engine.spec.max_context, **bounds)
    assert sequence.tokens[3:] == alone
    assert engine.snapshot("r").risk == (None if sampler is None else sampler.risk)


def test_a_risk_needs_a_sampler():
    engine = Engine(ScriptedRunner(sampler=None))
    for mode in (None, Mode.DIFFUSION):
        with pytest.raises(TriadError, match="no learned sampler") as caught:
            engine.submit("r", [5], SamplingParams(), DecodingOptions(mode, risk=0.1))
        assert (caught.value.code, caught.value.param) == (ErrorCode.INVALID_REQUEST, "decoding.risk")


def test_a_cap_on_denoising_steps() -> None:
    for max_steps in (1, 3):
        engine = Engine(ScriptedRunner())
        options = DecodingOptions(Mode.DIFFUSION, block_length=8, threshold=1.0, max_steps=max_steps)
        sequence = engine.submit("r", [5, 6], SamplingParams(max_tokens=41, ignore_eos=True), options)
        drain(engine)
        # The first token is the prefill's; a block of 8 ends in its commit and brings 8. The prefill and
        # each commit but the last one are the next block's first denoising.
        assert sequence.num_forwards == 5 * max_steps


def test_cancel_frees_pages_at_once() -> None:
    engine = Engine(ScriptedRunner())
    engine.submit("r", [5] * 30, SamplingParams(max_tokens=40, ignore_eos=True))
    engine.step()
    assert engine.scheduler.pages_used > 0
    assert engine.cancel("r") is not None
    assert engine.scheduler.pages_used == 0
    assert engine.cancel("r") is None
    assert engine.step() == []


def test_deadline_ends_waiting_and_running_requests() -> None:
    now_s = 0.0
    engine = Engine(ScriptedRunner(), EngineConfig(max_running=1), clock=lambda: now_s)
    for name, timeout_s in (("running", 5.0), ("waiting", 3.0), ("patient", None)):
        engine.submit(name, [5, 6], SamplingParams(max_tokens=50, ignore_eos=True), timeout_s=timeout_s)
    engine.step()
    now_s = 3.0
    assert [(made.sequence.request_id, made.error) for made in engine.step() if made.ended] == [
        ("waiting", ErrorCode.DEADLINE_EXCEEDED)
    ]
    now_s = 5.0
    progress = engine.step()
    assert [made.sequence.request_id for made in progress if made.ended] == ["running"]
    patient = [made for made in progress if not made.ended] + drain(engine)["patient"]
    assert tokens_of(patient) == naive_ar([5, 6], 50, ignore_eos=True)


@pytest.mark.parametrize(
    ("prompt", "sampling", "decoding", "code", "param"),
    [
        ([], SamplingParams(), DecodingOptions(), ErrorCode.INVALID_REQUEST, "prompt"),
        ([5], SamplingParams(max_tokens=-1), DecodingOptions(), ErrorCode.INVALID_REQUEST, "max_tokens"),
        (
            [5],
            SamplingParams(stop_token_ids=(300,)),
            DecodingOptions(),
            ErrorCode.INVALID_REQUEST,
            "stop_token_ids",
        ),
        ([5] * 96, SamplingParams(), DecodingOptions(), ErrorCode.CONTEXT_LENGTH_EXCEEDED, "prompt"),
        ([5, 300], SamplingParams(), DecodingOptions(), ErrorCode.INVALID_REQUEST, "prompt"),
        (
            [5],
            SamplingParams(logit_bias=((999, 1.0),)),
            DecodingOptions(),
            ErrorCode.INVALID_REQUEST,
            "logit_bias",
        ),
        (
            [5],
            SamplingParams(max_tokens=3, min_tokens=4),
            DecodingOptions(),
            ErrorCode.INVALID_REQUEST,
            "min_tokens",
        ),
    ],
)
def test_bad_requests_are_refused(prompt, sampling, decoding, code, param) -> None:
    engine = Engine(ScriptedRunner())
    with pytest.raises(TriadError) as caught:
        engine.submit("r", prompt, sampling, decoding)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert not engine.has_work


def test_a_full_queue_refuses() -> None:
    engine = Engine(ScriptedRunner(), EngineConfig(max_running=2, max_waiting=1))
    for k in range(3):
        engine.submit(f"r{k}", [5], SamplingParams(max_tokens=2))
    with pytest.raises(TriadError) as caught:
        engine.submit("r3", [5], SamplingParams(max_tokens=2))
    assert caught.value.code is ErrorCode.QUEUE_FULL
    drain(engine)
    engine.submit("r3", [5], SamplingParams(max_tokens=2))


@pytest.mark.parametrize(
    "limits",
    [{"max_running": 0}, {"max_step_tokens": 64}, {"max_prefill_tokens": 0}, {"max_step_ms": 0.0}],
)
def test_limits_are_checked(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(limits))}\n.*should be greater than"):
        EngineConfig(**limits)


def test_a_pool_smaller_than_one_context_is_refused() -> None:
    with pytest.raises(ValueError, match="can't hold one sequence"):
        Engine(ScriptedRunner(num_pages=8, page_size=4, max_context=96))
