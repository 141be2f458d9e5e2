"""The order of heads and of head dimensions inside the engine, and how weights are brought into it.

Published checkpoints order query heads as (kv head, query of it) and rotate dimension j with
j + head_dim / 2. Here query heads are ordered as (query of it, kv head), so that the queries of one
key head fold into rows of one attention product without a copy; and j stands beside j + head_dim / 2,
so that the rotation is one complex product. Both are permutations of weight rows, undone by the
output projection's columns: the model's function is the same.
"""

import torch

from replicas.model.config import ModelConfig


def query_rows(weight: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Reorders query rows [num_heads * head_dim, ...] from the published order to the engine's."""
    heads = weight.view(
        config.num_kv_heads, config.queries_per_kv, 2, config.head_dim // 2, *weight.shape[1:]
    )
    return heads.transpose(0, 1).transpose(2, 3).flatten(0, 3)


def key_rows(weight: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Reorders key rows [num_kv_heads * head_dim, ...] from the published order to the engine's."""
    heads = weight.view(config.num_kv_heads, 2, config.head_dim // 2, *weight.shape[1:])
    return heads.transpose(1, 2).flatten(0, 2)


def head_norm(weight: torch.Tensor) -> torch.Tensor:
    """Reorders the weight [head_dim] of a norm over one head from the published order to the engine's."""
    return weight.view(2, -1).transpose(0, 1).flatten()


def output_columns(weight: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Reorders columns [..., num_heads * head_dim], which read attention outputs; these are not rotated."""
    heads = weight.view(*weight.shape[:-1], config.num_kv_heads, config.queries_per_kv, config.head_dim)
    return heads.transpose(-3, -2).flatten(-3)
