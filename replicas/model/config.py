"""What a checkpoint's config.json says about the model, read and validated once."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies.modes import Mode

TRI_MODE_TYPE = "nemotron_labs_diffusion"
ADAPTER_FOLDER = "linear_spec_lora"
MODEL_TYPES = (TRI_MODE_TYPE, "ministral3", "llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class CheckpointError(Exception):
    """The checkpoint can't be served; the message names what is wrong and what to change."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """parameters: transformers' `rope_parameters`, with rope_type and rope_theta always in it.

    query_beta: queries are multiplied by 1 + beta * log(1 + floor(position / original_max_positions));
    None where the model has no query scaling.
    """

    parameters: Mapping[str, Any]
    query_beta: float | None
    original_max_positions: int | None

    @property
    def rope_type(self) -> str:
        return str(self.parameters["rope_type"])


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder of the Llama family, with or without the tri-mode extras.

    qkv_bias: whether q, k and v have a bias (qwen2). qk_norm: whether query and key heads are
    normalised before the rotary embedding (qwen3).
    denoise_with_adapter: the adapter is on in every bidirectional forward, not in drafts alone; the model
    was trained for these with it, so without it only `ar` is served. has_adapter: whether it is there.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    mask_token_id: int | None
    denoise_with_adapter: bool
    has_adapter: bool
    block_size: int | None
    eos_token_ids: frozenset[int]

    @property
    def modes(self) -> tuple[Mode, ...]:
        adapted = self.has_adapter or not self.denoise_with_adapter
        if self.model_type == TRI_MODE_TYPE and self.mask_token_id is not None and adapted:
            return (Mode.AR, Mode.DIFFUSION, Mode.SELF_SPECULATION)
        return (Mode.AR,)

    @property
    def queries_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def num_parameters(self) -> int:
        attention = 2 * self.hidden_size * (self.num_heads + self.num_kv_heads) * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        vocabulary = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + vocabulary + self.hidden_size

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read config.json, and the EOS ids of generation_config.json where there is one.

        Raises CheckpointError.
        """
        raw = read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        extra_eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
        return cls.parse(raw, extra_eos, has_adapter=(folder / ADAPTER_FOLDER).is_dir())

    @classmethod
    def parse(
        cls, raw: Mapping[str, Any], extra_eos: int | list[int] | None = None, has_adapter: bool = False
    ) -> "ModelConfig":
        """Raises CheckpointError for an unknown model type or a value that can't be served."""
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            raise CheckpointError(
                f"config.json: model_type {model_type!r} is not supported; use a checkpoint of "
                f"{', '.join(MODEL_TYPES)}"
            )
        _refuse_unsupported(raw, model_type)
        hidden_size = _positive(raw, "hidden_size")
        num_heads = _positive(raw, "num_attention_heads")
        num_kv_heads = _positive(raw, "num_key_value_heads", num_heads)
        head_dim = _positive(raw, "head_dim", hidden_size // num_heads)
        if num_heads % num_kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads ({num_heads}) must be a multiple of "
                f"num_key_value_heads ({num_kv_heads})"
            )
        if head_dim % 2:
            raise CheckpointError(f"config.json: head_dim must be even, got {head_dim}")
        vocab_size = _positive(raw, "vocab_size")
        max_positions = _positive(raw, "max_position_embeddings")
        if raw.get("sliding_window") and raw.get("use_sliding_window", True):
            # Every position attends to the whole cache, which is the model's own attention within a window.
            max_positions = min(max_positions, _positive(raw, "sliding_window"))
        mask_token_id = _token_id(raw, "mask_token_id", vocab_size) if model_type == TRI_MODE_TYPE else None
        return cls(
            model_type=model_type,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=_positive(raw, "intermediate_size"),
            num_layers=_positive(raw, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=max_positions,
            rope=_rope(raw),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
            mask_token_id=mask_token_id,
            denoise_with_adapter=_flag(raw, "denoise_with_adapter"),
            has_adapter=has_adapter,
            block_size=_positive(raw, "block_size") if raw.get("block_size") is not None else None,
            eos_token_ids=_ids(raw.get("eos_token_id")) | _ids(extra_eos),
        )


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: not a checkpoint folder") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


def _refuse_unsupported(raw: Mapping[str, Any], model_type: str) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"config.json: hidden_act {activation!r} is not supported, only 'silu'")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise CheckpointError(f"config.json: {key} is not supported for {model_type}")
    if raw.get("quantization_config"):
        raise CheckpointError("config.json: quantized checkpoints are not supported; use the bf16 weights")
    layer_types = set(raw.get("layer_types") or ["full_attention"])
    if layer_types != {"full_attention"} and raw.get("sliding_window") is None:
        raise CheckpointError(f"config.json: layer_types {sorted(layer_types)} are not supported")


def _positive(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key} must be a positive integer, got {value!r}")
    return value


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} must be true or false, got {value!r}")
    return value


def _token_id(raw: Mapping[str, Any], key: str, vocab_size: int) -> int | None:
    value = raw.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < vocab_size:
        raise CheckpointError(f"config.json: {key} must be in [0, vocab_size {vocab_size}), got {value!r}")
    return value


def _ids(value: int | list[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(value) if isinstance(value, list) else frozenset({value})


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    """From `rope_parameters`, or from the older `rope_theta` and `rope_scaling`."""
    parameters = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    theta = parameters.get("rope_theta")
    parameters["rope_theta"] = raw.get("rope_theta", 10000.0) if theta is None else theta
    if parameters["rope_type"] not in ROPE_TYPES:
        raise CheckpointError(
            f"config.json: rope_type {parameters['rope_type']!r} is not supported, "
            f"only {', '.join(ROPE_TYPES)}"
        )
    if parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise CheckpointError("config.json: partial_rotary_factor is not supported")
    original = parameters.get("original_max_position_embeddings")
    beta = parameters.get("llama_4_scaling_beta")
    if beta is not None and original is None:
        raise CheckpointError(
            "config.json: rope_parameters has llama_4_scaling_beta but no original_max_position_embeddings"
        )
    return RopeConfig(parameters, beta, original)
