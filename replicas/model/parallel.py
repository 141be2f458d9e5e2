"""Tensor parallelism: one model over several processes, each with a part of every layer.

Query, key, value, gate and up matrices are split by rows, so each process has some K/V heads with their
queries and some of the MLP; output and down matrices by columns, so their products are sums to which each
process adds its part (Megatron-LM, arXiv 1909.08053). The head is split by tokens of the vocabulary, the last
part padded where they do not divide: of rows whose most probable token is all that is asked each process
tells its own, the logits of others are gathered. One process is the same code with nothing to add or gather.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F

from replicas.model.adapter import LowRank
from replicas.model.checkpoint import LayerWeights, ModelWeights
from replicas.model.config import CheckpointError, ModelConfig


class Parallel:
    """The processes that share a model, by torch.distributed's default group; without one, this one alone."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank = rank
        self.size = size

    @classmethod
    def of_default_group(cls) -> "Parallel":
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def add(self, partial: torch.Tensor) -> torch.Tensor:
        """Adds up the processes' tensors `partial`, all of one shape, in place."""
        if self.size > 1 and partial.numel():
            dist.all_reduce(partial)
        return partial

    def min(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        if self.size == 1:
            return number
        numbers = [0] * self.size
        dist.all_gather_object(numbers, number)
        return min(numbers)

    def gather(self, part: torch.Tensor, width: int) -> torch.Tensor:
        """Joins the processes' parts [W, n] -> [W, width] by rank; what is past width is padding."""
        if self.size == 1:
            return part
        return torch.cat(self._gathered(part).unbind(), -1)[:, :width]

    def best(
        self, largest: torch.Tensor, tokens: torch.Tensor, log_sums: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each process's most probable tokens of W rows, [W] each, those of whole rows.

        largest: their logits; tokens: ids of the whole vocabulary; log_sums: of the process's own part.

        Of equal logits the lowest id is the most probable, as lower ranks have lower ids. A row that is not
        finite in any part has a log-sum that is not finite.
        """
        if self.size == 1:
            return largest, tokens, log_sums
        # float64 holds any token id exactly, so all travel in one.
        own = torch.stack((largest.double(), tokens.double(), log_sums.double()))
        all_largest, all_tokens, all_log_sums = self._gathered(own).unbind(1)
        rank = all_largest.argmax(0, keepdim=True)
        return (
            all_largest.gather(0, rank)[0].float(),
            all_tokens.gather(0, rank)[0].long(),
            all_log_sums.logsumexp(0).float(),
        )

    def _gathered(self, part: torch.Tensor) -> torch.Tensor:
        """The processes' tensors, all of one shape, as [size, ...]."""
        parts = part.new_empty(self.size, *part.shape)
        if part.numel():
            dist.all_gather(list(parts.unbind()), part.contiguous())
        return parts


ALONE = Parallel()


@dataclass(frozen=True, slots=True)
class VocabPart:
    """The tokens whose logits a process has, as `shard` cuts the head."""

    first: int
    width: int
    """The number of columns of its logits."""
    num_tokens: int
    """The number of these that are tokens; the rest is padding."""

    @classmethod
    def of(cls, vocab_size: int, parallel: Parallel) -> "VocabPart":
        width = -(-vocab_size // parallel.size)
        first = parallel.rank * width
        return cls(first, width, max(0, min(width, vocab_size - first)))

    def column(self, token_id: int | None) -> int | None:
        """The token's column; None where it is in another's part."""
        if token_id is None or not self.first <= token_id < self.first + self.num_tokens:
            return None
        return token_id - self.first

    def without_padding(self, logits: torch.Tensor) -> torch.Tensor:
        """The process's logits [W, width], with padding made impossible, in place."""
        if self.num_tokens < self.width:
            logits[:, self.num_tokens :] = float("-inf")
        return logits


def shard_config(config: ModelConfig, parallel: Parallel) -> ModelConfig:
    """The config of this process's part of the model: its own heads and MLP size. Raises CheckpointError."""
    size = parallel.size
    for name in ("num_kv_heads", "intermediate_size"):
        if getattr(config, name) % size:
            raise CheckpointError(
                f"tensor_parallel: the model's {name}, {getattr(config, name)}, can't be split among {size} "
                f"processes; give a number that divides it"
            )
    return replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=config.num_kv_heads // size,
        intermediate_size=config.intermediate_size // size,
    )


def shard(config: ModelConfig, weights: ModelWeights, parallel: Parallel) -> ModelWeights:
    """This process's part of the weights, which are emptied. config: the whole model's."""
    size = parallel.size
    if size == 1:
        return weights
    cut = _Cut(config, parallel)
    layers = []
    weights.layers.reverse()
    while weights.layers:
        layers.append(cut.layer(weights.layers.pop()))
    head = cut.rows(F.pad(weights.head, (0, 0, 0, -config.vocab_size % size)), 1)
    return ModelWeights(weights.embedding, layers, weights.norm, head)


class _Cut:
    """Cuts matrices whose rows or columns are made of equal blocks, each of which is split."""

    def __init__(self, config: ModelConfig, parallel: Parallel):
        self._parallel = parallel
        # Query heads are ordered (query of a K/V head, K/V head): a block of K/V heads for each query.
        self._queries = config.queries_per_kv
        self._qkv = config.queries_per_kv + 2
        self._gate_up = 2

    def rows(self, matrix: torch.Tensor, num_blocks: int, dim: int = 0) -> torch.Tensor:
        """This process's part of each of num_blocks equal blocks of rows, or of columns (dim 1)."""
        blocks = matrix.unflatten(dim, (num_blocks, self._parallel.size, -1))  # type: ignore[no-untyped-call]
        part: torch.Tensor = blocks.select(dim + 1, self._parallel.rank)
        return part.flatten(dim, dim + 1).contiguous()

    def columns(self, matrix: torch.Tensor, num_blocks: int) -> torch.Tensor:
        return self.rows(matrix, num_blocks, dim=1)

    def layer(self, layer: LayerWeights) -> LayerWeights:
        return LayerWeights(
            input_norm=layer.input_norm,
            qkv=self.rows(layer.qkv, self._qkv),
            qkv_bias=None if layer.qkv_bias is None else self.rows(layer.qkv_bias, self._qkv),
            query_norm=layer.query_norm,
            key_norm=layer.key_norm,
            o=self.columns(layer.o, self._queries),
            post_norm=layer.post_norm,
            gate_up=self.rows(layer.gate_up, self._gate_up),
            down=self.columns(layer.down, 1),
            adapters={name: self._adapter(name, adapter) for name, adapter in layer.adapters.items()},
        )

    def _adapter(self, name: str, adapter: LowRank) -> LowRank:
        """Cuts an adapter as its matrix is cut: its outputs with rows, its inputs with columns."""
        if name == "qkv":
            return LowRank(adapter.down, self.rows(adapter.up, self._qkv))
        if name == "gate_up":
            return LowRank(adapter.down, self.rows(adapter.up, self._gate_up))
        num_blocks = self._queries if name == "o" else 1
        return LowRank(self.columns(adapter.down, num_blocks), adapter.up)
