"""Attention on the device: K/V pages, the rotation tables, and the kernels that use them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from replicas.engine.batch import Segment
from replicas.kernels.attention import Scratch, num_places, ragged_paged_attention
from replicas.kernels.normed_product import Norm
from replicas.kernels.project_qkv import project_qkv
from replicas.kernels.store_kv import HeadNorms, Rotation, store_kv
from replicas.model.config import ModelConfig
from replicas.model.cuda.inputs import HostStep, StepInputs
from replicas.model.rotary import RotaryTable


class PagedKv:
    """Keys and values of all layers on the device, in pages.

    `layers` holds one tensor a layer, [num_pages, 2, num_kv_heads, page_size, head_dim], keys then values. In
    float8_e4m3fn pages, keys and values are stored divided by `scales`, [layers, 2, num_kv_heads] float32;
    with the model's own dtype it is None. Scales are 1 until a checkpoint or a calibration sets them: keys
    and values of the served models are small against fp8's largest number, 448.

    dtype: the pages' own
    """

    def __init__(
        self, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ):
        shape = (config.num_layers, num_pages, 2, config.num_kv_heads, page_size, config.head_dim)
        self.page_size = page_size
        self.layers = torch.zeros(shape, dtype=dtype, device=device)
        self.scales: torch.Tensor | None = None
        if dtype is torch.float8_e4m3fn:
            self.scales = torch.ones(config.num_layers, 2, config.num_kv_heads, device=device)


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """The counterpart of replicas.model.attention.AttentionPlan for the kernels."""

    order: tuple[int, ...]
    """Segment indices in the order in which their tokens are packed into rows."""
    positions: torch.Tensor
    """[T] int64, the position of each packed row."""
    inputs: StepInputs


class TritonAttention:
    """An implementation of replicas.model.attention.Attention, and its parts for the CUDA transformer."""

    def __init__(self, config: ModelConfig, pages: PagedKv, num_positions: int):
        device = pages.layers.device
        self._config = config
        self._pages = pages
        table = RotaryTable(config, num_positions)
        phases = torch.view_as_real(table.phases).flatten(1).contiguous().to(device)
        scale = None if table.query_scale is None else table.query_scale.float().to(device)
        self._rotation = Rotation(phases, scale)
        self.num_places = num_places(config.num_kv_heads, device)
        self._scratch = Scratch.allocate(self.num_places, config.num_kv_heads, config.head_dim, device)

    def plan(self, segments: Sequence[Segment]) -> TritonPlan:
        host = HostStep.pack(segments, self._config, self._pages.page_size, self.num_places)
        buffer = np.empty(host.num_ints(host.size), np.int32)
        host.write(buffer, host.size)
        on_device = torch.from_numpy(buffer).to(self._pages.layers.device)
        inputs = StepInputs.view(on_device, host.size)
        return TritonPlan(tuple(range(len(segments))), inputs.positions.long(), inputs)

    def __call__(
        self, layer: int, queries: torch.Tensor, keys_values: torch.Tensor, plan: TritonPlan
    ) -> torch.Tensor:
        """Stores the keys and values, then attends -> [T, heads * head_dim].

        queries: [T, heads, head_dim], rotated already
        keys_values: [T, 2 * kv_heads, head_dim], likewise
        """
        inputs = plan.inputs
        pages = self._pages.layers[layer]
        store_kv(keys_values, pages, inputs.positions, inputs.slots, 0, None, scales=self._scales(layer))
        return self._attend(layer, queries, inputs)

    def rotate_store_attend(
        self, layer: int, qkv: torch.Tensor, norms: HeadNorms | None, inputs: StepInputs
    ) -> torch.Tensor:
        """Rotates, stores and attends -> [T, heads * head_dim].

        qkv: [T, heads + 2 kv_heads, head_dim] as the projection gives it; its queries are overwritten
        """
        num_heads = self._config.num_heads
        store_kv(
            qkv,
            self._pages.layers[layer],
            inputs.positions,
            inputs.slots,
            num_heads,
            self._rotation,
            norms,
            self._scales(layer),
        )
        return self._attend(layer, qkv[:, :num_heads], inputs)

    def project_attend(
        self,
        layer: int,
        x: torch.Tensor,
        norm: Norm,
        weight: torch.Tensor,
        weight_scales: torch.Tensor | None,
        bias: torch.Tensor | None,
        inputs: StepInputs,
    ) -> torch.Tensor:
        """Normalises and projects a few rows x [T, hidden], rotates, stores and attends -> [T, heads *
        head_dim].

        norm, weight, weight_scales, bias: of the projection to queries, keys and values, as of
        replicas.kernels.project_qkv
        """
        queries = project_qkv(
            x,
            norm,
            weight,
            bias,
            self._pages.layers[layer],
            inputs.positions,
            inputs.slots,
            self._rotation,
            self._scales(layer),
            weight_scales,
        )
        return self._attend(layer, queries, inputs)

    def _attend(self, layer: int, queries: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
        output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        ragged_paged_attention(
            queries,
            self._pages.layers[layer],
            output,
            inputs.segments,
            inputs.page_table,
            inputs.work,
            self._scratch,
            self._scales(layer),
        )
        return output.flatten(1)

    def _scales(self, layer: int) -> torch.Tensor | None:
        return None if self._pages.scales is None else self._pages.scales[layer]
