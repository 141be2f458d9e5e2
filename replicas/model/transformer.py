"""The forward pass over packed rows: T tokens of any sequences, no padding outside attention."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from replicas.model.adapter import AdapterRows, LowRank
from replicas.model.attention import Attention, AttentionPlan
from replicas.model.checkpoint import LayerWeights, ModelWeights
from replicas.model.config import ModelConfig
from replicas.model.linear import Linear, make_linear
from replicas.model.parallel import ALONE, Parallel
from replicas.model.rotary import RotaryTable, rotate_


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward's input; the runner fills it, rows in the attention plan's order."""

    token_ids: torch.Tensor
    """[T] int64"""
    attention: AttentionPlan
    wanted: torch.Tensor | None
    """[W] int64, the rows whose logits are wanted, ascending; None means every row."""
    adapter: AdapterRows | None
    """The rows on which the draft adapter is on; None means none."""
    wanted_adapter: AdapterRows | None
    """The wanted rows on which it is on, by their place among these; None means none."""


class Transformer:
    """A decoder of the Llama family, or this process's part of one (replicas.model.parallel).

    Takes the weights over: they are emptied layer by layer. config: the part's own configuration.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        attention: Attention,
        num_positions: int,
        parallel: Parallel = ALONE,
    ):
        self._eps = config.rms_norm_eps
        self._heads = (config.num_heads, config.num_kv_heads)
        self._rotary = RotaryTable(config, num_positions)
        self._attention = attention
        self._embedding = weights.embedding
        self._layers: list[_Layer] = []
        weights.layers.reverse()
        while weights.layers:
            self._layers.append(_Layer(config, weights.layers.pop(), len(self._layers), parallel))
        self._norm = weights.norm
        self._width = len(weights.head)
        self._head = make_linear(weights.head)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Runs the batch -> logits [W, vocab] of the wanted rows, in the model's dtype; of several processes
        each has its part of them (replicas.model.parallel.VocabPart)."""
        factors = self._rotary.factors(batch.attention.positions, *self._heads)
        hidden = F.embedding(batch.token_ids, self._embedding)
        for layer in self._layers[:-1]:
            attended = layer.attend(hidden, factors, batch.attention, self._attention, batch.adapter)
            hidden = layer.finish(hidden, attended, batch.adapter)
        last = self._layers[-1]
        attended = last.attend(hidden, factors, batch.attention, self._attention, batch.adapter)
        if batch.wanted is not None:
            hidden, attended = hidden[batch.wanted], attended[batch.wanted]
        if not len(hidden):
            return hidden.new_empty(0, self._width)
        hidden = last.finish(hidden, attended, batch.wanted_adapter)
        return self._head(rms_norm(hidden, self._norm, self._eps))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, the root in float32."""
    if x.dtype is torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return wide.to(x.dtype).mul_(weight)


class _Layer:
    def __init__(self, config: ModelConfig, weights: LayerWeights, index: int, parallel: Parallel):
        self._index = index
        self._parallel = parallel
        self._eps = config.rms_norm_eps
        self._num_kv_heads = config.num_kv_heads
        self._num_rotated = config.num_heads + config.num_kv_heads
        self._split = [config.num_heads, 2 * config.num_kv_heads]
        self._head_dim = config.head_dim
        self._input_norm, self._post_norm = weights.input_norm, weights.post_norm
        self._query_norm, self._key_norm = weights.query_norm, weights.key_norm
        self._qkv: Linear = make_linear(weights.qkv, weights.qkv_bias)
        self._o: Linear = make_linear(weights.o)
        self._gate_up: Linear = make_linear(weights.gate_up)
        self._down: Linear = make_linear(weights.down)
        self._adapters: dict[str, LowRank] = weights.adapters

    def attend(
        self,
        hidden: torch.Tensor,
        factors: torch.Tensor,
        plan: AttentionPlan,
        attention: Attention,
        adapter: AdapterRows | None,
    ) -> torch.Tensor:
        """Norm, projection and attention: hidden [T, hidden_size] -> [T, heads * head_dim]."""
        x = rms_norm(hidden, self._input_norm, self._eps)
        qkv = self._adapted("qkv", self._qkv(x), x, adapter).view(len(x), -1, self._head_dim)
        queries, keys_values = qkv.split_with_sizes(self._split, 1)
        if self._query_norm is not None and self._key_norm is not None:
            keys = keys_values[:, : self._num_kv_heads]
            queries.copy_(rms_norm(queries, self._query_norm, self._eps))
            keys.copy_(rms_norm(keys, self._key_norm, self._eps))
        rotate_(qkv[:, : self._num_rotated], factors)
        return attention(self._index, queries, keys_values, plan)

    def finish(
        self, hidden: torch.Tensor, attended: torch.Tensor, adapter: AdapterRows | None
    ) -> torch.Tensor:
        """Output projection and MLP with their residuals; hidden may be overwritten."""
        hidden = self._added("o", self._o, hidden, attended, adapter)
        x = rms_norm(hidden, self._post_norm, self._eps)
        gate, up = self._adapted("gate_up", self._gate_up(x), x, adapter).chunk(2, -1)
        x = F.silu(gate).mul_(up)
        return self._added("down", self._down, hidden, x, adapter)

    def _added(
        self, name: str, linear: Linear, hidden: torch.Tensor, x: torch.Tensor, rows: AdapterRows | None
    ) -> torch.Tensor:
        """hidden + the product, summed over the processes that have a part of it; hidden may be
        overwritten."""
        if self._parallel.size == 1:
            return self._adapted(name, linear.add_to(hidden, x), x, rows)
        return hidden.add_(self._parallel.add(self._adapted(name, linear(x), x, rows)))

    def _adapted(self, name: str, y: torch.Tensor, x: torch.Tensor, rows: AdapterRows | None) -> torch.Tensor:
        if rows is None or name not in self._adapters:
            return y
        return self._adapters[name].add_to(y, x, rows)
