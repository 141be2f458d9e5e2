"""The engine on a real model against the naive reference, token for token: alone, in crowds, across modes."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import replicas
from policies.control.replay import describe
from policies.modes import DecodePlan, Mode
from replicas.config import EngineConfig
from replicas.engine.batch import TokenLogprob
from replicas.engine.engine import Engine
from replicas.engine.sequence import Sequence
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.runner import TorchRunner
from replicas.sampler_file import write_sampler
from replicas.text import TextCodec
from tests.naive_sampler import SAMPLER
from tests.reference import Reference
from tests.tiny_checkpoint import EOS_TOKEN_ID, MASK_TOKEN_ID, VOCAB_SIZE, make_tiny_checkpoint
from training.tasks.registry import held_out_tasks

PLANS = [
    DecodePlan(Mode.AR),
    *(DecodePlan(Mode.SELF_SPECULATION, block) for block in (2, 5, 16)),
    DecodePlan(Mode.DIFFUSION, 8),
    DecodePlan(Mode.DIFFUSION, 16, factor=4.0),
    *(
        DecodePlan(Mode.DIFFUSION, block, t)
        for block, t in ((2, 0.9), (4, 0.3), (8, 0.6), (16, 0.2), (16, 1.0))
    ),
    DecodePlan(Mode.DIFFUSION, 8, risk=0.7),
]
MAX_TOKENS = 40
PLAIN_ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "llama_4_scaling_beta": 0.0,
    "original_max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    make_tiny_checkpoint(path, seed=3)
    write_sampler(path, SAMPLER, "a test")
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture
def engine(folder: Path) -> Engine:
    return make_engine(folder)


ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_adapter_that_denoises_too(tmp_path: Path, tied: bool) -> None:
    """On every projection and in every bidirectional forward, with a mask token of its own, on plain rope."""
    folder = make_tiny_checkpoint(
        tmp_path,
        seed=4,
        adapter_targets=ALL_PROJECTIONS,
        adapter_has_mask_row=True,
        denoise_with_adapter=True,
        tie_word_embeddings=tied,
        rope_parameters=PLAIN_ROPE,
    )
    write_sampler(folder, SAMPLER, "a test")
    reference = Reference(folder)
    engine = make_engine(folder)
    assert set(engine.spec.modes) == set(Mode)
    wanted: dict[Sequence, tuple[int, ...]] = {}
    for index, prompt in enumerate(prompts(len(PLANS), seed=6)):
        plan = PLANS[index]
        sequence = engine.submit(f"r{index}", prompt, SamplingParams(max_tokens=MAX_TOKENS), pinned(plan))
        wanted[sequence] = reference.mixed(prompt, MAX_TOKENS, lambda _, p=plan: p).token_ids
    finish(engine)
    assert {s.request_id: completion(s) for s in wanted} == {s.request_id: t for s, t in wanted.items()}
    reference.denoise_with_adapter = False
    diffused = {s: t for s, t in wanted.items() if s.last_mode is Mode.DIFFUSION}
    without = [
        reference.mixed(s.tokens[: s.num_prompt_tokens], MAX_TOKENS, lambda _, p=plan: p).token_ids
        for s, plan in zip(wanted, PLANS, strict=True)
        if s in diffused
    ]
    assert without != list(diffused.values()), "the adapter makes no difference here"


def make_engine(folder: Path, num_pages: int = 128, **limits: int) -> Engine:
    return Engine(
        TorchRunner.load(str(folder), dtype="float32", num_pages=num_pages, page_size=8),
        EngineConfig(**limits),
    )


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Lengths on both sides of the 16 positions after which YaRN and query scaling bite."""
    rng = random.Random(seed)
    ordinary = [token for token in range(VOCAB_SIZE) if token not in (MASK_TOKEN_ID, EOS_TOKEN_ID)]
    return [[rng.choice(ordinary) for _ in range(rng.choice((1, 3, 9, 20, 37)))] for _ in range(count)]


def pinned(plan: DecodePlan) -> DecodingOptions:
    block_length = None if plan.mode is Mode.AR else plan.block_length
    return DecodingOptions(plan.mode, block_length, plan.threshold, factor=plan.factor, risk=plan.risk)


def finish(engine: Engine, between: Callable[[int], None] = lambda step: None) -> None:
    for step in range(3000):
        if not engine.has_work:
            return
        between(step)
        engine.step()
        engine.check_integrity()
    raise AssertionError("the engine did not finish")


def completion(sequence: Sequence) -> tuple[int, ...]:
    return tuple(sequence.tokens[sequence.num_prompt_tokens :])


