"""A model's configuration from its checkpoint's config.json, read and validated once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from policies.modes import Mode
from replicas.engine.decoders.learned_sampler import LearnedSampler
from replicas.model.fields import CheckpointError, Fields, TokenBound, read_json
from replicas.model.vocabulary import Vocabulary
from replicas.sampler_file import read_sampler

TRI_MODE_TYPE = "nemotron_labs_diffusion"
ADAPTER_FOLDER = "linear_spec_lora"
MODEL_TYPES = (TRI_MODE_TYPE, "ministral3", "llama", "mistral", "qwen2", "qwen3")
_CONFIG, _GENERATION = "config.json", "generation_config.json"
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

__all__ = ["ADAPTER_FOLDER", "TRI_MODE_TYPE", "CheckpointError", "ModelConfig", "RopeConfig", "read_json"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """The rotary embedding's parameters."""

    parameters: Mapping[str, Any]
    """transformers' `rope_parameters`, with rope_type and rope_theta always in it."""
    query_beta: float | None
    """Queries are multiplied by 1 + beta * log(1 + floor(position / original_max_positions)); None where the
    model has no query scaling."""
    original_max_positions: int | None

    @property
    def rope_type(self) -> str:
        return str(self.parameters["rope_type"])


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder of the Llama family, with or without the tri-mode extras."""

    model_type: str
    vocab_size: int
    """The tokens that the tokenizer knows."""
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
    """True if q, k and v have a bias (qwen2)."""
    qk_norm: bool
    """True if query and key heads are normalised before the rotary embedding (qwen3)."""
    mask_token_id: int | None
    denoise_with_adapter: bool
    """True if the adapter is on in every bidirectional forward, not in drafts alone; the model was trained
    for these with it, so without it only `ar` is served."""
    has_adapter: bool
    """True if the adapter is there."""
    block_size: int | None
    eos_token_ids: frozenset[int]
    num_padded_rows: int = 0
    """Further rows of embedding and head in the file, for nothing but even shapes; they are left out, so none
    is ever sampled."""
    sampler: LearnedSampler | None = None
    """The checkpoint's own sampler of diffusion, where it has one."""

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
        """Read config.json, what generation_config.json and the tokenizer's files say of the same, and the
        sampler.

        Raises CheckpointError, which names file and key.
        """
        generation = folder / _GENERATION
        config = cls.parse(
            read_json(folder / _CONFIG),
            read_json(generation) if generation.is_file() else {},
            Vocabulary.from_folder(folder),
            has_adapter=(folder / ADAPTER_FOLDER).is_dir(),
        )
        return replace(config, sampler=read_sampler(folder))

    @classmethod
    def parse(
        cls,
        raw: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        vocabulary: Vocabulary | None = None,
        has_adapter: bool = False,
    ) -> "ModelConfig":
        """Parses config.json. Raises CheckpointError for an unknown model type or a value that can't be
        served.

        generation: generation_config.json. A text ends with any id that one of the files calls its end.
        """
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            raise CheckpointError(
                f"config.json: model_type {model_type!r} is not supported; use a checkpoint of "
                f"{', '.join(MODEL_TYPES)}"
            )
        fields = Fields(raw, _CONFIG)
        _refuse_unsupported(raw, model_type)
        hidden_size = fields.positive("hidden_size")
        num_heads = fields.positive("num_attention_heads")
        num_kv_heads = fields.positive("num_key_value_heads", num_heads)
        head_dim = fields.positive("head_dim", hidden_size // num_heads)
        if num_heads % num_kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads ({num_heads}) must be a multiple of "
                f"num_key_value_heads ({num_kv_heads})"
            )
        if head_dim % 2:
            raise CheckpointError(f"config.json: head_dim must be even, got {head_dim}")
        max_positions = fields.positive("max_position_embeddings")
        rope = _rope(fields, max_positions)
        if raw.get("sliding_window") is not None and fields.flag("use_sliding_window", True):
            # Every position attends to the whole cache, which is the model's own attention within a window.
            max_positions = min(max_positions, fields.positive("sliding_window"))
        num_rows = fields.positive("vocab_size")
        vocab_size = num_rows if vocabulary is None else min(num_rows, vocabulary.size)
        mask_token_id, eos_token_ids = _control_ids(
            fields, Fields(generation or {}, _GENERATION), vocabulary, num_rows, model_type == TRI_MODE_TYPE
        )
        return cls(
            model_type=model_type,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=fields.positive("intermediate_size"),
            num_layers=fields.positive("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6, 1e-30, 1.0),
            max_position_embeddings=max_positions,
            rope=rope,
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
            mask_token_id=mask_token_id,
            denoise_with_adapter=fields.flag("denoise_with_adapter"),
            has_adapter=has_adapter,
            block_size=fields.positive("block_size") if raw.get("block_size") is not None else None,
            eos_token_ids=eos_token_ids,
            num_padded_rows=num_rows - vocab_size,
        )


def _refuse_unsupported(raw: Mapping[str, Any], model_type: str) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"config.json: hidden_act {activation!r} is not supported, only 'silu'")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise CheckpointError(f"config.json: {key} is not supported for {model_type}")
    if raw.get("quantization_config"):
        raise CheckpointError("config.json: quantized checkpoints are not supported; use the bf16 weights")
    layer_types = raw.get("layer_types") or ["full_attention"]
    is_full = isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types)
    if not is_full and raw.get("sliding_window") is None:
        raise CheckpointError(f"config.json: layer_types {layer_types!r} are not supported")


