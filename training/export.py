"""Writes a trained model in the published `nemotron_labs_diffusion` checkpoint format.

`python -m training.export --run DIR --to DIR` exports the last saved state of a training run.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors

from training.model import ModelConfig, TriModel
from training.tokenizer import (
    BOS,
    BOS_ID,
    EOS_ID,
    MASK_ID,
    PAD_ID,
    load_tokenizer,
    wrap,
)

BLOCK_SIZE = 32


def config_json(config: ModelConfig) -> dict[str, object]:
    """The content of config.json, with the published fields; query scaling is 1 within the context length."""
    return {
        "model_type": "nemotron_labs_diffusion",
        "architectures": ["NemotronLabsDiffusionModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": BLOCK_SIZE,
        "bos_token_id": BOS_ID,
        "dtype": "float32",
        "eos_token_id": EOS_ID,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "mask_token_id": MASK_ID,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": False,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": PAD_ID,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": config.rope_theta,
            "factor": 1.0,
            "original_max_position_embeddings": config.max_position_embeddings,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": False,
        "vocab_size": config.vocab_size,
    }


def export(model: TriModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes config.json, model.safetensors (float32), tokenizer, chat template, generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config_json(model.config))
    weights = {name: tensor.float().cpu() for name, tensor in model.published_state().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    wrap(tokenizer, model.config.max_position_embeddings).save_pretrained(folder)
    generation = {
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "do_sample": False,
    }
    _write_json(folder / "generation_config.json", generation)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def load_run(run: Path, sizes: ModelConfig | None = None) -> tuple[TriModel, Tokenizer]:
    """The model of a training run's last saved state, and its tokenizer."""
    tokenizer = load_tokenizer(run / "tokenizer.json")
    model = TriModel(replace(sizes or ModelConfig(0), vocab_size=tokenizer.get_vocab_size()))
    model.load_state_dict(torch.load(run / "state.pt", map_location="cpu")["model"])
    return model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    arguments = parser.parse_args()
    model, tokenizer = load_run(arguments.run)
    export(model, tokenizer, arguments.to)


if __name__ == "__main__":
    main()