@pytest.mark.parametrize("plan", PLANS, ids=describe)
def test_alone(engine: Engine, reference: Reference, plan: DecodePlan) -> None:
    for index, prompt in enumerate(prompts(4)):
        sequence = engine.submit(f"r{index}", prompt, SamplingParams(max_tokens=MAX_TOKENS), pinned(plan))
        finish(engine)
        expected = reference.mixed(prompt, MAX_TOKENS, lambda _: plan)
        assert completion(sequence) == expected.token_ids
        # The engine ends in mid-block of diffusion when max_tokens is near; the reference does not.
        spared = expected.num_forwards - sequence.num_forwards
        assert 0 <= spared < (plan.block_length if plan.mode is Mode.DIFFUSION else 1)


def test_the_tiny_model_is_a_fair_judge(reference: Reference) -> None:
    """Drafts are sometimes right and sometimes wrong, and the thresholds above matter."""
    prompt = prompts(3)[2]
    speculated = [reference.self_speculation(p, MAX_TOKENS, 5, ignore_eos=True) for p in prompts(8)]
    assert any(MAX_TOKENS / 5 < decoded.num_forwards < MAX_TOKENS - 2 for decoded in speculated)
    forwards = {
        t: reference.diffusion(prompt, MAX_TOKENS, 8, t, ignore_eos=True).num_forwards
        for t in (0.2, 0.6, 1.0)
    }
    assert forwards[0.2] < forwards[1.0]
    assert len(set(reference.ar(prompt, MAX_TOKENS, ignore_eos=True).token_ids)) > 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_weights_are_as_lossless(folder: Path, dtype: str) -> None:
    """AR alone and one at a time, then self-speculation of all block lengths in one batch."""
    runner = TorchRunner.load(
        str(folder), dtype=dtype, num_pages=128, page_size=8, forward="native", quantization="int8"
    )
    sampling = SamplingParams(max_tokens=MAX_TOKENS)
    wanted = []
    for index, prompt in enumerate(prompts(12)):
        engine = Engine(runner)
        sequence = engine.submit(f"r{index}", prompt, sampling, pinned(PLANS[0]))
        finish(engine)
        wanted.append(completion(sequence))
    engine = Engine(runner, EngineConfig(max_running=12))
    sequences = [
        engine.submit(f"r{index}", prompt, sampling, pinned(PLANS[1 + index % 3]))
        for index, prompt in enumerate(prompts(12))
    ]
    finish(engine)
    assert [completion(sequence) for sequence in sequences] == wanted
    # Were no draft ever right it would be a forward a token.
    assert any(s.num_forwards < len(completion(s)) - 2 for s in sequences)


@pytest.mark.parametrize("seed", range(3))
def test_in_a_mixed_batch_that_preempts(folder: Path, reference: Reference, seed: int) -> None:
    engine = make_engine(folder, num_pages=24, max_running=9, max_step_tokens=192)
    rng = random.Random(seed)
    wanted: dict[Sequence, tuple[int, ...]] = {}
    for index, prompt in enumerate(prompts(14, seed)):
        plan = PLANS[(index + seed) % len(PLANS)]
        max_tokens = rng.randint(5, MAX_TOKENS)
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        sequence = engine.submit(f"r{index}", prompt, sampling, pinned(plan))
        wanted[sequence] = reference.mixed(prompt, max_tokens, lambda _, p=plan: p, ignore_eos=True).token_ids
    finish(engine)
    assert {s.request_id: completion(s) for s in wanted} == {s.request_id: t for s, t in wanted.items()}
    assert sum(sequence.num_preemptions for sequence in wanted) > 0


def test_mode_changes_in_the_middle(engine: Engine, reference: Reference) -> None:
    """Plans change at random between steps; what each round really ran is what the reference runs."""
    num_begun = num_switches = 0
    for seed in range(5):
        rng = random.Random(seed)
        prompt = prompts(5, seed)[4]
        sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
        sequence = engine.submit("r", prompt, sampling)
        schedule: list[DecodePlan] = []
        apart: set[int] = set()
        plan, running = PLANS[0], None
        while engine.has_work:
            plan = rng.choice([p for p in PLANS if p.threshold != 1.0]) if rng.random() < 0.3 else plan
            engine.set_plan(plan, "test")
            if sequence.round is None and sequence.num_completion_tokens:
                apart.add(len(schedule))
                schedule.append(plan)  # it begins its next round by this plan
            elif sequence.round is not running and (running is not None or not schedule):
                assert sequence.round_plan is not None
                schedule.append(sequence.round_plan)  # the one before, or the prefill, has begun it
            running = sequence.round
            engine.step()
            engine.check_integrity()
        schedule.append(schedule[-1])  # begun, and ended at once
        expected = reference.mixed(prompt, MAX_TOKENS, schedule.__getitem__, ignore_eos=True, apart=apart)
        assert completion(sequence) == expected.token_ids
        num_begun += len(schedule) - 1 - len(apart)
        num_switches += sequence.num_switches
    assert num_begun > 0
    assert num_switches > 0