def _control_ids(
    config: Fields, generation: Fields, vocabulary: Vocabulary | None, num_rows: int, is_tri_mode: bool
) -> tuple[int | None, frozenset[int]]:
    """The mask token's id, where the model has one, and those of the ends of text."""
    for fields in (config, generation):
        for key in ("bos_token_id", "pad_token_id"):
            fields.token_ids(key, TokenBound(num_rows, "vocab_size"))
    bound = TokenBound(num_rows, "vocab_size")
    if vocabulary is not None and vocabulary.size < num_rows:
        bound = TokenBound(vocabulary.size, "the tokenizer's vocabulary of")
    eos = config.token_ids("eos_token_id", bound) | generation.token_ids("eos_token_id", bound)
    named = {} if vocabulary is None else vocabulary.named
    if (end := named.get("eos_token")) is not None:
        if end >= num_rows:
            raise CheckpointError(
                f"tokenizer_config.json: eos_token has id {end}, which config.json's vocab_size {num_rows} "
                f"leaves out"
            )
        eos |= {end}
    mask = config.token_id("mask_token_id", bound) if is_tri_mode else None
    if mask is not None and mask in eos:
        raise config.error("mask_token_id", f"must not be an end of text as well, got {mask}")
    return mask, eos


def _rope(fields: Fields, max_positions: int) -> RopeConfig:
    """Reads the rotary embedding from `rope_parameters`, or from the older `rope_theta` and
    `rope_scaling`."""
    key = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    parameters = dict(fields.object(key))
    if by_layer := [name for name, value in parameters.items() if isinstance(value, dict)]:
        raise fields.error(key, f"by kind of layer is not supported, got {by_layer[0]!r}")
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    theta = parameters.get("rope_theta")
    parameters["rope_theta"] = fields.get("rope_theta") if theta is None else theta
    if parameters["rope_theta"] is None:
        parameters["rope_theta"] = 10000.0
    kind = parameters["rope_type"]
    if kind not in ROPE_TYPES:
        raise CheckpointError(
            f"config.json: rope_type {kind!r} is not supported, only {', '.join(ROPE_TYPES)}"
        )
    if parameters.get("partial_rotary_factor", fields.get("partial_rotary_factor") or 1.0) != 1.0:
        raise CheckpointError("config.json: partial_rotary_factor is not supported")
    rope = Fields(parameters, _CONFIG, f"{key}.")
    rope.number("rope_theta", None, 1.0 + 1e-9)
    original, beta = parameters.get("original_max_position_embeddings"), None
    if parameters.get("llama_4_scaling_beta") is not None:
        beta = rope.number("llama_4_scaling_beta", None, 0.0)
        if original is None:
            raise CheckpointError(
                f"config.json: {key} has llama_4_scaling_beta but no original_max_position_embeddings"
            )
    if original is not None or kind == "llama3":
        original = rope.positive("original_max_position_embeddings")
    if kind != "default":
        factor = rope.number("factor", None, 1.0)
        if kind == "llama3":
            _check_llama3(rope)
        if kind == "yarn":
            _check_yarn(rope, factor, original, max_positions)
    return RopeConfig(parameters, beta, original)


def _check_llama3(rope: Fields) -> None:
    low = rope.number("low_freq_factor", None, 1e-9)
    high = rope.number("high_freq_factor", None, 1e-9)
    if high <= low:
        raise rope.error("high_freq_factor", f"must be above low_freq_factor {low:g}, got {high:g}")


def _check_yarn(rope: Fields, factor: float, original: int | None, max_positions: int) -> None:
    fast, slow = rope.number("beta_fast", 32.0, 1e-9), rope.number("beta_slow", 1.0, 1e-9)
    if fast < slow:
        raise rope.error("beta_fast", f"must be at least beta_slow {slow:g}, got {fast:g}")
    for key in ("mscale", "mscale_all_dim"):
        rope.number(key, 1.0, 0.0)
    rope.number("attention_factor", 1.0, 1e-9)
    rope.flag("truncate")
    # A context shorter than YaRN was set up for is the model's own choice (Qwen2.5's is).
    if original is not None and max_positions > factor * original:
        raise rope.error(
            "factor",
            f"must be at least max_position_embeddings {max_positions} / original_max_position_embeddings "
            f"{original}, got {factor:g}",
        )
