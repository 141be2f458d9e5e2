"""The runner's forwards against transformers' own layers, row by row."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from policies.modes import Mode
from replicas.engine.batch import ScheduledBatch
from replicas.messages import SamplingParams
from replicas.model.checkpoint import DTYPES
from replicas.model.native.model import quantize
from replicas.model.runner import TorchRunner
from tests.reference import Reference
from tests.replicas.model.conftest import (
    LogitsProbe,
    Pages,
    commit_and_masks,
    in_two,
    poisoned_runner,
    prompt,
    segment,
)
from tests.tiny_checkpoint import MASK_TOKEN_ID, make_tiny_checkpoint


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert found.argmax(-1).tolist() == expected.argmax(-1).tolist()


def without_mask(logits: torch.Tensor) -> torch.Tensor:
    logits = logits.clone()
    logits[:, MASK_TOKEN_ID] = float("-inf")
    return logits


def test_spec_says_what_the_checkpoint_is(runner: TorchRunner) -> None:
    spec = runner.spec
    assert set(spec.modes) == set(Mode)
    assert spec.mask_token_id == MASK_TOKEN_ID
    assert spec.eos_token_ids == {2}
    assert (spec.max_context, spec.num_pages, spec.page_size) == (256, 120, 5)


def test_whole_prefill_equals_transformers(runner: TorchRunner, reference: Reference) -> None:
    tokens = prompt(70, seed=1)
    [logits] = LogitsProbe(runner)(segment(tokens, Pages(120, 5).table(70)))
    assert_same(logits, reference.causal_logits(tokens))


@pytest.mark.parametrize("cuts", [(1,), (7, 8, 30), (16, 32, 48), (33, 69)])
def test_chunked_prefill_equals_whole(
    runner: TorchRunner, reference: Reference, cuts: tuple[int, ...]
) -> None:
    tokens = prompt(70, seed=2)
    pages = Pages(120, 5).table(70)
    probe = LogitsProbe(runner)
    bounds = (0, *cuts, 70)
    chunks = [
        probe(segment(tokens[low:high], pages, start=low))[0] for low, high in itertools.pairwise(bounds)
    ]
    assert_same(torch.cat(chunks), reference.causal_logits(tokens))


def test_single_token_steps_equal_whole(runner: TorchRunner, reference: Reference) -> None:
    tokens = prompt(40, seed=3)
    pages = Pages(120, 5).table(40)
    probe = LogitsProbe(runner)
    probe(segment(tokens[:12], pages, wanted=()))
    steps = [probe(segment([token], pages, start=12 + i))[0] for i, token in enumerate(tokens[12:])]
    assert_same(torch.cat(steps), reference.causal_logits(tokens)[12:])


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("prefix_length", [0, 3, 15, 40])
def test_bidirectional_segment(
    runner: TorchRunner, reference: Reference, adapter: bool, prefix_length: int
) -> None:
    tokens = prompt(prefix_length + 1, seed=4)
    block = [tokens[-1], *[MASK_TOKEN_ID] * 10]
    pages = Pages(120, 5).table(prefix_length + 11)
    probe = LogitsProbe(runner)
    if prefix_length:
        probe(segment(tokens[:-1], pages, wanted=()))
    [logits] = probe(segment(block, pages, start=prefix_length, num_causal=0, adapter=adapter))
    assert_same(logits, reference.block_logits(tokens[:-1], block, adapter=adapter))


def test_adapter_changes_the_draft(reference: Reference) -> None:
    prefix, block = prompt(20, seed=5), [9, *[MASK_TOKEN_ID] * 7]
    with_adapter = reference.block_logits(prefix, block, adapter=True)
    without = reference.block_logits(prefix, block, adapter=False)
    assert (with_adapter.argmax(-1) != without.argmax(-1)).any()


def test_causal_rewrite_after_a_draft(runner: TorchRunner, reference: Reference) -> None:
    """The K/V that a bidirectional segment left in the pages does not survive the verify."""
    tokens = prompt(30, seed=6)
    pages = Pages(120, 5).table(40)
    probe = LogitsProbe(runner)
    probe(segment(tokens[:20], pages, wanted=()))
    probe(segment([tokens[20], *[MASK_TOKEN_ID] * 9], pages, start=20, num_causal=0, adapter=True))
    [logits] = probe(segment(tokens[20:], pages, start=20))
    assert_same(logits, reference.causal_logits(tokens)[20:])


def _mixed_step(runner: TorchRunner, reference: Reference, seed: int) -> tuple[list, list[torch.Tensor]]:
    """Segments of all kinds with their prefixes already cached, and the logits each must give."""
    pages = Pages(runner.spec.num_pages - 2, runner.spec.page_size, seed)
    segments, expected = [], []
    kinds = [
        ("prefill", 0, 33), ("step", 50, 1), ("draft", 20, 16), ("denoise", 35, 8), ("verify", 18, 16),
        ("step", 3, 1), ("chunk", 12, 70), ("draft", 2, 4), ("step", 17, 1), ("denoise", 60, 32),
        ("commit and masks", 16, 31), ("verify and draft", 21, 17),
    ]  # fmt: skip
    for seq_id, (kind, start, length) in enumerate(kinds):
        tokens = prompt(start + length, seed=seed * 100 + seq_id)
        table = pages.table(start + length)
        if start:
            runner.run(ScheduledBatch((segment(tokens[:start], table, wanted=()),)))
        block, adapter = tokens[start:], kind in ("draft", "verify and draft")
        num_causal, wanted = length, range(length) if kind != "prefill" else range(length - 1, length)
        rows = reference.causal_logits(tokens)[start:]
        if kind in ("draft", "denoise"):
            block = [block[0], *[MASK_TOKEN_ID] * (length - 1)]
            num_causal, wanted = 0, range(1, length)
            rows = reference.block_logits(tokens[:start], block, adapter=adapter)
        elif kind in ("commit and masks", "verify and draft"):
            num_causal = length // 2
            block[num_causal:] = [MASK_TOKEN_ID] * (length - num_causal)
            behind = reference.block_logits(tokens[: start + num_causal], block[num_causal:], adapter=adapter)
            rows = torch.cat((rows[:num_causal], behind))
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
        expected.append(rows[list(wanted)])
    return segments, expected


@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_mixed_batch_of_all_kinds(
    tiny_folder: Path, reference: Reference, page_size: int, forward: str
) -> None:
    runner = poisoned_runner(tiny_folder, forward, page_size=page_size, num_pages=700 // page_size)
    segments, expected = _mixed_step(runner, reference, seed=page_size)
    for found, rows in zip(LogitsProbe(runner)(*segments), expected, strict=True):
        assert_same(found, rows)


def test_outputs_are_in_the_plans_order(runner: TorchRunner, reference: Reference) -> None:
    segments, expected = _mixed_step(runner, reference, seed=2)
    segments.append(segment(prompt(6, seed=9), (118, 119), wanted=()))
    outputs = runner.run(ScheduledBatch(tuple(segments)))
    assert outputs[-1].token_ids == outputs[-1].probs == ()
    for output, rows in zip(outputs, expected, strict=False):
        probs = without_mask(rows).softmax(-1)
        assert list(output.token_ids) == probs.argmax(-1).tolist()
        assert output.probs == pytest.approx(probs.max(-1).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_a_commit_with_the_next_block_behind_it_is_two_forwards(
    tiny_folder: Path, forward: str, page_size: int, temperature: float
) -> None:
    """By tokens, probabilities and all K/V, with borders anywhere and a step and a draft in the batch."""
    together, apart = (
        poisoned_runner(tiny_folder, forward, page_size=page_size, num_pages=700 // page_size)
        for _ in range(2)
    )
    generator = torch.Generator().manual_seed(page_size)

    def draw(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (1,), generator=generator))

    for seed in range(3):
        pages = Pages(700 // page_size, page_size, seed)
        starts = [draw(0, 60) for _ in range(4)]
        mixed = []
        for index, start in enumerate(starts):
            num_causal, num_masks = draw(1, 45), draw(1, 33)
            tokens = prompt(start + num_causal, seed=seed * 10 + index)
            table = pages.table(start + num_causal + num_masks)
            sampling = SamplingParams(max_tokens=1, temperature=temperature, seed=index)
            part = commit_and_masks(
                tokens[start:], num_masks, table, start=start, adapter=index % 2 == 0, sampling=sampling
            )
            mixed.append(dataclasses.replace(part, seq_id=index))
            if start:
                for runner in (together, apart):
                    runner.run(ScheduledBatch((segment(tokens[:start], table, wanted=()),)))
        others = [
            segment([9], pages.table(1), seq_id=8),
            segment([9, 5, 5], pages.table(3), num_causal=0, adapter=True, wanted=(1, 2), seq_id=9),
        ]
        outputs = together.run(ScheduledBatch((*mixed, *others)))
        commits, blocks = zip(*map(in_two, mixed), strict=True)
        first = apart.run(ScheduledBatch((*commits, *others)))
        second = apart.run(ScheduledBatch(blocks))
        for output, commit, block in zip(outputs[: len(mixed)], first, second, strict=False):
            assert output.token_ids == commit.token_ids + block.token_ids
            assert output.probs == pytest.approx(commit.probs + block.probs, abs=1e-4)
        for found, expected in zip(together._model.pages, apart._model.pages, strict=True):
            torch.testing.assert_close(
                found.view(torch.float32), expected.view(torch.float32), atol=1e-4, rtol=1e-4
            )


def test_more_adapter_targets(tmp_path: Path, forward: str) -> None:
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    folder = make_tiny_checkpoint(tmp_path, seed=3, adapter_targets=targets, use_rslora=True)
    reference, runner = Reference(folder), poisoned_runner(folder, forward)
    segments, expected = _mixed_step(runner, reference, seed=4)
    for found, rows in zip(LogitsProbe(runner)(*segments), expected, strict=True):
        assert_same(found, rows)
    only_drafts = [part for part in segments if part.adapter]
    with_adapter = [index for index, part in enumerate(segments) if part.adapter]
    for found, index in zip(LogitsProbe(runner)(*only_drafts), with_adapter, strict=True):
        assert_same(found, expected[index])


def test_some_adapter_targets(tmp_path: Path, forward: str) -> None:
    folder = make_tiny_checkpoint(tmp_path, seed=4, adapter_targets=("k_proj", "up_proj"))
    reference, runner = Reference(folder), poisoned_runner(folder, forward)
    segments, expected = _mixed_step(runner, reference, seed=5)
    for found, rows in zip(LogitsProbe(runner)(*segments), expected, strict=True):
        assert_same(found, rows)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_gets_the_same_tokens_in_any_batch(
    runner: TorchRunner, reference: Reference, temperature: float
) -> None:
    segments, _ = _mixed_step(runner, reference, seed=6)
    for index, part in enumerate(segments):
        sampling = SamplingParams(max_tokens=1, temperature=temperature, top_p=0.9, top_k=20, seed=index)
        segments[index] = dataclasses.replace(part, sampling=sampling)
    together = runner.run(ScheduledBatch(tuple(segments)))
    for index, part in enumerate(segments):
        [alone] = runner.run(ScheduledBatch((part,)))
        assert alone.token_ids == together[index].token_ids
    backwards = runner.run(ScheduledBatch(tuple(segments[::-1])))[::-1]
    assert [output.token_ids for output in backwards] == [output.token_ids for output in together]


def test_mask_token_is_never_chosen(runner: TorchRunner, reference: Reference) -> None:
    tokens = prompt(200, seed=8)
    assert MASK_TOKEN_ID in reference.causal_logits(tokens).argmax(-1)
    pages = Pages(120, 5).table(200)
    for temperature in (0.0, 2.0):
        sampling = SamplingParams(max_tokens=1, temperature=temperature)
        [output] = runner.run(ScheduledBatch((segment(tokens, pages, sampling=sampling),)))
        assert MASK_TOKEN_ID not in output.token_ids


def test_random_ragged_batches(tiny_folder: Path, reference: Reference, forward: str) -> None:
    """Any lengths, so that every way of grouping and padding occurs."""
    generator = torch.Generator().manual_seed(11)
    for seed in range(6):
        runner = poisoned_runner(tiny_folder, forward, page_size=4, num_pages=400)
        pages = Pages(400, 4, seed)
        probe = LogitsProbe(runner)
        segments, expected = [], []
        for index in range(int(torch.randint(1, 9, (1,), generator=generator))):
            start = int(torch.randint(0, 60, (1,), generator=generator))
            length = int(2 ** (torch.rand(1, generator=generator) * 6.5))
            tokens = prompt(start + length, seed=seed * 50 + index)
            table = pages.table(start + length)
            if start:
                runner.run(ScheduledBatch((segment(tokens[:start], table, wanted=()),)))
            segments.append(segment(tokens[start:], table, start=start))
            expected.append(reference.causal_logits(tokens)[start:])
        for found, rows in zip(probe(*segments), expected, strict=True):
            assert_same(found, rows)


def test_empty_plan(runner: TorchRunner) -> None:
    assert list(runner.run(ScheduledBatch(()))) == []


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_weights_equal_the_same_weights_in_full(tmp_path: Path, dtype: str, tied: bool) -> None:
    """The reference holds each code times its scale; embedding and adapter are not quantised."""
    targets = ("q_proj", "o_proj", "gate_proj", "down_proj")
    folder = make_tiny_checkpoint(
        tmp_path / "whole", seed=8, adapter_targets=targets, tie_word_embeddings=tied
    )
    runner = poisoned_runner(folder, "native", dtype=dtype, quantization="int8")
    segments, expected = _mixed_step(
        runner, Reference(_dequantised(folder, tmp_path / "dequantised")), seed=9
    )
    for found, rows in zip(LogitsProbe(runner)(*segments), expected, strict=True):
        if dtype == "float32":
            assert_same(found, rows)
        else:
            assert torch.nn.functional.cosine_similarity(found, rows, dim=-1).mean() > 0.98


def _dequantised(folder: Path, to: Path) -> Path:
    """The checkpoint with its linear layers' weights rounded as int8 codes round them, its head its own."""
    shutil.copytree(folder, to)
    weights = load_file(folder / "model.safetensors")
    weights.setdefault("diffusion_head.weight", weights["encoder.embed_tokens.weight"].clone())
    for name, weight in weights.items():
        if "_proj" in name or name == "diffusion_head.weight":
            codes, scales = quantize(weight)
            weights[name] = codes * scales[:, None]
    save_file(weights, to / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return to


def test_bfloat16_runs_and_is_close(tiny_folder: Path, reference: Reference, forward: str) -> None:
    runner = poisoned_runner(tiny_folder, forward, dtype="bfloat16")
    segments, expected = _mixed_step(runner, reference, seed=7)
    for found, rows in zip(LogitsProbe(runner)(*segments), expected, strict=True):
        assert found.isfinite().all()
        assert torch.nn.functional.cosine_similarity(found.float(), rows, dim=-1).mean() > 0.98


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("page_size", [5, 16])
def test_what_others_left_in_a_page_changes_no_bit(
    tiny_folder: Path, forward: str, page_size: int, dtype: str
) -> None:
    """Not even where a model has overflowed for them."""
    seen = []
    for left in (0.0, float("nan"), float("inf")):
        runner = TorchRunner.load(
            str(tiny_folder), dtype=dtype, num_pages=120, page_size=page_size, forward=forward
        )
        for pages in runner._model.pages:
            pages.view(DTYPES[dtype]).fill_(left)
        probe, table = LogitsProbe(runner), Pages(120, page_size).table(90)
        rows = []
        for start in (1, 4, 7, 16, 31, 40):
            tokens = prompt(start + 6, seed=start)
            rows += probe(segment(tokens[:start], table))
            rows += probe(segment([tokens[start], *[MASK_TOKEN_ID] * 5], table, start=start, num_causal=0))
            rows += probe(segment(tokens[start : start + 3], table, start=start))
            rows += probe(segment(tokens[start + 3 : start + 4], table, start=start + 3))
        seen.append(torch.cat(rows))
    assert seen[0].isfinite().all()
    for rows in seen[1:]:
        assert torch.equal(rows, seen[0])
