"""Tiny checkpoints, their reference, and plans with scattered pages for the model's tests."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from replicas.engine.batch import ScheduledBatch, Segment, SegmentOutput
from replicas.messages import SamplingParams
from replicas.model.checkpoint import DTYPES
from replicas.model.runner import TorchRunner
from tests.reference import Reference
from tests.tiny_checkpoint import MASK_TOKEN_ID, make_tiny_checkpoint

GREEDY = SamplingParams(max_tokens=1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def reference(tiny_folder: Path) -> Reference:
    return Reference(tiny_folder)


@pytest.fixture(params=["native", "torch"])
def forward(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def runner(tiny_folder: Path, forward: str) -> TorchRunner:
    return poisoned_runner(tiny_folder, forward)


def poisoned_runner(
    folder: Path,
    forward: str,
    *,
    page_size: int = 5,
    num_pages: int = 120,
    dtype: str = "float32",
    quantization: str | None = None,
) -> TorchRunner:
    """A runner whose pages hold garbage, as after other sequences."""
    runner = TorchRunner.load(
        str(folder),
        dtype=dtype,
        num_pages=num_pages,
        page_size=page_size,
        forward=forward,
        quantization=quantization,
    )
    generator = torch.Generator().manual_seed(7)
    for pages in runner._model.pages:
        values = pages.view(DTYPES[dtype])
        values.copy_(torch.randn(values.shape, generator=generator) * 50)
    return runner


class LogitsProbe:
    """Runs segments and returns the logits themselves, in each segment's order of wanted rows."""

    def __init__(self, runner: TorchRunner):
        self.runner = runner
        self.rows: torch.Tensor | None = None
        self.order: tuple[int, ...] = ()
        forward = runner._model.forward

        def recording(segments):
            self.order, logits = forward(segments)
            self.rows = logits.clone()
            return self.order, logits

        runner._model.forward = recording

    def __call__(self, *segments: Segment) -> list[torch.Tensor]:
        self.runner.run(ScheduledBatch(segments))
        counts = [len(segments[index].wanted) for index in self.order]
        parts = dict(zip(self.order, self.rows.split(counts), strict=True))
        return [parts[index] for index in range(len(segments))]


class Pages:
    """Hands out scattered page tables, never one page twice."""

    def __init__(self, num_pages: int, page_size: int, seed: int = 0):
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed))
        self._free = order.tolist()
        self._page_size = page_size

    def table(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(self._free.pop() for _ in range(-(-num_tokens // self._page_size)))


def segment(
    token_ids: Sequence[int],
    pages: tuple[int, ...],
    *,
    start: int = 0,
    num_causal: int | None = None,
    adapter: bool = False,
    wanted: Sequence[int] | None = None,
    sampling: SamplingParams = GREEDY,
    seq_id: int = 0,
) -> Segment:
    """num_causal and wanted: None is all."""
    rows = range(len(token_ids)) if wanted is None else wanted
    causal = len(token_ids) if num_causal is None else num_causal
    return Segment(seq_id, start, tuple(token_ids), pages, causal, adapter, tuple(rows), sampling)


def commit_and_masks(
    tokens: Sequence[int],
    num_masks: int,
    pages: tuple[int, ...],
    *,
    start: int = 0,
    adapter: bool = False,
    sampling: SamplingParams = GREEDY,
    seq_id: int = 0,
) -> Segment:
    """tokens, causal, and behind them the next block: wanted are its seed and its first guesses."""
    border, end = len(tokens), len(tokens) + num_masks
    return segment(
        [*tokens, *[MASK_TOKEN_ID] * num_masks],
        pages,
        start=start,
        num_causal=border,
        adapter=adapter,
        wanted=(border - 1, *range(border + 1, end)),
        sampling=sampling,
        seq_id=seq_id,
    )


def in_two(both: Segment) -> tuple[Segment, Segment]:
    """The commit, and the block over the K/V that it leaves: two forwards for the one of commit_and_masks."""
    border = both.num_causal
    wanted = both.wanted
    return (
        replace(
            both,
            token_ids=both.token_ids[:border],
            adapter=False,
            wanted=tuple(i for i in wanted if i < border),
        ),
        replace(
            both,
            start=both.start + border,
            token_ids=both.token_ids[border:],
            num_causal=0,
            wanted=tuple(i - border for i in wanted if i >= border),
        ),
    )


def prompt(length: int, seed: int, vocab: int = 97) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(6, vocab, (length,), generator=generator).tolist()


RunSegments = Callable[..., Sequence[SegmentOutput]]
