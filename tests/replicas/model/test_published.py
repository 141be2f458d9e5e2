"""Checkpoints of the published 3B, 8B and 14B layouts, a 64th as wide, against the naive reference.

What differs among them: whether the heads are wider than the hidden size, as wide, or narrower, and the
MLP's factor. All have YaRN, query scaling, a head of their own, an adapter on the output projections, and
weights in shards with an index.
"""

from pathlib import Path

import pytest
import torch

from policies.modes import DecodePlan, Mode
from replicas.engine.engine import Engine
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.runner import TorchRunner
from tests.reference import Reference
from tests.replicas.model.conftest import LogitsProbe, prompt, segment
from tests.tiny_checkpoint import make_tiny_checkpoint

SIZES = {
    "3B": {"hidden_size": 48, "intermediate_size": 144, "num_hidden_layers": 3},
    "8B": {"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 4},
    "14B": {"hidden_size": 80, "intermediate_size": 256, "num_hidden_layers": 5},
}
MASK = 100
PLANS = (
    DecodePlan(Mode.AR),
    DecodePlan(Mode.SELF_SPECULATION, 8),
    DecodePlan(Mode.DIFFUSION, 8, 0.5),
    DecodePlan(Mode.DIFFUSION, 16, 0.9),
)


@pytest.fixture(scope="module", params=SIZES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(
        tmp_path_factory.mktemp(request.param),
        seed=2,
        num_shards=3,
        vocab_size=160,
        mask_token_id=MASK,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        block_size=32,
        **SIZES[request.param],
    )


@pytest.fixture(scope="module")
def asked() -> list[int]:
    return [token for token in prompt(23, seed=3, vocab=160) if token != MASK]


@pytest.fixture(scope="module")
def wanted(folder: Path, asked: list[int]) -> list[tuple[int, ...]]:
    """The reference's tokens, by plan; once for all forwards, since it computes everything anew each step."""
    reference = Reference(folder)
    return [reference.mixed(asked, 24, lambda _, p=plan: p).token_ids for plan in PLANS]


def test_the_layout_is_the_published_one(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors.index.json", "linear_spec_lora", "model-00003-of-00003.safetensors"} <= names
    assert "model.safetensors" not in names


def test_every_mode_equals_the_reference(
    folder: Path, asked: list[int], wanted: list[tuple[int, ...]], forward: str
) -> None:
    runner = TorchRunner.load(str(folder), num_pages=64, page_size=8, forward=forward)
    engine = Engine(runner)
    sequences = [
        engine.submit(
            str(number),
            asked,
            SamplingParams(max_tokens=24),
            DecodingOptions(plan.mode, None if plan.mode is Mode.AR else plan.block_length, plan.threshold),
        )
        for number, plan in enumerate(PLANS)
    ]
    while engine.has_work:
        engine.step()
    for plan, sequence, tokens in zip(PLANS, sequences, wanted, strict=True):
        assert tuple(sequence.tokens[len(asked) :]) == tokens, plan


def test_bfloat16_is_near(folder: Path, forward: str) -> None:
    tokens = prompt(30, seed=5, vocab=160)
    runner = TorchRunner.load(str(folder), num_pages=16, page_size=8, dtype="bfloat16", forward=forward)
    found = LogitsProbe(runner)(segment(tokens, (3, 1, 2, 5)))[0].float()
    exact = Reference(folder).causal_logits(tokens)
    assert torch.nn.functional.cosine_similarity(found, exact, dim=-1).min() > 0.97
