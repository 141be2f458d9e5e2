"""Checkpoints from a folder or a hub name into weights in the engine's layout."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from replicas.machine import available_bytes
from replicas.model import layout
from replicas.model.adapter import LowRank, load_adapter, load_mask_row
from replicas.model.config import ADAPTER_FOLDER, TRI_MODE_TYPE, CheckpointError, ModelConfig, read_json
from replicas.model.place import local_folder
from replicas.progress import logged

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", f"{ADAPTER_FOLDER}/*"]
_GIB = 1 << 30

Encode = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Codes of a matrix [rows, columns], of its shape, and the scales of its rows, [rows] float32."""

__all__ = ["CheckpointError", "LayerWeights", "ModelWeights", "load_weights", "resolve_folder", "weights_to"]


@dataclass(slots=True)
class LayerWeights:
    """The weights of one decoder layer; heads and columns are in the engine's order."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    """[(heads + 2 kv_heads) * head_dim, hidden], q, k and v fused"""
    qkv_bias: torch.Tensor | None
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    o: torch.Tensor
    """[hidden, heads * head_dim]"""
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    """[2 * intermediate, hidden], gate and up fused"""
    down: torch.Tensor
    """[hidden, intermediate]"""
    adapters: dict[str, LowRank] = field(default_factory=dict)
    """The updates by the name of the fused matrix they change ("qkv", "o", "gate_up", "down")."""
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    """By the same names, [rows] float32, the scales of matrices that are codes (`weights_to`)."""


@dataclass(slots=True)
class ModelWeights:
    """The weights of a model, or of a process's part of one."""

    embedding: torch.Tensor
    """[vocab, hidden]"""
    layers: list[LayerWeights]
    norm: torch.Tensor
    """[hidden]"""
    head: torch.Tensor
    """[vocab, hidden]; the embedding's own tensor where they are tied and it is no code"""
    head_scales: torch.Tensor | None = None
    """[vocab] float32, where the head is codes"""


def resolve_folder(checkpoint: str) -> Path:
    """The folder of a checkpoint; a name that is no folder is fetched from the hub.

    Raises CheckpointError when it can't be found.
    """
    folder = local_folder(checkpoint)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(checkpoint, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{checkpoint} is no folder and can't be fetched from the hub: {error}"
        ) from error


def load_weights(
    folder: Path, config: ModelConfig, dtype: torch.dtype, *, reserved_bytes: int = 0
) -> ModelWeights:
    """Read all tensors, checked against the config.

    reserved_bytes: what the caller will need besides the weights (K/V pages); it counts in the
    estimate of whether memory suffices, made before anything is read.
    Raises CheckpointError for a missing tensor, a wrong shape, a dtype that can't be converted, or
    too little memory.
    """
    _check_memory(config, dtype, reserved_bytes)
    with ExitStack() as stack:
        reader = _TensorReader(folder, stack)
        tri_mode = config.model_type == TRI_MODE_TYPE
        prefix = "encoder" if tri_mode else "model"
        head_name = "diffusion_head.weight" if tri_mode else "lm_head.weight"

        def read(name: str, *shape: int) -> torch.Tensor:
            return _copied(reader.read(name, shape), dtype)

        def read_rows(name: str) -> torch.Tensor:
            stored = read(name, config.vocab_size + config.num_padded_rows, config.hidden_size)
            return stored[: config.vocab_size]

        embedding = read_rows(f"{prefix}.embed_tokens.weight")
        tied = config.tie_word_embeddings and head_name not in reader
        head = embedding if tied else read_rows(head_name)
        layers = [
            _read_layer(reader, f"{prefix}.layers.{index}", config, dtype)
            for index in logged(range(config.num_layers), config.num_layers, "loading layers", logger)
        ]
        norm = read(f"{prefix}.norm.weight", config.hidden_size)
    if tri_mode and config.has_adapter:
        _attach_adapter(folder / ADAPTER_FOLDER, embedding, layers, config, dtype)
    return ModelWeights(embedding, layers, norm, head)


