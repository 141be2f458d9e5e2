"""What the runner makes of rows that rules change, or of which nothing can be sampled."""

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch

from replicas.answer_forms import JsonFormat
from replicas.engine.batch import ScheduledBatch, SegmentOutput
from replicas.engine.history import History, Prefix
from replicas.messages import SamplingParams
from replicas.model.runner import TorchRunner, outputs_of
from tests.replicas.model.conftest import Pages, commit_and_masks, prompt, segment
from tests.tiny_checkpoint import MASK_TOKEN_ID


def without_mask(logits: torch.Tensor) -> torch.Tensor:
    return logits.index_fill(1, torch.tensor([MASK_TOKEN_ID]), float("-inf"))


def poison(runner: TorchRunner, pages: Sequence[int], value: float) -> None:
    """Every layer's K/V of these pages."""
    num_pages = runner.spec.num_pages
    for layer in runner._model.pages:
        numbers = layer.view(torch.float32)
        # The torch forward's pages come first, the native one's after keys and values.
        by_page = numbers.view(num_pages, -1) if numbers.dim() > 2 else numbers.view(2 * num_pages, -1)
        for page in pages:
            by_page[page::num_pages] = value


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, logprobs=2)], ids=str)
def test_a_sequence_whose_logits_are_not_finite_fails_alone(
    runner: TorchRunner, sampling: SamplingParams
) -> None:
    pages = Pages(120, 5)
    tokens = prompt(30, seed=3)
    tables = [pages.table(34) for _ in range(3)]
    for table in tables:
        runner.run(ScheduledBatch((segment(tokens, table, wanted=()),)))
    verifies = [
        dataclasses.replace(segment(tokens[:4], table, start=30, sampling=sampling), seq_id=index)
        for index, table in enumerate(tables)
    ]
    prefill = segment(tokens[:9], pages.table(9), wanted=(), seq_id=7)
    healthy = runner.run(ScheduledBatch((verifies[0], prefill, verifies[2])))
    poison(runner, tables[1][:2], math.nan)
    first, sick, unasked, last = runner.run(ScheduledBatch((verifies[0], verifies[1], prefill, verifies[2])))
    assert sick.failure is not None
    assert "the model's logits are not finite" in sick.failure
    assert sick.token_ids == sick.probs == sick.top == ()
    assert [first, unasked, last] == healthy
    assert all(output.failure is None for output in healthy)


def test_a_verify_ends_before_the_row_that_has_no_token(runner: TorchRunner) -> None:
    """It may never come to that row, and if it does, AR comes to it as well; a row of masks fails it all."""
    tokens = prompt(6, seed=5)
    sampling = SamplingParams(response_format=JsonFormat("{}"), logprobs=1)
    anything, nothing = b"\xff" * 20, b"\x00" * 20
    whole = segment(tokens, Pages(120, 5).table(6), sampling=sampling)
    [expected] = runner.run(ScheduledBatch((dataclasses.replace(whole, allowed=(anything,) * 6),)))
    for count in range(6):
        masks = (anything,) * count + (nothing,) * (6 - count)
        [found] = runner.run(ScheduledBatch((dataclasses.replace(whole, allowed=masks),)))
        assert found.token_ids == expected.token_ids[:count]
        assert found.top == expected.top[:count]
        assert found.failure is None if count else "response_format" in str(found.failure)
    forbidden = SamplingParams(logit_bias=tuple((token, -math.inf) for token in range(97)))
    draft = segment(tokens, (0, 1), num_causal=0, wanted=(1, 2), sampling=forbidden)
    [failed] = runner.run(ScheduledBatch((draft,)))
    assert failed == SegmentOutput((), (), failure=failed.failure)
    assert "logit_bias" in str(failed.failure)


@pytest.mark.parametrize("num_sampled", range(5))
def test_a_draft_behind_a_verify_ends_before_a_row_without_a_token(
    runner: TorchRunner, num_sampled: int
) -> None:
    """And so does the verify: what comes before is AR's, whatever is wrong with the rest."""
    both = commit_and_masks(prompt(3, seed=1), 4, Pages(120, 5).table(7))
    [whole] = runner.run(ScheduledBatch((both,)))
    probs = [1.0] * num_sampled + [math.nan] * (4 - num_sampled)
    [output] = outputs_of([both], whole.token_ids, probs, {})
    assert output.token_ids == whole.token_ids[:num_sampled]
    assert (output.failure is None) == (num_sampled > 0)


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.4},
        {"presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 0.8},
    ],
    ids=str,
)
def test_penalties_of_a_verify_are_those_of_steps(runner: TorchRunner, penalties: dict[str, float]) -> None:
    """By a history that goes on, as the engine's does, and by one counted anew."""
    tokens, table = prompt(24, seed=4), Pages(120, 5).table(24)
    sampling = SamplingParams(temperature=0.8, seed=3, **penalties)
    runner.run(ScheduledBatch((segment(tokens[:16], table, wanted=()),)))
    stepped: list[int] = []
    history = History(tokens, 10)
    for at in range(16, 24):
        step = segment(tokens[at : at + 1], table, start=at, sampling=sampling)
        step = dataclasses.replace(step, prompt_len=10, history=history.first(at + 1))
        [output] = runner.run(ScheduledBatch((step,)))
        stepped += output.token_ids
    verify = segment(tokens[16:], table, start=16, sampling=sampling)
    verify = dataclasses.replace(verify, prompt_len=10, history=Prefix.of(tokens[:16], 10))
    [output] = runner.run(ScheduledBatch((verify,)))
    assert list(output.token_ids) == stepped
