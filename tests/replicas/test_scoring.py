"""Log-probabilities of prompts: transformers' own, however the prompt is cut up, preempted or cached."""

from pathlib import Path

import pytest
import torch

import replicas
from policies.modes import Mode
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.engine.sequence import Sequence
from replicas.messages import DecodingOptions, FinishReason, SamplingParams
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec
from tests.reference import Reference
from training.tasks.registry import held_out_tasks

FOLDER = Path(replicas.__path__[0]) / "checkpoints" / "triad-5m"


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec.load(str(FOLDER))


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(FOLDER)


def logprobs_of(reference: Reference, ids: list[int]) -> torch.Tensor:
    """Of each id but the first, by transformers; the mask token is none that could come."""
    logits = reference.causal_logits(ids).double()
    logits[:, reference.mask_token_id] = float("-inf")
    wanted = torch.tensor(ids[1:])[:, None]
    return logits.log_softmax(-1)[:-1].gather(1, wanted).squeeze(1)


def finish(engine: Engine) -> dict[str, FinishReason | None]:
    ended = {}
    while engine.has_work:
        for made in engine.step():
            engine.check_integrity()
            assert made.error is None, made.message
            if made.ended:
                ended[made.sequence.request_id] = made.reason
    return ended


@pytest.mark.parametrize("num_pages", [90, 14])
def test_a_prompts_logprobs_are_those_of_transformers(
    reference: Reference, codec: TextCodec, num_pages: int
) -> None:
    """Many at once, in chunks, with pages for all or for a few; the second of each finds its K/V cached."""
    runner = TorchRunner.load(str(FOLDER), dtype="float32", num_pages=num_pages, max_context=num_pages * 16)
    engine = Engine(runner, EngineConfig(max_running=8, max_step_tokens=192, max_prefill_tokens=20))
    asked: dict[str, Sequence] = {}
    for number, family in enumerate(("json", "add", "story", "json")):
        task = next(iter(held_out_tasks(family, 1)))
        ids = codec.encode(({"role": "user", "content": task.prompt},)) + codec.encode(task.answer)
        for mode, max_tokens in ((Mode.AR, 0), (Mode.SELF_SPECULATION, 40), (None, 1)):
            sampling = SamplingParams(
                max_tokens=max_tokens,
                logprobs=1,
                scores_prompt=True,
                temperature=0.7,
                seed=number,
                ignore_eos=True,
            )
            name = f"{number}-{mode}"
            asked[name] = engine.submit(name, ids, sampling, DecodingOptions(mode))
    ended = finish(engine)
    for name, sequence in asked.items():
        ids = sequence.tokens[: sequence.num_prompt_tokens]
        assert [entry.token_id for entry in sequence.prompt_logprobs] == ids[1:]
        told = torch.tensor([entry.logprob for entry in sequence.prompt_logprobs], dtype=torch.float64)
        torch.testing.assert_close(told, logprobs_of(reference, ids), atol=2e-4, rtol=0)
        best = reference.causal_logits(ids)[:-1].argmax(-1).tolist()
        assert [entry.top[0][0] for entry in sequence.prompt_logprobs] == best
        if name.endswith("ar"):
            assert (sequence.num_completion_tokens, ended[name]) == (0, FinishReason.LENGTH)
    if num_pages == 14:
        assert any(sequence.num_preemptions for sequence in asked.values())


def test_scoring_changes_no_token_of_the_completion(codec: TextCodec) -> None:
    runner = TorchRunner.load(str(FOLDER), dtype="float32", num_pages=60)
    prompt = codec.encode(({"role": "user", "content": "Tell a story."},))
    told = []
    for scores in (False, True):
        engine = Engine(runner)
        sampling = SamplingParams(
            max_tokens=20, temperature=0.9, seed=5, logprobs=0, scores_prompt=scores, min_tokens=8
        )
        sequence = engine.submit("x", prompt, sampling)
        finish(engine)
        told.append(sequence.tokens)
    assert told[0] == told[1]
