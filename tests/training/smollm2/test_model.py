"""The training forwards are those of serving: against transformers, with the adapter merged or not."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.reference import Reference
from tests.tiny_checkpoint import EOS_TOKEN_ID, MASK_TOKEN_ID, VOCAB_SIZE, make_tiny_checkpoint
from tests.training.smollm2.tiny import make_base
from training.smollm2.documents import Prompts
from training.smollm2.export import export, restore
from training.smollm2.model import AdaptedModel
from training.smollm2.sample import sample


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base: Path) -> AdaptedModel:
    """With an adapter that changes something."""
    model = AdaptedModel.load(base, rank=4, num_positions=200, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B") or name == "mask_row":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.fixture
def reference(base: Path, model: AdaptedModel, tmp_path: Path) -> Reference:
    """Of the checkpoint with the model's adapter exported into it."""
    folder = tmp_path / "served"
    shutil.copytree(base, folder)
    export(model, folder / "linear_spec_lora")
    restore(model, folder / "linear_spec_lora" / "adapter_model.safetensors")  # rounded as exported
    return Reference(folder)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(6, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    wanted = wanted.clone()
    wanted[..., MASK_TOKEN_ID] = -torch.inf
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


def test_clean_is_causal_and_never_adapted(model: AdaptedModel, reference: Reference) -> None:
    ids = tokens(2, 23)
    hidden, _ = model.clean(ids)
    for row in range(2):
        assert_close(model.logits(hidden)[row], reference.causal_logits(ids[row].tolist()))


def test_noisy_blocks_are_what_serving_runs(model: AdaptedModel, reference: Reference) -> None:
    """Two blocks of one row at once, each over its own prefix: as two forwards over caches would give."""
    ids = tokens(1, 20, seed=3)
    starts, length = (9, 13), 4
    block = [[int(ids[0, start]), MASK_TOKEN_ID, int(ids[0, start + 2]), MASK_TOKEN_ID] for start in starts]
    noisy = torch.tensor([block[0] + block[1]])
    positions = torch.arange(9, 17)[None]
    first = torch.tensor(starts).repeat_interleave(length)
    number = torch.arange(8) // length
    mask = torch.cat((torch.arange(20) < first[:, None], number[:, None] == number), dim=1)[None]
    _, cached = model.clean(ids)
    logits = model.logits(model.noisy(noisy, positions, mask, cached))[0]
    for index, start in enumerate(starts):
        wanted = reference.block_logits(ids[0, :start].tolist(), block[index], adapter=True)
        assert_close(logits[index * length : (index + 1) * length], wanted)
        bare = reference.block_logits(ids[0, :start].tolist(), block[index], adapter=False)
        assert not torch.allclose(wanted, bare, atol=1e-2)


def test_greedy_samples_are_ar(model: AdaptedModel, reference: Reference) -> None:
    prompts = [tokens(length, seed=length).tolist() for length in (1, 7, 12)]
    made = sample(
        model,
        Prompts.of(prompts, pad_id=0),
        torch.zeros(3),
        20,
        EOS_TOKEN_ID,
        torch.Generator().manual_seed(0),
    )
    for row, prompt in enumerate(prompts):
        answer = made.ids[row, len(prompt) : int(made.lengths[row])].tolist()
        assert answer == list(reference.ar(prompt, 20).token_ids)
        assert bool(made.ended[row]) == (answer[-1] == EOS_TOKEN_ID)
        assert int(made.prompt_lens[row]) == len(prompt)


def test_samples_follow_the_distribution(model: AdaptedModel) -> None:
    """First tokens of many rows of one prompt, at temperature 0.7."""
    prompt = tokens(5, seed=9)
    count = 4000
    made = sample(
        model,
        Prompts(prompt.repeat(count, 1), torch.full((count,), 5)),
        torch.full((count,), 0.7),
        1,
        EOS_TOKEN_ID,
        torch.Generator().manual_seed(2),
    )
    hidden, _ = model.clean(prompt[None])
    wanted = (model.logits(hidden[0, -1]) / 0.7).softmax(-1)
    found = torch.bincount(made.ids[:, 5], minlength=VOCAB_SIZE) / count
    assert float((found - wanted).abs().sum()) < 0.15
    assert found[MASK_TOKEN_ID] == 0


def test_only_the_adapter_is_trained(model: AdaptedModel) -> None:
    names = {name.split(".")[-1] for name, _ in model.named_parameters()}
    assert names == {"lora_A", "lora_B", "mask_row"}
    assert {name.split(".")[-1] for name in model.state_dict()} == names


def test_an_untied_base_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, adapter_targets=())
    with pytest.raises(ValueError, match="one matrix for both ends"):
        AdaptedModel.load(folder, rank=4, num_positions=64, dtype=torch.float32)
