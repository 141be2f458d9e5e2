"""Random tiny checkpoints in the published tri-mode layout, for tests that need a real model fast.

`python -m tests.tiny_checkpoint FOLDER` writes one with a byte-fallback tokenizer, to be served.
"""

import json
import sys
from collections.abc import Sequence as Seq
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 97
MASK_TOKEN_ID = 5
EOS_TOKEN_ID = 2

_HIDDEN, _INTERMEDIATE, _NUM_LAYERS = 40, 72, 3
_NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM = 6, 2, 12
_RANK = 6

RAW_ROPE: dict[str, object] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


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
        "rope_parameters": dict(RAW_ROPE),
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


BYTE_FALLBACK_KINDS = ("replace", "metaspace")
"""How tokenizers of the SentencePiece kind write their ▁: Llama 2's tokenizer.json, and the newer one."""

BYTE_FALLBACK_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}[INST] {{ message.content | trim }} [/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content | trim }} {{ eos_token }}"
    "{% elif message.role == 'system' %}<|system|>{{ message.content }}\n"
    "{% else %}{{ raise_exception('no role ' + message.role) }}{% endif %}{% endfor %}"
)

_WORDS = (
    "▁the",
    "▁and",
    "▁of",
    "▁a",
    "▁in",
    "▁token",
    "▁language",
    "ing",
    "er",
    "on",
    "▁▁",
    "é",
    "▁né",
    "界",
)
_SPECIAL = ("<unk>", "<s>", "</s>", "<|mask|>", "<|system|>")


def byte_fallback_tokenizer(kind: str = "replace") -> PreTrainedTokenizerFast:
    """Of Llama 2's kind: pieces with ▁ for a space, <0x00> to <0xFF> for the bytes of what has no piece.

    ids: special tokens, bytes, characters, merged pieces. kind: one of BYTE_FALLBACK_KINDS.
    """
    pieces = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    merges: dict[tuple[str, str], None] = {}
    characters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:;!?'\"()[]{}<>|/_-0123456789é界"
    pieces += characters
    for word in _WORDS:
        for end in range(2, len(word) + 1):
            merges[word[: end - 1], word[end - 1]] = None
    pieces += dict.fromkeys(left + right for left, right in merges if left + right not in pieces)
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=list(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if kind == "replace":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
        )
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in _SPECIAL])
    begin = vocab["<s>"]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<|mask|>",
        chat_template=BYTE_FALLBACK_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def write_byte_fallback_checkpoint(
    folder: Path | str, *, kind: str = "replace", num_padded_rows: int = 13, **config_overrides: object
) -> Path:
    """A tri-mode checkpoint with weights, tokenizer and chat template; returns the folder.

    More than half of its tokens are bytes, so its texts are mostly broken characters. num_padded_rows: of
    embedding and head, past the tokenizer's tokens.
    """
    tokenizer = byte_fallback_tokenizer(kind)
    rope = {**RAW_ROPE, "factor": 64.0}
    overrides: dict[str, object] = {
        "vocab_size": len(tokenizer) + num_padded_rows,
        "max_position_embeddings": 1024,
        "rope_parameters": rope,
        "mask_token_id": tokenizer.mask_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    folder = make_tiny_checkpoint(folder, likely_tokens=24, **overrides | config_overrides)
    tokenizer.save_pretrained(str(folder))
    return folder


if __name__ == "__main__":
    write_byte_fallback_checkpoint(sys.argv[1])
