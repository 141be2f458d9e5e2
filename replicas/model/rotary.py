"""The rotary embedding as a table of complex numbers, one row a position."""

import torch
from transformers import Ministral3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from replicas.model.config import ModelConfig


class RotaryTable:
    """Angles of positions 0..num_positions-1, and the queries' scale at each.

    phases: [num_positions, head_dim / 2] complex64, cos + i sin, times the attention factor (YaRN).
    query_scale: [num_positions] float32, or None where the model has no query scaling.

    Frequencies and attention factor are transformers' own (modeling_rope_utils), so they agree with
    it bit by bit; the query scale is that of Ministral 3: 1 + beta * log(1 + floor(p / original_max)).
    """

    def __init__(self, config: ModelConfig, num_positions: int):
        inv_freq, factor = _frequencies(config)
        positions = torch.arange(num_positions)
        angles = positions[:, None].float() * inv_freq
        self.phases = torch.complex(angles.cos() * factor, angles.sin() * factor)
        self.query_scale: torch.Tensor | None = None
        beta, original_max = config.rope.query_beta, config.rope.original_max_positions
        if beta and original_max is not None:
            self.query_scale = 1 + beta * torch.log(1 + torch.floor(positions / original_max))

    def factors(self, positions: torch.Tensor, num_heads: int, num_kv_heads: int) -> torch.Tensor:
        """Factors of query heads, then key heads, at positions [T]: [T, heads + kv_heads, head_dim / 2]."""
        keys = self.phases[positions].unsqueeze(1)
        if self.query_scale is None:
            return keys
        queries = keys * self.query_scale[positions, None, None]
        return torch.cat((queries.expand(-1, num_heads, -1), keys.expand(-1, num_kv_heads, -1)), 1)


def rotate_(heads: torch.Tensor, factors: torch.Tensor) -> None:
    """Multiply heads [T, N, head_dim] in place by factors [T, N or 1, head_dim / 2] complex64.

    Neighbours 2j and 2j + 1 are one complex number, because the loader interleaves the two halves of
    each head (layout.py). The product is taken in float32.
    """
    pairs = heads.view(*heads.shape[:2], -1, 2)
    if heads.dtype is torch.float32:
        torch.view_as_complex(pairs).mul_(factors)
    else:
        pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()).mul_(factors)))


def _frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """The inverse frequencies [head_dim / 2] float32, and the factor of cos and sin."""
    parameters = config.rope.parameters
    if config.rope.rope_type == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    reference = Ministral3Config(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=dict(parameters),
    )
    inv_freq, factor = ROPE_INIT_FUNCTIONS[config.rope.rope_type](reference)
    return inv_freq, float(factor)
