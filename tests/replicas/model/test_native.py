"""The native forward: what holds for it beyond the parity that test_runner.py checks on both forwards."""

import itertools
import logging
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from replicas.config import ReplicaConfig
from replicas.engine.batch import Segment
from replicas.engine.history import Prefix
from replicas.messages import SamplingParams
from replicas.model.checkpoint import CheckpointError
from replicas.model.config import ModelConfig
from replicas.model.logit_rules import Row, apply_rules
from replicas.model.native import build
from replicas.model.native.build import NativeUnavailable
from replicas.model.native.model import quantize, require_native
from replicas.model.runner import TorchModel, TorchRunner, rows_of
from replicas.model.sampler import choose
from replicas.runner_loader import load_runner
from tests.replicas.model.conftest import (
    LogitsProbe,
    Pages,
    commit_and_masks,
    in_two,
    poisoned_runner,
    prompt,
    segment,
)
from tests.replicas.model.test_logit_rules import EOS, VOCAB, random_params, random_segment
from tests.tiny_checkpoint import tiny_config

CONFIG = ReplicaConfig(dtype="float32", quantization="int8", kv_cache_mb=1)


@pytest.fixture
def fresh_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing compiled yet, for this machine or for others; the folder for what will be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "PORTABLE_FOLDER", tmp_path / "portable")
    build.load_library.cache_clear()
    yield tmp_path / "cache" / "triad"
    build.load_library.cache_clear()


def some_segments(pages: Pages, probe: LogitsProbe) -> list[Segment]:
    """Lengths around the number of rows summed together, each with a prefix cached; the last two are a
    draft, and a commit with a block behind it."""
    segments = []
    shapes = [(40, 1), (7, 5), (30, 12), (0, 25), (11, 13), (3, 1), (50, 16), (45, 33)]
    for index, (start, length) in enumerate(shapes):
        tokens, table = prompt(start + length, seed=index), pages.table(start + length)
        if start:
            probe(segment(tokens[:start], table, wanted=()))
        num_causal = {6: 0, 7: 17}.get(index)
        segments.append(
            segment(tokens[start:], table, start=start, num_causal=num_causal, adapter=index == 6)
        )
    return segments


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_does_not_depend_on_the_batch(tiny_folder: Path, dtype: str, quantization: str | None) -> None:
    """Bit for bit: alone, with others, in any order, in chunks. So a verify gives AR's logits."""
    runner = poisoned_runner(
        tiny_folder, "native", page_size=16, num_pages=60, dtype=dtype, quantization=quantization
    )
    probe = LogitsProbe(runner)
    segments = some_segments(Pages(60, 16), probe)
    together = probe(*segments)
    for part, rows in zip(segments, together, strict=True):
        assert torch.equal(probe(part)[0], rows)
    for rows, found in zip(together, reversed(probe(*reversed(segments))), strict=True):
        assert torch.equal(found, rows)
    whole, rows = segments[3], together[3]
    chunks = [
        probe(segment(whole.token_ids[low:high], whole.pages, start=low))[0]
        for low, high in itertools.pairwise((0, 1, 2, 9, 25))
    ]
    assert torch.equal(torch.cat(chunks), rows)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masks_behind_a_commit_change_no_bit(tiny_folder: Path, dtype: str, adapter: bool) -> None:
    """Of its logits and K/V, and theirs are those of a forward after it; with borders in and between the
    blocks of queries that attention takes at once."""
    together, apart = (
        LogitsProbe(poisoned_runner(tiny_folder, "native", page_size=16, num_pages=16, dtype=dtype))
        for _ in range(2)
    )
    for start, border, num_masks in itertools.product((0, 5, 70), (1, 7, 10, 12, 30), (1, 8, 33)):
        tokens, table = prompt(start + border, seed=border), Pages(16, 16, start).table(140)
        both = commit_and_masks(tokens[start:], num_masks, table, start=start, adapter=adapter)
        commit, block = in_two(both)
        for probe in (together, apart):
            if start:
                probe(segment(tokens[:start], table, wanted=()))
        [found] = together(both)
        assert torch.equal(found, torch.cat((apart(commit)[0], apart(block)[0])))
        for pages, expected in zip(together.runner._model.pages, apart.runner._model.pages, strict=True):
            assert torch.equal(pages, expected)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="builds for kinds of x86")
