"""The adapter (LoRA): two thin products, on the rows of bidirectional segments only."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from replicas.model import layout
from replicas.model.config import CheckpointError, ModelConfig
from replicas.model.fields import Fields

_FUSED = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "o",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "down_proj": "down",
}
_TRAINED_TOKENS = re.compile(r"\bembed_tokens\.(?:token_adapter\.)?trainable_tokens_delta(?:\.default)?$")
_TENSOR_NAME = re.compile(r"\blayers\.(\d+)\.(?:\w+\.)*?([a-z]+_proj)\.lora_([AB])(?:\.default)?\.weight$")

ReadTensor = Callable[[str, tuple[int, ...]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """The rows of a packed batch on which the adapter is on."""

    index: torch.Tensor | None
    """[R] int64; None means every row."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """A low-rank update of a linear layer, y += x down^T up^T, with the adapter's scale folded into `up`.

    Projections that share a fused matrix share one update, with their ranks stacked.
    """

    down: torch.Tensor
    """[rank, in]"""
    up: torch.Tensor
    """[out, rank]"""

    def to(self, dtype: torch.dtype) -> "LowRank":
        return LowRank(self.down.to(dtype).contiguous(), self.up.to(dtype).contiguous())

    def add_to(self, y: torch.Tensor, x: torch.Tensor, rows: AdapterRows) -> torch.Tensor:
        """Adds the update of x [T, in] to y [T, out] in place, at `rows` alone."""
        if rows.index is None:
            return y.addmm_(x @ self.down.t(), self.up.t())
        delta = (x.index_select(0, rows.index) @ self.down.t()) @ self.up.t()
        return y.index_add_(0, rows.index, delta)


def load_adapter(
    raw: Mapping[str, Any], names: Sequence[str], read: ReadTensor, config: ModelConfig
) -> list[dict[str, LowRank]]:
    """The adapter's updates, one dict a layer by the fused matrix's name; float32, in the engine's layout.

    raw: adapter_config.json
    names: the tensors of the adapter's file, in PEFT's naming, whatever prefix stands before `layers.N`

    Raises CheckpointError.
    """
    rank, scale = _rank_and_scale(raw)
    shapes = _projection_shapes(config)
    tensors: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for name in names:
        if _TRAINED_TOKENS.search(name):
            continue
        found = _TENSOR_NAME.search(name)
        if not found or found[2] not in shapes or int(found[1]) >= config.num_layers:
            raise CheckpointError(f"linear_spec_lora: tensor {name} belongs to no projection of the model")
        layer, projection, side = int(found[1]), found[2], found[3]
        rows, columns = shapes[projection]
        shape = (rank, columns) if side == "A" else (rows, rank)
        tensors.setdefault((layer, projection), {})[side] = read(name, shape).float()
    layers: list[dict[str, LowRank]] = []
    for layer in range(config.num_layers):
        pairs = {}
        for projection in shapes:
            pair = tensors.get((layer, projection))
            if pair is None:
                continue
            if len(pair) < 2:
                missing = "lora_B" if "A" in pair else "lora_A"
                raise CheckpointError(f"linear_spec_lora: layer {layer} {projection} has no {missing}")
            pairs[projection] = _in_layout(projection, pair["A"], scale * pair["B"], config)
        layers.append(_fuse(pairs, shapes))
    if not any(layers):
        raise CheckpointError("linear_spec_lora: the adapter has no tensors")
    return layers


def load_mask_row(
    raw: Mapping[str, Any], names: Sequence[str], read: ReadTensor, config: ModelConfig
) -> torch.Tensor | None:
    """The mask token's embedding [hidden], if the adapter brings one (PEFT's `trainable_token_indices`).

    In PEFT's files such rows stand in the embedding's place, in spite of the tensor's name. Raises
    CheckpointError when another token's row is among them: causal forwards would no longer be the base's.
    """
    indices = raw.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = indices.get("embed_tokens") if set(indices) == {"embed_tokens"} else list(indices)
    name = next((name for name in names if _TRAINED_TOKENS.search(name)), None)
    if not indices and name is None:
        return None
    if indices != [config.mask_token_id] or name is None:
        raise CheckpointError(
            f"linear_spec_lora: trainable_token_indices {indices!r} with tensor {name}; only "
            f"the mask token's row of embed_tokens, [{config.mask_token_id}], may be trained"
        )
    return read(name, (1, config.hidden_size))[0]


def _rank_and_scale(raw: Mapping[str, Any]) -> tuple[int, float]:
    fields = Fields(raw, "linear_spec_lora/adapter_config.json")
    rank, alpha = fields.positive("r"), fields.number("lora_alpha", None, 1e-9)
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if raw.get(key):
            raise CheckpointError(f"linear_spec_lora/adapter_config.json: {key} is not supported")
    if raw.get("bias", "none") != "none":
        raise CheckpointError("linear_spec_lora/adapter_config.json: bias is not supported, only 'none'")
    return rank, alpha / (math.sqrt(rank) if fields.flag("use_rslora") else rank)


def _projection_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The shape [out, in] of each projection, in the order in which they are fused."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "q_proj": (query, hidden),
        "k_proj": (key, hidden),
        "v_proj": (key, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }


def _in_layout(projection: str, down: torch.Tensor, up: torch.Tensor, config: ModelConfig) -> LowRank:
    if projection == "q_proj":
        up = layout.query_rows(up, config)
    elif projection == "k_proj":
        up = layout.key_rows(up, config)
    elif projection == "o_proj":
        down = layout.output_columns(down, config)
    return LowRank(down, up)


def _fuse(pairs: Mapping[str, LowRank], shapes: Mapping[str, tuple[int, int]]) -> dict[str, LowRank]:
    """Stacks the ranks of projections that share a fused matrix; `up` is block diagonal, zero elsewhere."""
    fused = {}
    for name in dict.fromkeys(_FUSED[projection] for projection in pairs):
        parts = [projection for projection in shapes if _FUSED[projection] == name]
        downs = torch.cat([pairs[part].down for part in parts if part in pairs])
        up = torch.zeros(sum(shapes[part][0] for part in parts), downs.shape[0])
        row = column = 0
        for part in parts:
            if part in pairs:
                block = pairs[part].up
                up[row : row + block.shape[0], column : column + block.shape[1]] = block
                column += block.shape[1]
            row += shapes[part][0]
        fused[name] = LowRank(downs, up)
    return fused
