"""A random tiny checkpoint in the published tri-mode layout, for tests that need a real model fast."""

import json
from collections.abc import Sequence as Seq
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCAB_SIZE = 97
MASK_TOKEN_ID = 5
EOS_TOKEN_ID = 2

_HIDDEN, _INTERMEDIATE, _NUM_LAYERS = 40, 72, 3
_NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM = 6, 2, 12
_RANK = 6


def tiny_config(**overrides: object) -> dict[str, object]:
    """config.json of a tiny tri-mode model: YaRN and query scaling begin at position 16."""
    config: dict[str, object] = {
        "model_type": "nemotron_labs_diffusion",
        "architectures": ["NemotronLabsDiffusionModel"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": _NUM_LAYERS,
        "num_attention_heads": _NUM_HEADS,
        "num_key_value_heads": _NUM_KV_HEADS,
        "head_dim": _HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "use_cache": False,
        "block_size": 8,
        "mask_token_id": MASK_TOKEN_ID,
        "bos_token_id": 1,
        "eos_token_id": EOS_TOKEN_ID,
        "torch_dtype": "float32",
    }
    return config | overrides


def make_tiny_checkpoint(
    folder: Path | str,
    *,
    seed: int = 0,
    adapter_targets: Seq[str] = ("o_proj",),
    adapter_has_mask_row: bool = False,
    use_rslora: bool = False,
    num_shards: int = 1,
    likely_tokens: int = 4,
    **config_overrides: object,
) -> Path:
    """Write config.json, the weights and `linear_spec_lora/`; returns the folder.

    The weights are scaled so that greedy sequences wander and confidences spread over (0, 1).
    adapter_targets: the projections the adapter changes; empty writes no adapter.
    adapter_has_mask_row: whether it brings an embedding of its own for the mask token.
    num_shards: more than 1 writes numbered shards and model.safetensors.index.json.
    likely_tokens: how many tokens (the EOS not among them, so it is rare) have a strong head row, so
    that drafts agree with the verified tokens now and then; 0 makes all tokens alike. The mask token
    has one too, so that a decoder that forgets to exclude it is found out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(**config_overrides)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(seed)
    _save_sharded(folder, _random_weights(config, generator, likely_tokens), num_shards)
    if adapter_targets:
        _save_adapter(
            folder / "linear_spec_lora", config, generator, adapter_targets, use_rslora, adapter_has_mask_row
        )
    return folder


def projection_shapes(config: dict[str, object]) -> dict[str, tuple[int, int]]:
    """[out, in] of each linear layer, by its name inside a layer."""
    hidden, intermediate = _number(config, "hidden_size"), _number(config, "intermediate_size")
    query = _number(config, "num_attention_heads") * _number(config, "head_dim")
    key = _number(config, "num_key_value_heads") * _number(config, "head_dim")
    return {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


def _number(config: dict[str, object], key: str) -> int:
    value = config[key]
    assert isinstance(value, int)
    return value


def _random_weights(
    config: dict[str, object], generator: torch.Generator, likely_tokens: int
) -> dict[str, torch.Tensor]:
    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    vocab, hidden = _number(config, "vocab_size"), _number(config, "hidden_size")
    weights = {"encoder.embed_tokens.weight": normal(vocab, hidden, std=1.0)}
    for layer in range(_number(config, "num_hidden_layers")):
        prefix = f"encoder.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{norm}.weight"] = 1.0 + normal(hidden, std=0.2)
        for name, (rows, columns) in projection_shapes(config).items():
            gain = 1.6 if name.startswith("self_attn") else 1.3
            weights[f"{prefix}.{name}.weight"] = normal(rows, columns, std=gain * columns**-0.5)
    weights["encoder.norm.weight"] = 1.0 + normal(hidden, std=0.2)
    head = normal(vocab, hidden, std=1.6 * hidden**-0.5)
    if likely_tokens:
        order = torch.randperm(vocab, generator=generator)
        head[order[order != config["eos_token_id"]][:likely_tokens]] *= 3.0
        head[_number(config, "mask_token_id")] *= 2.4
    if not config["tie_word_embeddings"]:
        weights["diffusion_head.weight"] = head
    return weights


def _save_sharded(folder: Path, weights: dict[str, torch.Tensor], num_shards: int) -> None:
    metadata = {"format": "pt"}
    if num_shards == 1:
        save_file(weights, folder / "model.safetensors", metadata)
        return
    weight_map = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {key: weights[key] for key in list(weights)[shard::num_shards]}
        save_file(part, folder / name, metadata)
        weight_map.update(dict.fromkeys(part, name))
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _save_adapter(
    folder: Path,
    config: dict[str, object],
    generator: torch.Generator,
    targets: Seq[str],
    use_rslora: bool,
    has_mask_row: bool,
) -> None:
    folder.mkdir(exist_ok=True)
    weights = {}
    for layer in range(_number(config, "num_hidden_layers")):
        for name, (rows, columns) in projection_shapes(config).items():
            if name.split(".")[1] not in targets:
                continue
            prefix = f"base_model.model.encoder.layers.{layer}.{name}"
            weights[f"{prefix}.lora_A.weight"] = (
                torch.randn(_RANK, columns, generator=generator) * columns**-0.5
            )
            weights[f"{prefix}.lora_B.weight"] = torch.randn(rows, _RANK, generator=generator) * _RANK**-0.5
    adapter_config = {
        "peft_type": "LORA",
        "r": _RANK,
        "lora_alpha": 2 * _RANK if not use_rslora else 4,
        "target_modules": list(targets),
        "use_rslora": use_rslora,
        "bias": "none",
        "use_dora": False,
    }
    if has_mask_row:
        adapter_config["trainable_token_indices"] = [config["mask_token_id"]]
        name = "base_model.model.encoder.embed_tokens.token_adapter.trainable_tokens_delta"
        weights[name] = torch.randn(1, _number(config, "hidden_size"), generator=generator)
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2))
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