@pytest.mark.parametrize("kind", ["haswell", "x86-64"])
@pytest.mark.parametrize(
    ("dtype", "quantization"), [("float32", None), ("bfloat16", None), ("bfloat16", "int8")]
)
def test_built_for_a_narrower_processor(
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    kind: str,
    dtype: str,
    quantization: str | None,
) -> None:
    """Vectors of 8 and of 4 lanes give what this machine's own build gives, whatever the batch.

    Built once a kind, beside the machine's own library, for all dtypes.
    """
    if kind == "haswell" and " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")

    def load() -> LogitsProbe:
        return LogitsProbe(
            poisoned_runner(
                tiny_folder, "native", page_size=16, num_pages=60, dtype=dtype, quantization=quantization
            )
        )

    own = load()
    expected = own(*some_segments(Pages(60, 16), own))
    flags = tuple(flag for flag in build._FLAGS if not flag.startswith("-march"))
    monkeypatch.setattr(build, "_FLAGS", (*flags, f"-march={kind}"))
    build.load_library.cache_clear()
    request.addfinalizer(build.load_library.cache_clear)
    probe = load()
    segments = some_segments(Pages(60, 16), probe)
    found = probe(*segments)
    tolerance = 1e-4 if dtype == "float32" else 0.05
    for part, rows, wanted in zip(segments, found, expected, strict=True):
        torch.testing.assert_close(rows, wanted, rtol=tolerance, atol=tolerance)
        assert torch.equal(probe(part)[0], rows)


def test_threads_do_not_change_results(tiny_folder: Path) -> None:
    tokens, pages = prompt(60, seed=3), Pages(60, 16).table(60)
    found = []
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        runner = poisoned_runner(tiny_folder, "native", page_size=16, num_pages=60)
        found.append(LogitsProbe(runner)(segment(tokens, pages))[0])
    torch.set_num_threads(1)
    assert torch.equal(*found)


def test_choose_equals_torch(tiny_folder: Path) -> None:
    model = poisoned_runner(tiny_folder, "native")._model
    generator = torch.Generator().manual_seed(1)
    for width in (5, 16, 97, 1000):
        logits = torch.randn(7, width, generator=generator) * 9
        logits[2, 3] = logits[2, 1] = 40.0  # of equal ones the first
        for forbidden in (None, 4):
            tokens, normalisers = model.choose(logits.clone(), forbidden)
            expected_tokens, expected = choose(logits.clone(), forbidden)
            assert tokens.tolist() == expected_tokens.tolist()
            torch.testing.assert_close(normalisers, expected)


@pytest.mark.parametrize("width", [5, 16, 97, 1000])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_choose_tells_of_a_row_that_is_not_finite(tiny_folder: Path, width: int, value: float) -> None:
    """Wherever in it that is; its token is some id, and the other rows are as they were."""
    model = poisoned_runner(tiny_folder, "native")._model
    logits = torch.randn(3, width, generator=torch.Generator().manual_seed(2))
    logits[2] = -torch.inf
    expected_tokens, expected = choose(logits.clone(), None)
    for at in range(width):
        sick = logits.clone()
        sick[1, at] = value
        tokens, normalisers = model.choose(sick, None)
        assert not normalisers[1].isfinite()
        assert 0 <= int(tokens[1]) < width
        assert int(tokens[0]) == int(expected_tokens[0])
        torch.testing.assert_close(normalisers[0], expected[0])
        assert not normalisers[2].isfinite()
        assert not choose(sick, None)[1][1].isfinite()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_penalties_equal_torchs_to_the_bit(tiny_folder: Path, num_threads: int) -> None:
    """Of random steps, verifies and drafts in a batch; and any token's logits when they are restored."""
    torch.set_num_threads(num_threads)
    model = poisoned_runner(tiny_folder, "native")._model
    torch.set_num_threads(1)
    rng = np.random.default_rng(num_threads)
    for _ in range(60):
        segments = [random_segment(rng, random_params(rng)) for _ in range(6)]
        rows = [row for part in segments for row in rows_of(part)]
        ruled = [index for index, row in enumerate(rows) if row.has_rules]
        if not ruled:
            continue
        raw = torch.from_numpy(rng.normal(size=(len(rows), 48)) * 3).float()
        raw[rng.random(raw.shape) < 0.02] = -torch.inf
        native, expected = raw.clone()[:, :VOCAB], raw.clone()[:, :VOCAB]
        apply_rules(expected, rows, ruled, EOS)
        overwritten = apply_rules(native, rows, ruled, EOS, model.penalise)
        assert torch.equal(native, expected)
        changed = native.clone()
        for token in range(VOCAB):
            native.copy_(changed)
            for part in overwritten:
                part.restore(torch.full((len(rows),), token))
            possible = (expected[:, token] > -torch.inf) | (raw[:, token] == -torch.inf)
            assert torch.equal(native[possible, token], raw[possible, token])


def test_penalties_with_nothing_to_count_change_nothing(tiny_folder: Path) -> None:
    """As of a prompt with no id of the vocabulary."""
    model = poisoned_runner(tiny_folder, "native")._model
    raw = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(3))
    row = Row(SamplingParams(repetition_penalty=2.0), 3, 3, Prefix.of([VOCAB, VOCAB + 7, VOCAB], 3))
    for penalise in (model.penalise, TorchModel.penalise):
        logits = raw.clone()
        for part in apply_rules(logits, [row, row], [0, 1], EOS, penalise):
            part.restore(torch.tensor([4, 5]))
        assert torch.equal(logits, raw)


