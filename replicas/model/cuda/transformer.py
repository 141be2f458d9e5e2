"""The forward pass on the device, a kernel or a matrix product at a time, ready to be captured in a graph.

A layer of few rows is one of five launches: the norms are in the products that follow them, the rotation, the
write to pages and the gate in those before, and the products of the outputs add to the residual. An adapter
adds its own two to the product it is on. With more rows or head norms, and where the adapter is on the
product itself, these are kernels of their own.

Of several processes the first one adds its products to the residual and the others have the product alone, so
what is summed over them is the next residual, and few rows need no kernel between the sum and the next norm.
"""

import torch
import torch.nn.functional as F

from replicas.kernels.adapter import add_adapter
from replicas.kernels.normed_product import LEAST_ROWS, MAX_ROWS, Norm
from replicas.kernels.project import project
from replicas.kernels.project_gated import project_gated
from replicas.kernels.rms_norm import rms_norm
from replicas.kernels.store_kv import HeadNorms
from replicas.kernels.swiglu import swiglu
from replicas.model.checkpoint import LayerWeights, ModelWeights
from replicas.model.config import ModelConfig
from replicas.model.cuda.attention import TritonAttention
from replicas.model.cuda.inputs import StepInputs
from replicas.model.parallel import Parallel


class CudaTransformer:
    """A decoder of the Llama family, or this process's part of one (replicas.model.parallel).

    weights: on the device already. config: the part's own configuration.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        attention: TritonAttention,
        parallel: Parallel,
    ):
        self._eps = config.rms_norm_eps
        self._parallel = parallel
        self._weights = weights
        self._layers = [
            _Layer(config, layer, index, attention, parallel) for index, layer in enumerate(weights.layers)
        ]

    @torch.inference_mode()
    def forward(self, inputs: StepInputs, logits: torch.Tensor | None = None) -> torch.Tensor:
        """Computes logits [W, vocab] of the wanted rows in the model's dtype, into `logits` if given; of
        several processes each has its part of them (replicas.model.parallel.VocabPart)."""
        residual = F.embedding(inputs.token_ids, self._weights.embedding)
        if len(residual) <= MAX_ROWS:
            hidden = self._finish_few(residual, inputs)
        else:
            hidden = self._finish_many(residual, inputs)
        if logits is None:
            return _product(hidden, self._weights.head, self._weights.head_scales)
        if self._weights.head_scales is not None:
            return project(hidden, self._weights.head, self._weights.head_scales, out=logits)
        return torch.mm(hidden, self._weights.head.t(), out=logits)

    def _finish_few(self, residual: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
        """All layers and the last norm, for at most MAX_ROWS rows: [T, hidden] -> [W, hidden]."""
        last = self._layers[-1]
        for layer in self._layers:
            attended = layer.attend_few(residual, inputs)
            adapter = inputs.adapter
            if layer is last:
                attended = attended.index_select(0, inputs.wanted)
                residual = residual.index_select(0, inputs.wanted)
                adapter = inputs.wanted_adapter
            layer.finish_few(attended, residual, adapter)
        return rms_norm(residual, self._weights.norm, self._eps)

    def _finish_many(self, residual: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
        """The same for any number of rows, and in several processes."""
        update: torch.Tensor | None = None
        last = self._layers[-1]
        for layer in self._layers:
            attended = layer.attend(update, residual, inputs)
            adapter = inputs.adapter
            if layer is last:
                attended = attended.index_select(0, inputs.wanted)
                residual = residual.index_select(0, inputs.wanted)
                adapter = inputs.wanted_adapter
            update = layer.finish(attended, residual, adapter)
        assert update is not None, "a model has layers"
        return rms_norm(update, self._weights.norm, self._eps, residual)


class _Layer:
    """A layer. With many rows the norm that follows adds the residual, so `finish` gives an update yet to be
    added."""

    def __init__(
        self,
        config: ModelConfig,
        weights: LayerWeights,
        index: int,
        attention: TritonAttention,
        parallel: Parallel,
    ):
        self._index = index
        self._eps = config.rms_norm_eps
        self._head_dim = config.head_dim
        self._weights = weights
        self._qkv_scales = weights.scales.get("qkv")
        self._o_scales = weights.scales.get("o")
        self._gate_up_scales = weights.scales.get("gate_up")
        self._down_scales = weights.scales.get("down")
        self._attention = attention
        self._parallel = parallel
        self._norms: HeadNorms | None = None
        if weights.query_norm is not None and weights.key_norm is not None:
            self._norms = HeadNorms(weights.query_norm, weights.key_norm, config.rms_norm_eps)

    def attend_few(self, residual: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
        """Norm, projection and attention of few rows: residual [T, hidden] -> [T, heads * head_dim]."""
        if self._norms is not None or self._adapts("qkv", inputs.adapter):
            return self.attend(None, residual, inputs)
        weights = self._weights
        norm = Norm(weights.input_norm, self._eps)
        return self._attention.project_attend(
            self._index, residual, norm, weights.qkv, self._qkv_scales, weights.qkv_bias, inputs
        )

    def finish_few(
        self, attended: torch.Tensor, residual: torch.Tensor, adapter: torch.Tensor | None
    ) -> None:
        """Output projection and MLP of few rows, added to the residual [N, hidden] in place.

        attended: [N, heads * head_dim]
        """
        weights = self._weights
        self._add_product("o", residual, attended, weights.o, self._o_scales, adapter)
        if not len(residual):
            return
        if self._adapts("gate_up", adapter):
            gated = self._gated(rms_norm(residual, weights.post_norm, self._eps), adapter)
        else:
            norm = Norm(weights.post_norm, self._eps)
            gated = project_gated(residual, norm, weights.gate_up, self._gate_up_scales)
        self._add_product("down", residual, gated, weights.down, self._down_scales, adapter)

    def _add_product(
        self,
        name: str,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor | None,
        adapter: torch.Tensor | None,
    ) -> None:
        """Adds the product with the adapter's, of all processes, to the residual [T, out] in place."""
        has_residual = self._parallel.rank == 0
        if scales is None and len(x) > LEAST_ROWS:
            residual.addmm_(x, weight.t(), beta=int(has_residual))
        elif has_residual:
            project(x, weight, scales, add_to=residual)
        else:
            project(x, weight, scales, out=residual)
        self._adapted(name, residual, x, adapter)
        self._parallel.add(residual)

    def attend(self, update: torch.Tensor | None, residual: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
        """Norm, projection and attention -> [T, heads * head_dim].

        update, residual: [T, hidden], the second changed in place
        """
        weights = self._weights
        if update is None:
            x = rms_norm(residual, weights.input_norm, self._eps)
        else:
            x = rms_norm(update, weights.input_norm, self._eps, residual)
        qkv = _product(x, weights.qkv, self._qkv_scales, weights.qkv_bias)
        qkv = self._adapted("qkv", qkv, x, inputs.adapter)
        heads = qkv.view(len(x), -1, self._head_dim)
        return self._attention.rotate_store_attend(self._index, heads, self._norms, inputs)

    def finish(
        self, attended: torch.Tensor, residual: torch.Tensor, adapter: torch.Tensor | None
    ) -> torch.Tensor:
        """Output projection and MLP: attended [N, heads * head_dim] -> update [N, hidden].

        residual: [N, hidden], changed in place
        """
        weights = self._weights
        update = self._adapted("o", _product(attended, weights.o, self._o_scales), attended, adapter)
        x = rms_norm(self._parallel.add(update), weights.post_norm, self._eps, residual)
        gated = self._gated(x, adapter)
        update = _product(gated, weights.down, self._down_scales)
        return self._parallel.add(self._adapted("down", update, gated, adapter))

    def _gated(self, x: torch.Tensor, adapter: torch.Tensor | None) -> torch.Tensor:
        both = _product(x, self._weights.gate_up, self._gate_up_scales)
        return swiglu(self._adapted("gate_up", both, x, adapter))

    def _adapts(self, name: str, rows: torch.Tensor | None) -> bool:
        return rows is not None and name in self._weights.adapters

    def _adapted(
        self, name: str, y: torch.Tensor, x: torch.Tensor, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """The product y of x, with what the adapter adds to it in these rows."""
        if rows is not None and name in self._weights.adapters:
            adapter = self._weights.adapters[name]
            add_adapter(y, x, adapter.down, adapter.up, rows)
        return y


def _product(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The product of x [T, in] with a matrix [out, in], or with the codes of one."""
    return F.linear(x, weight, bias) if scales is None else project(x, weight, scales, bias)
