"""SmolLM2 frozen, with a trained adapter beside every linear layer and a trained mask token.

Three forwards, which are the three that serving makes: `clean` is causal, without adapter, and gives the K/V
that all else attends to; `noisy` is bidirectional within blocks, with adapter, over the clean K/V before each
block; `decode` is one causal token a row over a cache, for sampling. Tensors have the published layout.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from replicas.model.config import ModelConfig
from training.model import rotate

PROJECTIONS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
"""The adapted layers, and each one's module."""


class AdaptedLinear(nn.Module):
    """A linear layer with an adapter: y = W x, and + B A x where the adapter is on.

    The weight W [out, in] is frozen; lora_A is [rank, in], lora_B [out, rank], which starts at zero.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.register_buffer("weight", weight, persistent=False)
        self.lora_A = nn.Parameter(torch.randn(rank, columns) * columns**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, x: Tensor, adapted: bool) -> Tensor:
        y = F.linear(x, self.weight)
        if not adapted:
            return y
        return y + F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))


class Layer(nn.Module):
    """One decoder layer. K and V are [rows, kv_heads, length, head_dim], keys after the rotary embedding."""

    input_norm: Tensor
    post_norm: Tensor

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], rank: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        self.eps = config.rms_norm_eps
        self.register_buffer("input_norm", weights["input_layernorm.weight"], persistent=False)
        self.register_buffer("post_norm", weights["post_attention_layernorm.weight"], persistent=False)

        def adapted(name: str) -> AdaptedLinear:
            return AdaptedLinear(weights[f"{PROJECTIONS[name]}.{name}.weight"], rank)

        self.q_proj, self.k_proj, self.v_proj = adapted("q_proj"), adapted("k_proj"), adapted("v_proj")
        self.o_proj = adapted("o_proj")
        self.gate_proj, self.up_proj = adapted("gate_proj"), adapted("up_proj")
        self.down_proj = adapted("down_proj")
        self.project: Callable[..., tuple[Tensor, Tensor, Tensor]] = self._project
        self.finish: Callable[..., Tensor] = self._finish

    def compile_parts(self) -> None:
        """Compiles the parts before and after attention to few kernels; one compilation serves all layers."""
        self.project = torch.compile(self._project, dynamic=False)
        self.finish = torch.compile(self._finish, dynamic=False)

    def _project(self, x: Tensor, cos: Tensor, sin: Tensor, adapted: bool) -> tuple[Tensor, Tensor, Tensor]:
        rows, length, _ = x.shape
        x = F.rms_norm(x, (x.shape[-1],), self.input_norm, self.eps)
        q = self.q_proj(x, adapted).view(rows, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x, adapted).view(rows, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x, adapted).view(rows, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        return rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype), v

    def _finish(self, x: Tensor, attended: Tensor, adapted: bool) -> Tensor:
        rows, length, _ = x.shape
        x = x + self.o_proj(attended.transpose(1, 2).reshape(rows, length, -1), adapted)
        h = F.rms_norm(x, (x.shape[-1],), self.post_norm, self.eps)
        return x + self.down_proj(F.silu(self.gate_proj(h, adapted)) * self.up_proj(h, adapted), adapted)

    def _heads(self, kv: Tensor) -> Tensor:
        return kv.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)

    def clean(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Causal, without adapter: x [rows, length, hidden] -> x, K, V."""
        q, k, v = self.project(x, cos, sin, False)
        attended = F.scaled_dot_product_attention(q, self._heads(k), self._heads(v), is_causal=True)
        return self.finish(x, attended, False), k, v

    def noisy(
        self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Bidirectional, with adapter: x [rows, noisy, hidden] -> x.

        keys, values: the clean ones; bias: [rows, 1, noisy, clean + noisy]
        """
        q, k, v = self.project(x, cos, sin, True)
        k, v = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
        attended = F.scaled_dot_product_attention(q, self._heads(k), self._heads(v), attn_mask=bias)
        return self.finish(x, attended, True)

    def decode(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        bias: Tensor,
        cache: tuple[Tensor, Tensor],
        positions: Tensor,
    ) -> Tensor:
        """One causal token a row: x [rows, 1, hidden] -> x. The cache takes its K and V at positions [rows].

        bias: [rows, 1, 1, cached]

        The query heads of one K/V head are so many queries of it, so that nothing of the cache is copied.
        """
        q, k, v = self.project(x, cos, sin, False)
        row = torch.arange(len(x), device=x.device)
        for kept, new in zip(cache, (k, v), strict=True):
            kept[row, :, positions] = new[:, :, 0]
        q = q.view(len(x), self.num_kv_heads, -1, self.head_dim)
        attended = F.scaled_dot_product_attention(q, *cache, attn_mask=bias)
        return self.finish(x, attended.reshape(len(x), self.num_heads, 1, self.head_dim), False)


class AdaptedModel(nn.Module):
    """The frozen base with its adapter and mask token.

    state_dict() holds what is trained: the adapter and the mask token's embedding, in float32. Raises
    ValueError for a base that is not tied or has no mask token.
    """

    embedding: Tensor
    norm: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor], rank: int, num_positions: int, seed: int = 0
    ) -> None:
        """weights: the published tensors, without the adapter; num_positions: the longest row's length"""
        super().__init__()
        if config.mask_token_id is None or not config.tie_word_embeddings:
            raise ValueError("the recipe is for a checkpoint with a mask token and one matrix for both ends")
        torch.manual_seed(seed)
        self.config = config
        self.rank = rank
        self.mask_token_id = config.mask_token_id
        self.register_buffer("embedding", weights["encoder.embed_tokens.weight"], persistent=False)
        self.register_buffer("norm", weights["encoder.norm.weight"], persistent=False)
        self.mask_row = nn.Parameter(self.embedding.float().mean(0))
        self._layers = nn.ModuleList()
        for index in range(config.num_layers):
            prefix = f"encoder.layers.{index}."
            own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            self._layers.append(Layer(config, own, rank))
        exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        angles = torch.arange(num_positions)[:, None] * config.rope.parameters["rope_theta"] ** -exponents
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @classmethod
    def load(
        cls, folder: Path, rank: int, num_positions: int, dtype: torch.dtype, seed: int = 0
    ) -> "AdaptedModel":
        weights = {name: w.to(dtype) for name, w in load_file(folder / "model.safetensors").items()}
        return cls(ModelConfig.from_folder(folder), weights, rank, num_positions, seed)

    @property
    def layers(self) -> Sequence[Layer]:
        return cast(Sequence[Layer], self._layers)

    def compile_layers(self) -> None:
        """Compiles the layers, faster on a GPU. A part that the compiler fails on runs as it is."""
        torch._dynamo.config.suppress_errors = True
        torch._dynamo.config.recompile_limit = 32  # one for each shape, of which there are about ten
        for layer in self.layers:
            layer.compile_parts()

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions [rows, length] -> [rows, 1, length, head_dim / 2] each."""
        return self.cos[positions][:, None], self.sin[positions][:, None]

    @torch.no_grad()
    def clean(self, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Causal: ids [rows, length] -> normed hidden states [rows, length, hidden], and each layer's K and
        V.

        Padding at a row's end changes nothing before it.
        """
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        cos, sin = self._angles(positions)
        x = F.embedding(ids, self.embedding)
        cached = []
        for layer in self.layers:
            x, keys, values = layer.clean(x, cos, sin)
            cached.append((keys, values))
        return self._normed(x), cached

    def noisy(
        self, ids: Tensor, positions: Tensor, mask: Tensor, cached: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Bidirectional: ids, positions [rows, noisy] -> normed hidden states [rows, noisy, hidden].

        mask: bool [rows, noisy, clean + noisy], True where a token may attend; cached: from `clean`
        """
        cos, sin = self._angles(positions)
        masked = (ids == self.mask_token_id)[..., None]
        x = torch.where(masked, self.mask_row.to(self.embedding.dtype), F.embedding(ids, self.embedding))
        bias = torch.zeros_like(mask[:, None], dtype=x.dtype).masked_fill_(~mask[:, None], -torch.inf)
        for layer, (keys, values) in zip(self.layers, cached, strict=True):
            x = layer.noisy(x, cos, sin, bias, keys, values)
        return self._normed(x)

    @torch.no_grad()
    def decode(self, ids: Tensor, positions: Tensor, cached: list[tuple[Tensor, Tensor]]) -> Tensor:
        """One token a row: ids, positions [rows] -> normed hidden states [rows, hidden].

        cached: [rows, kv_heads, capacity, head_dim] a layer, which takes the tokens in; what lies past a
        row's position is not seen
        """
        cos, sin = self._angles(positions[:, None])
        x = F.embedding(ids[:, None], self.embedding)
        unseen = torch.arange(cached[0][0].shape[2], device=ids.device) > positions[:, None]
        bias = torch.zeros_like(unseen, dtype=x.dtype).masked_fill_(unseen, -torch.inf)[:, None, None]
        for layer, cache in zip(self.layers, cached, strict=True):
            x = layer.decode(x, cos, sin, bias, cache, positions)
        return self._normed(x)[:, 0]

    def _normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.norm, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """The float32 logits [..., vocab] of normed hidden states [..., hidden], the mask token's at -inf."""
        logits = F.linear(hidden, self.embedding).float()
        logits[..., self.mask_token_id] = -torch.inf
        return logits