def weights_to(weights: ModelWeights, device: torch.device, encode: Encode | None = None) -> ModelWeights:
    """The weights on a device, each moved at once, so that no second whole copy is ever made.

    encode: makes codes and scales of the linear layers' matrices, the head's among them; None leaves them
    """

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device).contiguous()

    def move_optional(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else move(tensor)

    def move_matrix(name: str, tensor: torch.Tensor, scales: dict[str, torch.Tensor]) -> torch.Tensor:
        moved = move(tensor)
        if encode is not None:
            moved, scales[name] = encode(moved)
        return moved

    embedding = move(weights.embedding)
    layers = []
    weights.layers.reverse()
    while weights.layers:
        layer = weights.layers.pop()
        adapters = {name: LowRank(move(pair.down), move(pair.up)) for name, pair in layer.adapters.items()}
        scales: dict[str, torch.Tensor] = {}
        layers.append(
            LayerWeights(
                input_norm=move(layer.input_norm),
                qkv=move_matrix("qkv", layer.qkv, scales),
                qkv_bias=move_optional(layer.qkv_bias),
                query_norm=move_optional(layer.query_norm),
                key_norm=move_optional(layer.key_norm),
                o=move_matrix("o", layer.o, scales),
                post_norm=move(layer.post_norm),
                gate_up=move_matrix("gate_up", layer.gate_up, scales),
                down=move_matrix("down", layer.down, scales),
                adapters=adapters,
                scales=scales,
            )
        )
    head = embedding if weights.head is weights.embedding else move(weights.head)
    head_scales = None
    if encode is not None:
        head, head_scales = encode(head)
    return ModelWeights(embedding, layers, move(weights.norm), head, head_scales)


def _read_layer(
    reader: "_TensorReader", prefix: str, config: ModelConfig, dtype: torch.dtype
) -> LayerWeights:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def read(name: str, *shape: int) -> torch.Tensor:
        return _copied(reader.read(f"{prefix}.{name}", shape), dtype)

    def read_qkv(suffix: str, *columns: int) -> torch.Tensor:
        return torch.cat(
            [
                layout.query_rows(read(f"self_attn.q_proj.{suffix}", query, *columns), config),
                layout.key_rows(read(f"self_attn.k_proj.{suffix}", key, *columns), config),
                read(f"self_attn.v_proj.{suffix}", key, *columns),
            ]
        )

    def read_head_norm(name: str) -> torch.Tensor | None:
        return layout.head_norm(read(name, config.head_dim)) if config.qk_norm else None

    gate_up = [read(f"mlp.{name}_proj.weight", intermediate, hidden) for name in ("gate", "up")]
    return LayerWeights(
        input_norm=read("input_layernorm.weight", hidden),
        qkv=read_qkv("weight", hidden),
        qkv_bias=read_qkv("bias") if config.qkv_bias else None,
        query_norm=read_head_norm("self_attn.q_norm.weight"),
        key_norm=read_head_norm("self_attn.k_norm.weight"),
        o=layout.output_columns(read("self_attn.o_proj.weight", hidden, query), config).contiguous(),
        post_norm=read("post_attention_layernorm.weight", hidden),
        gate_up=torch.cat(gate_up),
        down=read("mlp.down_proj.weight", hidden, intermediate),
    )


def _copied(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy even where the dtype is the same: one tensor left as stored keeps the whole file mapped."""
    return stored.to(dtype, copy=True)


def _attach_adapter(
    folder: Path,
    embedding: torch.Tensor,
    layers: list[LayerWeights],
    config: ModelConfig,
    dtype: torch.dtype,
) -> None:
    raw = read_json(folder / "adapter_config.json")
    with ExitStack() as stack:
        reader = _TensorReader(folder, stack, stem="adapter_model")
        mask_row = load_mask_row(raw, list(reader), reader.read, config)
        adapters = load_adapter(raw, list(reader), reader.read, config)
    if mask_row is not None:
        # No causal forward sees the mask token, and none chooses it where head and embedding are one.
        embedding[config.mask_token_id] = mask_row.to(dtype)
    for layer, by_name in zip(layers, adapters, strict=True):
        layer.adapters = {name: adapter.to(dtype) for name, adapter in by_name.items()}


class _TensorReader:
    """Reads tensors by name from one safetensors file or from shards with an index, when asked for."""

    def __init__(self, folder: Path, stack: ExitStack, stem: str = "model"):
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            self._file_of = _weight_map(index)
        elif not single.is_file():
            raise CheckpointError(f"{folder} has neither {single.name} nor {index.name}")
        for name in sorted(set(self._file_of.values()) or {single.name}):
            self._files[name] = self._open(folder / name, stack)
        if not self._file_of:
            self._file_of = dict.fromkeys(self._files[single.name].keys(), single.name)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor as stored. Raises CheckpointError unless it is there, in this shape, in floats."""
        if name not in self._file_of:
            raise CheckpointError(f"{self._folder}: tensor {name} is missing; expected shape {list(shape)}")
        file = self._file_of[name]
        try:
            tensor: torch.Tensor = self._files[file].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self._folder / file}: tensor {name} can't be read: {error}") from error
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self._folder / file}: tensor {name} has shape {list(tensor.shape)}, "
                f"config.json implies {list(shape)}"
            )
        if tensor.dtype not in _STORED_DTYPES:
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in _STORED_DTYPES)
            found = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{self._folder / file}: tensor {name} has dtype {found}, expected one of {expected}"
            )
        return tensor

    @staticmethod
    def _open(path: Path, stack: ExitStack) -> Any:
        try:
            return stack.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing, though the index names it") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor by name; the files lie beside the index."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index}: weight_map must be an object of tensors' names and files")
    for tensor, file in found.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{index}: weight_map: {tensor} must be in a file of this folder, got {file!r}"
            )
    return found


def weights_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """The memory of the weights on a CPU."""
    weights = config.num_parameters * dtype.itemsize
    if config.tie_word_embeddings:
        # The prepacked head is a copy of the embedding.
        weights += config.vocab_size * config.hidden_size * dtype.itemsize
    return weights


def _check_memory(config: ModelConfig, dtype: torch.dtype, reserved_bytes: int) -> None:
    weights = weights_bytes(config, dtype)
    available = available_bytes()
    if weights + reserved_bytes <= available:
        return
    bfloat16 = "bfloat16 or " if dtype.itemsize > 2 else ""
    if weights > available:
        advice = f"the weights alone do not fit: use {bfloat16}a smaller checkpoint"
    else:
        advice = f"use fewer pages (kv_cache_mb), {bfloat16}a smaller checkpoint"
    raise CheckpointError(
        f"too little memory: {weights / _GIB:.1f} GiB of weights and {reserved_bytes / _GIB:.1f} GiB of "
        f"K/V pages, {available / _GIB:.1f} GiB available; {advice}"
    )
