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
        if beta is not None and original_max is not None:
            self.query_scale = 1 + beta * torch.log(1 + torch.floor(positions / original_max))

    def query_and_key(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T] -> the factors of queries and keys, each [T, 1, head_dim / 2] complex64."""
        key = self.phases[positions].unsqueeze(1)
        if self.query_scale is None:
            return key, key
        return key * self.query_scale[positions, None, None], key


def rotate(heads: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
    """heads [T, N, head_dim], neighbours 2j and 2j + 1 one complex number; phases [T, 1, head_dim / 2].

    The pairs are neighbours because the loader interleaves the two halves of each head (layout.py).
    Returns a new contiguous tensor of the same dtype; the product is taken in float32.
    """
    pairs = torch.view_as_complex(heads.float().view(*heads.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * phases).flatten(-2).to(heads.dtype)


def _frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """[head_dim / 2] float32 inverse frequencies, and the factor of cos and sin."""
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
