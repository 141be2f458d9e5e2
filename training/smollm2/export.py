"""Writes the trained adapter as `linear_spec_lora/`, in PEFT's format, and reads it back."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.smollm2.model import PROJECTIONS, AdaptedModel

FILE = "adapter_model.safetensors"
_MASK_ROW = "base_model.model.encoder.embed_tokens.token_adapter.trainable_tokens_delta"


def adapter_tensors(model: AdaptedModel) -> dict[str, Tensor]:
    """The adapter's tensors in bfloat16, under PEFT's names."""
    tensors = {_MASK_ROW: model.mask_row[None]}
    for index, layer in enumerate(model.layers):
        for name, module in PROJECTIONS.items():
            prefix = f"base_model.model.encoder.layers.{index}.{module}.{name}"
            adapted = getattr(layer, name)
            tensors[f"{prefix}.lora_A.weight"] = adapted.lora_A
            tensors[f"{prefix}.lora_B.weight"] = adapted.lora_B
    return {name: tensor.detach().to(torch.bfloat16).cpu().contiguous() for name, tensor in tensors.items()}


def export(model: AdaptedModel, folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "inference_mode": True,
        "r": model.rank,
        "lora_alpha": model.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": list(PROJECTIONS),
        "trainable_token_indices": [model.mask_token_id],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(adapter_tensors(model), folder / FILE, metadata={"format": "pt"})


@torch.no_grad()
def restore(model: AdaptedModel, file: Path) -> None:
    """Reads an exported file into the model. Raises KeyError or ValueError where it does not fit."""
    tensors = load_file(file)
    for name, own in adapter_tensors(model).items():
        if tensors[name].shape != own.shape:
            raise ValueError(f"{file}: {name} has shape {list(tensors[name].shape)}, not {list(own.shape)}")
    model.mask_row.copy_(tensors[_MASK_ROW][0])
    for index, layer in enumerate(model.layers):
        for name, module in PROJECTIONS.items():
            prefix = f"base_model.model.encoder.layers.{index}.{module}.{name}"
            adapted = getattr(layer, name)
            adapted.lora_A.copy_(tensors[f"{prefix}.lora_A.weight"])
            adapted.lora_B.copy_(tensors[f"{prefix}.lora_B.weight"])