def test_without_a_compiler_the_forward_is_torchs(
    tiny_folder: Path, fresh_build: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        runner = TorchRunner.load(str(tiny_folder), num_pages=20, page_size=8)
    assert isinstance(runner._model, TorchModel)
    assert "CXX=no-such-compiler" in caplog.text
    with pytest.raises(NativeUnavailable, match="install g\\+\\+ or clang, or set CXX"):
        TorchRunner.load(str(tiny_folder), num_pages=20, page_size=8, forward="native")
    with pytest.raises(NativeUnavailable, match=r"'int8' needs the native forward: .* install g\+\+"):
        TorchRunner.load(str(tiny_folder), num_pages=20, page_size=8, quantization="int8")


def test_quantization_that_cannot_be_had(tiny_folder: Path) -> None:
    with pytest.raises(NativeUnavailable, match="leave out forward='torch'"):
        TorchRunner.load(str(tiny_folder), num_pages=20, forward="torch", quantization="int8")
    with pytest.raises(CheckpointError, match="must be 'int8' or None, got 'int4'"):
        TorchRunner.load(str(tiny_folder), num_pages=20, quantization="int4")


def test_a_replica_is_quantised_as_configured(tiny_folder: Path) -> None:
    expected = poisoned_runner(tiny_folder, "native", page_size=16, num_pages=60, quantization="int8")
    found = load_runner(CONFIG.model_copy(update={"model": str(tiny_folder)}))
    one = segment(prompt(20, seed=4), (0, 1))
    assert torch.equal(LogitsProbe(found)(one)[0], LogitsProbe(expected)(one)[0])
    whole = poisoned_runner(tiny_folder, "native", page_size=16, num_pages=60)
    assert not torch.equal(LogitsProbe(found)(one)[0], LogitsProbe(whole)(one)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_the_nearest(dtype: torch.dtype) -> None:
    """Of each row, whatever its scale, and none of a row of zeros is not a number."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(5000, 9, generator=generator) * torch.logspace(-20, 20, 5000)[:, None]
    weight[7] = 0
    weight = weight.to(dtype)
    before = weight.clone()
    codes, scales = quantize(weight)
    assert torch.equal(weight, before)
    off = (codes * scales.double()[:, None] - weight.double()).abs().amax(1)
    assert (off <= scales.double() * 0.50001).all()
    largest = codes.short().abs().amax(1)
    assert largest[7] == 0
    assert largest[torch.arange(5000) != 7].unique().tolist() == [127]


def test_a_failed_build_says_what_the_compiler_said(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "_FLAGS", ("--no-such-flag",))
    with pytest.raises(NativeUnavailable, match="no-such-flag"):
        build.load_library()
    assert list(fresh_build.glob("*.so")) == []
    build.main([])
    assert "the CPU path is torch's" in capsys.readouterr().err


@pytest.mark.skipif(platform.machine() not in build.PORTABLE, reason="no kinds of this machine's processors")
def test_without_a_compiler_the_portable_library_is_loaded(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plainest of this machine's kinds, compiled as an image's build does."""
    kinds = build.PORTABLE[platform.machine()][-1:]
    monkeypatch.setattr(build, "PORTABLE", {platform.machine(): kinds})
    made = build.compile_portable()
    assert made == list(build.PORTABLE_FOLDER.iterdir())
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.load_library()._name == str(made[0])
    assert not fresh_build.exists()
    made[0].unlink()
    build.load_library.cache_clear()
    with pytest.raises(NativeUnavailable, match=r"no C[+][+] compiler found"):
        build.load_library()


@pytest.mark.usefixtures("fresh_build")
def test_the_best_library_that_a_processor_can_run() -> None:
    """Each kind by exactly the features it needs; without one of them the next; none for what is older."""
    kinds, portable_folder = build.PORTABLE["x86_64"], build.PORTABLE_FOLDER
    portable_folder.mkdir()
    names = ["x86-64-v4+avx512bf16", "x86-64-v4", "x86-64-v3"]
    for name in names:
        (portable_folder / f"forward-{name}.so").touch()
    found = [build.portable_library("x86_64", needed) for _, needed in kinds]
    assert found == [portable_folder / f"forward-{name}.so" for name in names]
    assert build.portable_library("x86_64", kinds[1][1] - {"avx512vl"}) == found[2]
    assert build.portable_library("x86_64", kinds[2][1] - {"fma"}) is None
    assert build.portable_library("aarch64", {"asimd"}) is None
    (portable_folder / "forward-armv8-a.so").touch()
    assert build.portable_library("aarch64", {"asimd"}) == portable_folder / "forward-armv8-a.so"
    assert build.portable_library("riscv64", set()) is None


def test_a_cache_that_cannot_be_written(tmp_path: Path, fresh_build: Path) -> None:
    (tmp_path / "cache").write_text("a file, where a folder should be")
    with pytest.raises(NativeUnavailable, match="set XDG_CACHE_HOME"):
        build.load_library()


def test_too_many_queries_a_key_head() -> None:
    config = ModelConfig.parse(tiny_config(num_attention_heads=34, num_key_value_heads=1))
    with pytest.raises(NativeUnavailable, match="up to 32 queries a key head"):
        require_native(config)
