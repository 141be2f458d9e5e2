"""The training-side transformer: Ministral 3's layers under the published checkpoint's tensor names.

`transformers.models.ministral3` computes the same (a test compares them); this one exists because it
compiles into one graph and attends from the clean and the noisy half separately, which makes a step on
a CPU faster. Query scaling is 1 within `original_max_position_embeddings` and therefore absent here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; head_dim is hidden_size / num_heads."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int = 4
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    copying_start: float = 1.0
    """The strength with which attention starts out copying what it attends to; 0 is a plain random start."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [rows, heads, length, head_dim] by cos, sin [rows, 1, length, head_dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention written out: on a CPU with rows this short faster than the fused kernel, above all backwards.

    q [rows, heads, queries, head_dim], k, v [rows, heads, keys, head_dim]; mask bool [rows, queries, keys].
    """
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)).float()
    weights = scores.masked_fill(~mask[:, None], -1e9).softmax(-1)
    return torch.matmul(weights.to(v.dtype), v)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden, bias=False)

    @torch.no_grad()
    def start_copying(self, strength: float) -> None:
        """Adds to each head's output projection `strength` times its value projection transposed.

        The product of the two is then positive: a head passes on what it attends to, whatever that is, so
        words in the context become likelier at once and attention learns where to look. Without it a head
        must learn what to pass on and where to look together, each useless without the other (mimetic
        initialisation, arXiv 2305.09828).
        """
        groups = self.num_heads // self.num_kv_heads
        for head in range(self.num_heads):
            rows = slice(head // groups * self.head_dim, (head // groups + 1) * self.head_dim)
            columns = slice(head * self.head_dim, (head + 1) * self.head_dim)
            self.o_proj.weight[:, columns] += strength * self.v_proj.weight[rows].T

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, clean_mask: Tensor, noisy_mask: Tensor | None
    ) -> Tensor:
        rows, length, _ = x.shape
        q = self.q_proj(x).view(rows, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(rows, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(rows, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        groups = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        num_clean = clean_mask.shape[-1]
        out = attend(q[:, :, :num_clean], k[:, :, :num_clean], v[:, :, :num_clean], clean_mask)
        if noisy_mask is not None:
            out = torch.cat((out, attend(q[:, :, num_clean:], k, v, noisy_mask)), dim=2)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, clean_mask: Tensor, noisy_mask: Tensor | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, clean_mask, noisy_mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Encoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class TriModel(nn.Module):
    """Ministral 3 layers over [clean | noisy] sequences.

    Embedding and head share one matrix, scaled by sqrt(hidden_size) in the embedding (as in Gemma), so that
    the word stands out in the residual stream and an attention head that passes it on copies it: copying is
    learned for all words at once. The published checkpoint has two matrices.
    """

    cos: Tensor
    """float32 [positions, head_dim / 2]"""
    sin: Tensor
    """float32 [positions, head_dim / 2]"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.diffusion_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.encoder.embed_tokens.weight = self.diffusion_head.weight
        self.embedding_scale = config.hidden_size**0.5
        inv_freq = config.rope_theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles = torch.arange(config.max_position_embeddings)[:, None] * inv_freq  # [positions, head_dim / 2]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = 0.04 if ".layers." not in name else parameter.shape[1] ** -0.5 * 0.8
                if "o_proj" in name or "down_proj" in name:
                    scale /= (2 * config.num_layers) ** 0.5
                nn.init.normal_(parameter, std=scale)
        _, *later = (module for module in self.modules() if isinstance(module, Attention))
        for attention in later:
            attention.start_copying(config.copying_start)

    def forward(
        self, ids: Tensor, positions: Tensor, clean_mask: Tensor, noisy_mask: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the last norm, [rows, clean + noisy, hidden].

        ids, positions: int64 [rows, clean + noisy]; clean_mask: bool [rows, clean, clean], True where a clean
        query may attend; noisy_mask: bool [rows, noisy, clean + noisy], or None when there is no noisy half.
        """
        x = self.encoder.embed_tokens(ids) * self.embedding_scale
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        for layer in self.encoder.layers:
            x = layer(x, cos, sin, clean_mask, noisy_mask)
        return self.encoder.norm(x)

    def published_state(self) -> dict[str, Tensor]:
        """The published checkpoint's tensors: the embedding scaled, and apart from the head."""
        state = {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
        state["encoder.embed_tokens.weight"] *= self.embedding_scale
        return state

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Takes the weights of a checkpoint as `published_state` gives it.

        ValueError where its embedding is not its head, scaled: such a one was not trained tied.
        """
        head, embedding = state["diffusion_head.weight"], state["encoder.embed_tokens.weight"]
        if not torch.allclose(embedding, head * self.embedding_scale):
            raise ValueError("the checkpoint's embedding and head are apart; one trained here has them tied")
        self.load_state_dict({**state, "encoder.embed_tokens.weight": head})

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab_size] of hidden states [..., hidden]."""
        return self.diffusion_head(hidden)
