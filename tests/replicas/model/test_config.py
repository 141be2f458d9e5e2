"""What config.json may say, and how the loader answers when it says something else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Ministral3Config
from transformers.models.ministral3.modeling_ministral3 import (
    Ministral3RotaryEmbedding,
    get_llama_4_attn_scale,
)

from policies.modes import Mode
from replicas.model.config import CheckpointError, ModelConfig
from replicas.model.rotary import RotaryTable
from tests.tiny_checkpoint import tiny_config

PUBLISHED_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


PUBLISHED = {
    "3B": {"hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 26},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 34},
    "14B": {"hidden_size": 5120, "intermediate_size": 16384, "num_hidden_layers": 40},
}


def published(size: str = "3B") -> dict[str, Any]:
    """The shape of a published checkpoint."""
    return tiny_config(
        vocab_size=131072,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=262144,
        mask_token_id=100,
        rope_parameters=PUBLISHED_ROPE,
        **PUBLISHED[size],
    )


@pytest.mark.parametrize(("size", "billions"), [("3B", 3.83), ("8B", 8.5), ("14B", 13.5)])
def test_published_shapes(size: str, billions: float) -> None:
    config = ModelConfig.parse(published(size))
    assert config.modes == (Mode.AR, Mode.DIFFUSION, Mode.SELF_SPECULATION)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.queries_per_kv) == (32, 8, 128, 4)
    assert config.mask_token_id == 100
    assert config.eos_token_ids == {2}
    assert config.rope.query_beta == 0.1
    assert config.num_parameters == pytest.approx(billions * 1e9, rel=0.01)


def test_modes_need_a_mask_token_and_the_tri_mode_type() -> None:
    assert ModelConfig.parse(tiny_config(mask_token_id=None)).modes == (Mode.AR,)
    assert ModelConfig.parse(tiny_config(model_type="ministral3")).modes == (Mode.AR,)
    assert ModelConfig.parse(tiny_config(model_type="ministral3")).mask_token_id is None


def test_a_model_that_denoises_with_its_adapter_needs_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(denoise_with_adapter=True)))
    assert ModelConfig.from_folder(tmp_path).modes == (Mode.AR,)
    (tmp_path / "linear_spec_lora").mkdir()
    assert ModelConfig.from_folder(tmp_path).modes == (Mode.AR, Mode.DIFFUSION, Mode.SELF_SPECULATION)


def test_eos_may_be_a_list_and_generation_config_adds_to_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(eos_token_id=[2, 3])))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == {2, 3}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == {2, 3, 9}


def test_head_dim_defaults_to_an_even_share() -> None:
    raw = tiny_config(hidden_size=48)
    del raw["head_dim"]
    assert ModelConfig.parse(raw).head_dim == 8


def test_older_rope_fields() -> None:
    raw = tiny_config(model_type="llama", rope_theta=5e5)
    raw["rope_scaling"] = {"type": "linear", "factor": 2.0}
    del raw["rope_parameters"]
    config = ModelConfig.parse(raw)
    assert config.rope.rope_type == "linear"
    assert config.rope.parameters["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; use a checkpoint of nemotron"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_size": "40"}, "hidden_size must be a positive integer, got '40'"),
        ({"vocab_size": None}, "vocab_size must be a positive integer, got None"),
        ({"num_key_value_heads": 4}, "num_attention_heads (6) must be a multiple"),
        ({"head_dim": 7}, "head_dim must be even, got 7"),
        ({"mask_token_id": 97}, "mask_token_id must be in [0, vocab_size 97), got 97"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "no original_max_position_embeddings"),
        ({"denoise_with_adapter": 1}, "denoise_with_adapter must be true or false, got 1"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_refused_values(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.parse(tiny_config(**overrides))
    assert message in str(caught.value)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ModelConfig.from_folder(tmp_path)


def test_a_sliding_window_bounds_the_context() -> None:
    config = ModelConfig.parse(tiny_config(model_type="mistral", sliding_window=64))
    assert config.max_position_embeddings == 64


@pytest.mark.parametrize("raw", [tiny_config(), published()], ids=["tiny", "3B"])
def test_rotary_table_equals_transformers_bit_by_bit(raw: dict[str, Any]) -> None:
    positions = torch.tensor([0, 1, 15, 16, 17, 100, 255])
    if raw["max_position_embeddings"] > 20000:
        positions = torch.cat((positions, torch.tensor([16383, 16384, 19999])))
    table = RotaryTable(ModelConfig.parse(raw), int(positions[-1]) + 1)
    known = {key: value for key, value in raw.items() if key not in ("model_type", "architectures")}
    reference = Ministral3RotaryEmbedding(Ministral3Config(**known))
    cos, sin = reference(torch.zeros(1), positions[None])
    half = cos.shape[-1] // 2
    assert torch.equal(table.phases.real[positions], cos[0, :, :half])
    assert torch.equal(table.phases.imag[positions], sin[0, :, :half])
    rope = raw["rope_parameters"]
    scale = get_llama_4_attn_scale(
        positions[None], rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
    )
    assert table.query_scale is not None
    assert torch.equal(table.query_scale[positions], scale[0, 0, :, 0])
