"""The GPU's runner against the reference, through the engine and row by row, in Triton's interpreter."""

import random
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.weights_in_8_bits import weights_of
from policies.modes import DecodePlan, Mode
from replicas.answer_forms import JsonFormat
from replicas.config import EngineConfig
from replicas.engine.batch import ScheduledBatch, Segment
from replicas.engine.engine import Engine
from replicas.engine.history import NO_TOKENS, Prefix
from replicas.engine.sequence import Sequence
from replicas.kernels import launch
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.adapter import AdapterRows
from replicas.model.checkpoint import CheckpointError, load_weights
from replicas.model.config import ModelConfig
from replicas.model.cuda.attention import PagedKv, TritonAttention
from replicas.model.cuda.runner import CudaRunner, Options
from replicas.model.runner import TorchRunner
from replicas.model.transformer import Batch, Transformer
from tests.reference import Reference
from tests.replicas.model.conftest import Pages, commit_and_masks, in_two, prompt, segment
from tests.tiny_checkpoint import MASK_TOKEN_ID, make_tiny_checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAX_TOKENS = 6
PLANS = (DecodePlan(Mode.AR), DecodePlan(Mode.SELF_SPECULATION, 5), DecodePlan(Mode.DIFFUSION, 4, 0.3))
EVERYTHING = {
    "temperature": 0.9,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.01,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.2,
    "logit_bias": ((11, 1.5),),
    "min_tokens": 5,
    "logprobs": 3,
    "response_format": JsonFormat("{}"),
}
"""All that a request can ask of the choice of its tokens."""
PROMPTS = ([11, 40, 7], [60 + k for k in range(17)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=3, num_hidden_layers=1)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


def make_runner(folder: Path, options: Options, page_size: int = 8) -> CudaRunner:
    return CudaRunner.load(
        str(folder), dtype="float32", device=DEVICE, num_pages=64, page_size=page_size, options=options
    )


def decoding(plan: DecodePlan) -> DecodingOptions:
    return DecodingOptions(plan.mode, None if plan.mode is Mode.AR else plan.block_length, plan.threshold)


def finish(engine: Engine) -> None:
    for _ in range(500):
        if not engine.has_work:
            return
        engine.step()
        engine.check_integrity()
    raise AssertionError("the engine did not finish")


def completion(sequence: Sequence) -> tuple[int, ...]:
    return tuple(sequence.tokens[sequence.num_prompt_tokens :])


def run_all(runner: CudaRunner, prompts: Seq[list[int]]) -> dict[tuple[int, Mode], tuple[int, ...]]:
    """Every prompt in every mode, in one crowd."""
    engine = Engine(runner, EngineConfig(max_running=6, max_step_tokens=192))
    sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    submitted = {
        (index, plan.mode): engine.submit(f"{index}-{plan.mode}", prompt, sampling, decoding(plan))
        for index, prompt in enumerate(prompts)
        for plan in PLANS
    }
    finish(engine)
    return {key: completion(sequence) for key, sequence in submitted.items()}


def test_engine_runs_equal_the_reference(folder: Path, reference: Reference) -> None:
    """Every mode in one crowd, padded as CUDA graphs need it."""
    found = run_all(make_runner(folder, Options()), PROMPTS)
    for (index, mode), tokens in found.items():
        plan = next(plan for plan in PLANS if plan.mode is mode)
        expected = reference.mixed(PROMPTS[index], MAX_TOKENS, lambda _, p=plan: p, ignore_eos=True)
        assert tokens == expected.token_ids


@pytest.mark.parametrize("plan", PLANS[:2], ids=lambda plan: plan.mode)
def test_steps_begun_ahead_change_no_token(folder: Path, reference: Reference, plan: DecodePlan) -> None:
    runner = make_runner(folder, Options(pads=False))
    engine = Engine(runner)
    sampling = SamplingParams(max_tokens=6, ignore_eos=True)
    first = engine.submit("first", PROMPTS[0], sampling, decoding(plan))
    for _ in range(3):
        engine.step()
    second = engine.submit("second", PROMPTS[0][:2], sampling, decoding(plan))
    finish(engine)
    for sequence, asked in ((first, PROMPTS[0]), (second, PROMPTS[0][:2])):
        expected = reference.mixed(asked, 6, lambda _: plan, ignore_eos=True)
        assert completion(sequence) == expected.token_ids
    assert engine.scheduler.counters.num_ahead > 0


@pytest.mark.skipif(
    not launch.has_dependent_launch(torch.device(DEVICE)), reason="all kernels begin in their turn there"
)
def test_kernels_that_begin_before_their_turn_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In graphs and beside them, to the last bit, over many layers that each follow close on the other."""
    folder = make_tiny_checkpoint(tmp_path, seed=7, num_hidden_layers=12)
    tokens, table = prompt(60, seed=1), tuple(range(8))
    steps = [segment(tokens[:48], table, wanted=(47,)), segment(tokens[48:], table, start=48)]

    def run() -> tuple[dict[tuple[int, Mode], tuple[int, ...]], torch.Tensor]:
        runner = make_runner(folder, Options())
        return run_all(runner, PROMPTS), torch.cat([runner.forward([step]) for step in steps])

    early = [run() for _ in range(3)]
    monkeypatch.setattr(launch, "has_dependent_launch", lambda _: False)
    expected_tokens, expected_logits = run()
    for found_tokens, found_logits in early:
        assert found_tokens == expected_tokens
        assert torch.equal(found_logits, expected_logits)


def test_all_steps_of_a_lone_sequence_are_begun_ahead(folder: Path, reference: Reference) -> None:
    """In ar: past the prompt the device waits for no host, whatever pages it needs."""
    engine = Engine(make_runner(folder, Options(), page_size=8))
    counters = engine.scheduler.counters
    sampling = SamplingParams(max_tokens=24, ignore_eos=True)
    sequence = engine.submit("r", PROMPTS[0], sampling, decoding(PLANS[0]))
    finish(engine)
    assert completion(sequence) == reference.ar(PROMPTS[0], 24, ignore_eos=True).token_ids
    assert (counters.num_steps, counters.num_ahead, counters.num_in_vain) == (24, 23, 0)


@pytest.mark.parametrize("seed", range(2))
def test_a_crowd_of_which_steps_are_begun_ahead_gets_what_each_would_alone(folder: Path, seed: int) -> None:
    """Prompts in chunks, arrivals, a cancel, temperatures, ends of text and pages taken from others."""
    rng = random.Random(seed)
    runner = CudaRunner.load(
        str(folder),
        dtype="float32",
        device=DEVICE,
        num_pages=14,
        page_size=4,
        max_context=40,
        options=Options(pads=False),
    )
    engine = Engine(runner, EngineConfig(max_running=4, max_step_tokens=192, max_prefill_tokens=7))
    on_cpu = TorchRunner.load(str(folder), num_pages=64, page_size=4, max_context=40)
    expected, submitted = {}, {}
    for number in range(7):
        tokens = prompt(rng.randint(1, 24), seed=rng.randrange(99))
        sampling = SamplingParams(
            max_tokens=rng.randint(2, 8), temperature=rng.choice((0.0, 0.9)), seed=number
        )
        options = decoding(rng.choice((PLANS[0], DecodePlan(Mode.SELF_SPECULATION, 3))))
        alone = Engine(on_cpu)
        expected[number] = alone.submit("r", tokens, sampling, DecodingOptions(Mode.AR))
        finish(alone)
        submitted[number] = engine.submit(str(number), tokens, sampling, options)
        engine.step()
        engine.check_integrity()
    cancelled = rng.choice([sequence.request_id for sequence in engine.scheduler.running])
    engine.cancel(cancelled)
    finish(engine)
    for number, sequence in submitted.items():
        found = completion(sequence)
        whole = completion(expected[number])
        assert found == (whole[: len(found)] if str(number) == cancelled else whole)
    counters = engine.scheduler.counters
    assert counters.num_ahead > counters.num_steps / 3
    assert counters.num_in_vain > 0


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9, "top_k": 20}, {"repetition_penalty": 1.3}], ids=str)
def test_sampled_tokens_are_the_cpus(folder: Path, filters: dict[str, float]) -> None:
    """By the kernel or by the sampler, and the same in self-speculation as in AR."""
    sampling = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.9, seed=3, **filters)
    made = []
    for runner, plan in (
        (TorchRunner.load(str(folder), num_pages=64, page_size=8), PLANS[0]),
        (make_runner(folder, Options(pads=False, runs_ahead=False)), PLANS[0]),
        (make_runner(folder, Options()), DecodePlan(Mode.SELF_SPECULATION, 3)),
    ):
        engine = Engine(runner)
        sequence = engine.submit("r", PROMPTS[0][:2], sampling, decoding(plan))
        finish(engine)
        made.append(completion(sequence))
    assert made[0] == made[1] == made[2]


def test_diffusion_under_rules_is_the_cpus(folder: Path) -> None:
    """Penalties that count what a block has fixed, and a commit that tells of all its rows."""
    rules = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=1, presence_penalty=0.9)
    made = []
    for runner in (TorchRunner.load(str(folder), num_pages=64, page_size=8), make_runner(folder, Options())):
        engine = Engine(runner)
        sequence = engine.submit("r", PROMPTS[0], rules, decoding(PLANS[2]))
        finish(engine)
        made.append(completion(sequence))
    assert made[0] == made[1]


@pytest.mark.parametrize("plan", PLANS[:2], ids=lambda plan: plan.mode)
def test_filtered_steps_are_begun_ahead_and_draw_the_cpus_tokens(folder: Path, plan: DecodePlan) -> None:
    """Filters, biases and log-probabilities need nothing that the device does not know."""
    sampling = SamplingParams(
        max_tokens=12, temperature=0.9, seed=3, top_p=0.9, top_k=20, min_p=0.01,
        logit_bias=((11, 1.5),), min_tokens=6, logprobs=2,
    )  # fmt: skip
    made, num_ahead = [], []
    ahead = make_runner(folder, Options(pads=False), page_size=64)
    for runner in (TorchRunner.load(str(folder), num_pages=64, page_size=64), ahead):
        engine = Engine(runner)
        sequence = engine.submit("r", PROMPTS[0], sampling, decoding(plan))
        finish(engine)
        made.append(completion(sequence))
        num_ahead.append(engine.scheduler.counters.num_ahead)
    assert made[0] == made[1]
    assert num_ahead[1] >= (5 if plan.mode is Mode.AR else 1)


def _mixed(reference: Reference, runner: CudaRunner) -> tuple[list[Segment], torch.Tensor]:
    """Segments of every kind, and their logits; the adapter is on in a draft, alone and behind a verify."""
    pages = Pages(60, 8)
    segments, expected = [], []
    kinds = (
        ("draft", 18, 4, 0),
        ("denoise", 3, 3, 0),
        ("verify", 9, 4, 4),
        ("step", 20, 1, 1),
        ("", 13, 7, 3),
        ("verify and draft", 11, 8, 5),
    )
    for seq_id, (kind, start, length, num_causal) in enumerate(kinds):
        tokens = prompt(start + length, seed=seq_id)
        table = pages.table(start + length)
        runner.forward([segment(tokens[:start], table, wanted=(0,))])
        border = start + num_causal
        known = max(num_causal, 1)
        block = [*tokens[start : start + known], *[MASK_TOKEN_ID] * (length - known)]
        adapter = "draft" in kind
        wanted = range(0 if num_causal else 1, length)
        segments.append(
            segment(
                block,
                table,
                start=start,
                num_causal=num_causal,
                adapter=adapter,
                wanted=wanted,
                seq_id=seq_id,
            )
        )
        rows = reference.causal_logits(tokens)[start:border]
        if num_causal < length:
            behind = reference.block_logits(tokens[:border], block[num_causal:], adapter=adapter)
            rows = torch.cat((rows, behind))
        expected.append(rows[list(wanted)])
    return segments, torch.cat(expected)


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_logits_of_a_mixed_step(tmp_path: Path, kv_dtype: str) -> None:
    """With an adapter on every projection; fp8 pages lose digits but not the drift of the logits."""
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    folder = make_tiny_checkpoint(tmp_path, seed=5, adapter_targets=targets, num_hidden_layers=1)
    reference = Reference(folder)
    runner = CudaRunner.load(
        str(folder), dtype="float32", device=DEVICE, num_pages=64, page_size=8, kv_dtype=kv_dtype
    )
    segments, expected = _mixed(reference, runner)
    found = runner.forward(segments).cpu()
    if kv_dtype == "auto":
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    else:
        assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.9


def test_a_commit_with_the_next_block_behind_it_is_two_steps(folder: Path) -> None:
    """By tokens, probabilities and K/V."""
    together, apart = (make_runner(folder, Options()) for _ in range(2))
    tokens, other = prompt(14, seed=2), prompt(5, seed=3)
    table, other_table = Pages(60, 8).table(30), (63,)
    sampling = SamplingParams(max_tokens=1, temperature=0.9, seed=4)
    both = commit_and_masks(tokens[4:], 6, table, start=4, sampling=sampling)
    commit, block = in_two(both)
    for runner in (together, apart):
        runner.run(ScheduledBatch((segment(tokens[:4], table, wanted=()),)))
        step = segment(other[:1], other_table, seq_id=1)
        runner.run(
            ScheduledBatch((replace(both, token_ids=both.token_ids[:1], num_causal=1, wanted=(0,)), step))
        )
    verify = segment(other[1:], other_table, start=1, seq_id=1)
    found, checked = together.run(ScheduledBatch((both, verify)))
    first, expected = apart.run(ScheduledBatch((commit, verify)))
    [second] = apart.run(ScheduledBatch((block,)))
    assert checked.token_ids == expected.token_ids
    assert found.token_ids == first.token_ids + second.token_ids
    assert found.probs == pytest.approx(first.probs + second.probs, abs=1e-4)
    torch.testing.assert_close(kv_pages(together), kv_pages(apart), atol=1e-4, rtol=1e-4)


def kv_pages(runner: CudaRunner) -> torch.Tensor:
    return runner.model._layers[0]._attention._pages.layers


@pytest.mark.skipif(DEVICE == "cuda", reason="the CPU's transformer hands over the CPU's tensors")
def test_triton_attention_under_the_cpus_transformer(tmp_path: Path) -> None:
    """Both devices' attention have one signature."""
    folder = make_tiny_checkpoint(tmp_path, seed=6, num_hidden_layers=1)
    config = ModelConfig.from_folder(folder)
    pages = PagedKv(config, 8, 8, torch.float32, torch.device("cpu"))
    attention = TritonAttention(config, pages, 64)
    model = Transformer(config, load_weights(folder, config, torch.float32), attention, 64)
    tokens = prompt(21, seed=1)
    plan = attention.plan([segment(tokens, (5, 2, 7))])
    found = model.forward(Batch(torch.tensor(tokens), plan, None, None, None))
    torch.testing.assert_close(found, Reference(folder).causal_logits(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(DEVICE == "cuda", reason="the reference's attention is the CPU's")
@pytest.mark.parametrize(("codes", "length"), [("int8", 21), ("int8", 70), ("fp8", 21), ("fp8", 70)])
@pytest.mark.parametrize("targets", [("o_proj",), ("q_proj", "v_proj", "up_proj", "down_proj")], ids=len)
def test_codes_of_weights_are_the_numbers_they_stand_for(
    tmp_path: Path, codes: str, length: int, targets: tuple[str, ...]
) -> None:
    """With few rows and many, and with the adapter on a product and beside it."""
    folder = make_tiny_checkpoint(tmp_path, seed=6, num_hidden_layers=2, adapter_targets=targets)
    config = ModelConfig.from_folder(folder)
    runner = CudaRunner.load(
        str(folder), dtype="float32", device=DEVICE, num_pages=16, page_size=8, quantization=codes
    )
    weights = weights_of(folder, config, codes)
    pages = PagedKv(config, 16, 8, torch.float32, torch.device("cpu"))
    attention = TritonAttention(config, pages, 128)
    tokens, table = prompt(length, seed=1), tuple(range(12))
    draft = segment(
        [tokens[-1], *[MASK_TOKEN_ID] * 4],
        table,
        start=length - 1,
        num_causal=0,
        adapter=True,
        wanted=range(1, 5),
    )
    model = Transformer(config, weights, attention, 128)
    for asked in (segment(tokens, table, wanted=range(length)), draft):
        plan = attention.plan([asked])
        rows = AdapterRows(None) if asked.adapter else None
        batch = Batch(torch.tensor(asked.token_ids), plan, torch.tensor(asked.wanted), rows, rows)
        found = runner.forward([asked])
        torch.testing.assert_close(found, model.forward(batch), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"dtype": "int4"}, "dtype"),
        ({"quantization": "int4"}, "quantization"),
        ({"kv_dtype": "int8"}, "kv_dtype"),
        ({"num_pages": 0}, "K/V"),
    ],
)
def test_bad_options_are_named(folder: Path, given: dict[str, object], word: str) -> None:
    with pytest.raises(CheckpointError, match=word):
        CudaRunner.load(str(folder), **{"dtype": "float32", "device": DEVICE, **given})


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU to wait for")
@pytest.mark.parametrize("asked", [{}, {"temperature": 0.9}, EVERYTHING], ids=len)
def test_queueing_a_step_waits_for_nothing(folder: Path, asked: dict) -> None:
    """Once its graph is captured; the tokens are waited for by an event, which is no synchronising call."""
    runner = make_runner(folder, Options())
    tokens = prompt(4, seed=1)
    sampling = SamplingParams(max_tokens=9, seed=3, **asked)
    history = Prefix.of(tokens, 4) if sampling.has_penalties else NO_TOKENS
    allowed = (b"\xff" * 13,) if sampling.needs_grammar else ()
    runner.run(ScheduledBatch((segment(tokens, (0, 1), wanted=(3,)),)))

    def step(number: int) -> ScheduledBatch:
        part = segment([7], (0, 1), start=4 + number)
        return ScheduledBatch((replace(part, sampling=sampling, history=history, allowed=allowed),))

    runner.run(step(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(1, 4):
            runner.run(step(number))
    finally:
        torch.cuda.set_sync_debug_mode("default")