RULES = SamplingParams(
    max_tokens=MAX_TOKENS,
    presence_penalty=0.5,
    frequency_penalty=0.3,
    repetition_penalty=1.2,
    logit_bias=((40, 0.5), (41, -1.0)),
    min_tokens=30,
    logprobs=2,
)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_penalties_bias_and_logprobs_mean_the_same_in_every_lossless_mode(
    engine: Engine, temperature: float
) -> None:
    prompt = prompts(4)[3]
    plain = engine.submit("plain", prompt, SamplingParams(max_tokens=MAX_TOKENS))
    finish(engine)
    made: dict[str, list[TokenLogprob]] = {}
    engine.set_plan(DecodePlan(Mode.DIFFUSION, 8), "test")
    sampling = replace(RULES, temperature=temperature)
    options = {
        "ar": DecodingOptions(Mode.AR),
        "speculation": DecodingOptions(Mode.SELF_SPECULATION, 6),
        "auto": DecodingOptions(),
    }
    for name, decoding in options.items():
        sequence = engine.submit(name, prompt, sampling, decoding)
        made[name] = []
        while engine.has_work:
            for progress in engine.step():
                made[name] += progress.logprobs
                assert len(progress.logprobs) == len(progress.token_ids)
        assert tuple(entry.token_id for entry in made[name]) == completion(sequence)
    for name in ("speculation", "auto"):
        assert [e.token_id for e in made[name]] == [e.token_id for e in made["ar"]]
        assert [e.logprob for e in made[name]] == pytest.approx([e.logprob for e in made["ar"]], abs=1e-4)
        assert all(len(e.top) == 2 and e.top[0][1] >= e.logprob - 1e-4 for e in made[name])
    assert tuple(e.token_id for e in made["ar"]) != completion(plain)


@pytest.mark.parametrize("options", [DecodingOptions(Mode.AR), DecodingOptions(Mode.SELF_SPECULATION, 6)])
def test_sampled_tokens_do_not_depend_on_the_batch(folder: Path, options: DecodingOptions) -> None:
    """With a seed, AR and self-speculation give the same tokens, alone or in company."""
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.8, top_p=0.95, top_k=20, seed=7)
    prompt = prompts(4)[3]
    alone = make_engine(folder)
    first = alone.submit("r", prompt, sampling, DecodingOptions(Mode.AR))
    finish(alone)
    crowd = make_engine(folder, max_step_tokens=192)
    others = [
        crowd.submit(f"o{k}", other, SamplingParams(max_tokens=30, temperature=1.0, seed=k), pinned(PLANS[k]))
        for k, other in enumerate(prompts(8, seed=5))
    ]
    second = crowd.submit("r", prompt, sampling, options)
    finish(crowd)
    assert completion(second) == completion(first)
    assert len({completion(other) for other in others}) > 1
    other_seed = alone.submit("s", prompt, SamplingParams(max_tokens=MAX_TOKENS, temperature=0.8, seed=8))
    finish(alone)
    assert completion(other_seed) != completion(first)


def test_the_embedded_checkpoint_in_one_mixed_batch() -> None:
    """Real answers, every mode at once, prefixes shared by requests of different modes."""
    folder = Path(replicas.__path__[0]) / "checkpoints" / "triad-5m"
    reference = Reference(folder)
    codec = TextCodec.load(str(folder))
    runner = TorchRunner.load(str(folder), dtype="float32", num_pages=80, page_size=16)
    engine = Engine(runner, EngineConfig(max_running=6, max_step_tokens=192))
    plans = [
        DecodePlan(Mode.AR),
        DecodePlan(Mode.SELF_SPECULATION, 8),
        DecodePlan(Mode.SELF_SPECULATION, 32),
        DecodePlan(Mode.DIFFUSION, 8, 0.9),
        DecodePlan(Mode.DIFFUSION, 16),
        DecodePlan(Mode.DIFFUSION, 32, 0.7),
    ]
    families = ("json", "add", "story")
    wanted: dict[Sequence, tuple[int, ...]] = {}
    for family in families:
        prompt = codec.encode(({"role": "user", "content": next(iter(held_out_tasks(family, 1))).prompt},))
        for plan in plans:
            name = f"{family}-{plan.mode}-{plan.block_length}"
            sequence = engine.submit(name, prompt, SamplingParams(max_tokens=64), pinned(plan))
            wanted[sequence] = reference.mixed(prompt, 64, lambda _, p=plan: p).token_ids
    finish(engine)
    assert {s.request_id: completion(s) for s in wanted} == {s.request_id: t for s, t in wanted.items()}
