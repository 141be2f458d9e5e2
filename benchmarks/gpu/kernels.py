"""Each kernel alone: time, bytes moved over the copy bandwidth, and torch's own way on the same work."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from benchmarks.gpu.timing import Ceilings, Clock
from replicas.engine.batch import Segment
from replicas.kernels.adapter import add_adapter
from replicas.kernels.attention import TILE_SHAPES, Scratch, TileShape, num_places, ragged_paged_attention
from replicas.kernels.confidence import confidence
from replicas.kernels.normed_product import CODES, LEAST_ROWS, MAX_ROWS, Norm, encoded
from replicas.kernels.project import project
from replicas.kernels.project_gated import project_gated
from replicas.kernels.project_qkv import project_qkv
from replicas.kernels.rms_norm import rms_norm
from replicas.kernels.sample_rows import Draws, sample_rows
from replicas.kernels.store_kv import Rotation, store_kv
from replicas.kernels.swiglu import swiglu
from replicas.messages import SamplingParams
from replicas.model.config import ModelConfig
from replicas.model.cuda.inputs import HostStep, StepInputs

_GREEDY = SamplingParams(max_tokens=1)
_TOLERANCE = 3e-2


@dataclass(frozen=True, slots=True)
class Shapes:
    """The sizes at which the kernels are measured."""

    config: ModelConfig
    page_size: int
    batch: int
    """Sequences of an AR step."""
    contexts: tuple[int, ...]
    """Context lengths of AR steps, in tokens."""
    block: int
    """Query tokens of a block."""
    block_batches: tuple[int, ...]
    """Sequences of steps of blocks."""
    prefill: int
    """Tokens of a prompt."""
    rows: tuple[int, ...]
    """Rows of the row-wise kernels."""
    tunes: bool
    """If true, other tile shapes are timed too."""
    dtype: torch.dtype


class KernelBench:
    def __init__(self, shapes: Shapes, clock: Clock, ceilings: Ceilings):
        self._shapes = shapes
        self._clock = clock
        self._ceilings = ceilings
        self._device = clock.device
        self._dtype = shapes.dtype

    def rows(self) -> Iterator[dict[str, object]]:
        """Measures the kernels, the most wanted first."""
        shapes = self._shapes
        for context in shapes.contexts:
            yield from self._attention("1 query", shapes.batch, context - 1, 1, causal=True)
        for batch in shapes.block_batches:
            yield from self._attention(
                "block, bidirectional", batch, shapes.contexts[0], shapes.block, causal=False
            )
        for count in shapes.rows:
            yield self._confidence(count)
        yield from self._attention("prefill, causal", 1, 0, shapes.prefill, causal=True)
        for count in shapes.rows:
            yield self._sample_rows(count)
            yield self._sample_rows(count, top_p=0.9)
            yield self._rms_norm(count)
            yield self._swiglu(count)
            yield self._store_kv(count)
            yield self._adapter(count)
            for codes in CODES if count > LEAST_ROWS else (*CODES, None):
                yield self._project(count, codes)
            if count <= MAX_ROWS:
                yield self._project_qkv(count)
                yield self._project_gated(count)
        if shapes.tunes:
            yield from self._flex(shapes.contexts[0])
            yield from self._tiles(shapes.contexts[0])

    def _row(
        self,
        kernel: str,
        shape: str,
        num_bytes: float,
        run: Callable[[], object],
        other: str,
        run_other: Callable[[], object] | None,
        error: float | None = None,
    ) -> dict[str, object]:
        timing = self._clock.time(run)
        gb_s = num_bytes / timing.ms / 1e6
        row: dict[str, object] = {
            "kernel": kernel,
            "shape": shape,
            "ms": round(timing.ms, 4),
            "gb_s": round(gb_s, 1),
            "of_copy": round(gb_s / self._ceilings.copy_gb_s, 3),
            "error": error,
        }
        if run_other is not None:
            other_ms = self._clock.time(run_other).ms
            row |= {
                "against": other,
                "against_ms": round(other_ms, 4),
                "speedup": round(other_ms / timing.ms, 3),
            }
        return row

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self._device).to(self._dtype)

    def _places(self) -> tuple[int, ...]:
        return num_places(self._shapes.config.num_kv_heads, self._device)

    def _scratch(self) -> Scratch:
        config = self._shapes.config
        return Scratch.allocate(self._places(), config.num_kv_heads, config.head_dim, self._device)

    def _case(
        self, batch: int, start: int, length: int, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor, StepInputs]:
        """The queries, one layer's pages, and the step's inputs, with each sequence's pages scattered."""
        config, page_size = self._shapes.config, self._shapes.page_size
        per_sequence = -(-(start + length) // page_size)
        order = torch.randperm(batch * per_sequence).view(batch, -1).tolist()
        num_causal = length if causal else 0
        asked = [
            Segment(number, start, (7,) * length, tuple(pages), num_causal, False, (0,), _GREEDY)
            for number, pages in enumerate(order)
        ]
        host = HostStep.pack(asked, config, page_size, self._places())
        buffer = torch.empty(host.num_ints(host.size), dtype=torch.int32)
        host.write(buffer.numpy(), host.size)
        pages = self._normal(batch * per_sequence, 2, config.num_kv_heads, page_size, config.head_dim)
        queries = self._normal(batch * length, config.num_heads, config.head_dim)
        return queries, pages, StepInputs.view(buffer.to(self._device), host.size)

    def _attention(
        self, name: str, batch: int, start: int, length: int, causal: bool
    ) -> Iterator[dict[str, object]]:
        """Attention against SDPA on keys and values gathered into dense tensors beforehand."""
        config = self._shapes.config
        queries, pages, inputs = self._case(batch, start, length, causal)
        output, scratch = torch.empty_like(queries), self._scratch()

        def run() -> None:
            ragged_paged_attention(
                queries, pages, output, inputs.segments, inputs.page_table, inputs.work, scratch
            )

        dense_queries, keys, values = self._dense(queries, pages, inputs, batch, start + length)
        mask = None
        if causal and length > 1 and start:
            visible = torch.arange(start, start + length, device=self._device)[:, None]
            mask = torch.arange(start + length, device=self._device) <= visible
        is_causal = causal and length > 1 and not start

        def run_other() -> torch.Tensor:
            return F.scaled_dot_product_attention(
                dense_queries, keys, values, attn_mask=mask, is_causal=is_causal, enable_gqa=True
            )

        run()
        found = output.view(batch, length, -1, config.num_kv_heads, config.head_dim).permute(0, 3, 2, 1, 4)
        error = float((found.flatten(1, 2) - run_other()).abs().max())
        if error > _TOLERANCE:
            raise AssertionError(f"attention, {name}: off SDPA's result by {error}")
        num_bytes = 2 * self._dtype.itemsize * queries.numel() + pages.numel() * self._dtype.itemsize
        shape = f"{name}: batch {batch}, {length} queries, {start + length} keys"
        yield self._row("ragged_paged_attention", shape, num_bytes, run, "SDPA, dense", run_other, error)

    def _dense(
        self, queries: torch.Tensor, pages: torch.Tensor, inputs: StepInputs, batch: int, num_keys: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [batch, heads, queries, head_dim], keys and values [batch, kv_heads, keys, head_dim]."""
        config = self._shapes.config
        table = inputs.page_table.view(batch, -1).long()
        gathered = pages[table].permute(2, 0, 3, 1, 4, 5)  # [2, batch, kv_heads, pages, page_size, head_dim]
        keys, values = gathered.flatten(3, 4)[:, :, :, :num_keys].contiguous().unbind(0)
        heads = queries.view(batch, -1, config.queries_per_kv, config.num_kv_heads, config.head_dim)
        return heads.permute(0, 3, 2, 1, 4).flatten(1, 2).contiguous(), keys, values

    def _confidence(self, count: int) -> dict[str, object]:
        logits = self._normal(count, self._shapes.config.vocab_size)

        def run_other() -> torch.Tensor:
            return logits.float().softmax(-1).max(-1).values

        num_bytes = logits.numel() * self._dtype.itemsize
        return self._row(
            "confidence", f"{count} rows", num_bytes, lambda: confidence(logits, 3), "softmax, max", run_other
        )

    def _sample_rows(self, count: int, top_p: float = 1.0) -> dict[str, object]:
        """The rows' tokens at a temperature, so three times over the logits; with top_p as often as the
        search takes, of which the bytes know nothing."""
        logits = self._normal(count, self._shapes.config.vocab_size)
        ones = torch.ones(count, device=self._device)
        halves = ones / 2
        draws = Draws.at(ones, halves)._replace(top_ps=top_p * ones)

        def run() -> None:
            sample_rows(logits, confidence(logits, 3), draws, 3)

        def run_other() -> torch.Tensor:
            probs = logits.float().softmax(-1)
            if top_p < 1:
                ordered, ids = probs.sort(-1, descending=True)
                ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0
                probs = torch.zeros_like(probs).scatter_(1, ids, ordered)
            cumulative = probs.cumsum(-1)
            return torch.searchsorted(cumulative, halves[:, None] * cumulative[:, -1:])

        num_bytes = 3 * logits.numel() * self._dtype.itemsize
        return self._row(
            "sample_rows",
            f"{count} rows, sampled" + (f", top_p {top_p}" if top_p < 1 else ""),
            num_bytes,
            run,
            "softmax, cumsum, search" if top_p == 1 else "softmax, sort, cumsum, search",
            run_other,
        )

    def _rms_norm(self, count: int) -> dict[str, object]:
        size = self._shapes.config.hidden_size
        x, residual, weight = self._normal(count, size), self._normal(count, size), self._normal(size)

        def run_other() -> torch.Tensor:
            return F.rms_norm(residual.add_(x), (size,), weight, 1e-5)

        num_bytes = 4 * x.numel() * self._dtype.itemsize

        def run() -> None:
            rms_norm(x, weight, 1e-5, residual)

        return self._row("rms_norm", f"{count} x {size}", num_bytes, run, "add, rms_norm", run_other)

    def _swiglu(self, count: int) -> dict[str, object]:
        size = self._shapes.config.intermediate_size
        gate_up = self._normal(count, 2 * size)

        def run_other() -> torch.Tensor:
            gate, up = gate_up.chunk(2, -1)
            return F.silu(gate) * up

        num_bytes = 3 * count * size * self._dtype.itemsize
        return self._row(
            "swiglu", f"{count} x {size}", num_bytes, lambda: swiglu(gate_up), "silu, mul", run_other
        )

    def _pages(self, count: int) -> tuple[torch.Tensor, torch.Tensor, Rotation]:
        """Pages for a sequence of so many tokens, its positions, which are its slots, and a rotation."""
        config, page_size = self._shapes.config, self._shapes.page_size
        pages = self._normal(-(-count // page_size), 2, config.num_kv_heads, page_size, config.head_dim)
        angles = torch.rand(count, config.head_dim // 2, device=self._device)
        phases = torch.stack((angles.cos(), angles.sin()), -1).flatten(1).contiguous()
        positions = torch.arange(count, dtype=torch.int32, device=self._device)
        return pages, positions, Rotation(phases, torch.ones(count, device=self._device))

    def _project_qkv(self, count: int) -> dict[str, object]:
        config = self._shapes.config
        num_heads, size = config.num_heads, config.hidden_size
        pages, positions, rotation = self._pages(count)
        x, norm = self._normal(count, size), Norm(self._normal(size), 1e-5)
        weight = self._normal((num_heads + 2 * config.num_kv_heads) * config.head_dim, size) * size**-0.5

        def run() -> None:
            project_qkv(x, norm, weight, None, pages, positions, positions, rotation)

        def run_other() -> None:
            qkv = F.linear(rms_norm(x, norm.weight, norm.eps), weight)
            heads = qkv.view(count, -1, config.head_dim)
            store_kv(heads, pages, positions, positions, num_heads, rotation)

        num_bytes = weight.numel() * self._dtype.itemsize
        return self._row("project_qkv", f"{count} rows", num_bytes, run, "norm, product, store_kv", run_other)

    def _project(self, count: int, codes: str | None) -> dict[str, object]:
        """The MLP's last product, added to the residual, against cuBLAS's on weights in the model's dtype."""
        size_in, size_out = self._shapes.config.intermediate_size, self._shapes.config.hidden_size
        x, residual = self._normal(count, size_in), self._normal(count, size_out)
        plain = self._normal(size_out, size_in) * size_in**-0.5
        weight, scales = (plain, None) if codes is None else encoded(plain, CODES[codes])

        def run() -> None:
            project(x, weight, scales, add_to=residual)

        return self._row(
            "project",
            f"{count} rows" + ("" if codes is None else f", {codes} weights"),
            weight.numel() * weight.itemsize,
            run,
            "addmm",
            lambda: residual.addmm_(x, plain.t()),
        )

    def _project_gated(self, count: int) -> dict[str, object]:
        size, width = self._shapes.config.hidden_size, self._shapes.config.intermediate_size
        x, norm = self._normal(count, size), Norm(self._normal(size), 1e-5)
        weight = self._normal(2 * width, size) * size**-0.5

        def run_other() -> torch.Tensor:
            return swiglu(F.linear(rms_norm(x, norm.weight, norm.eps), weight))

        num_bytes = weight.numel() * self._dtype.itemsize
        return self._row(
            "project_gated",
            f"{count} rows",
            num_bytes,
            lambda: project_gated(x, norm, weight),
            "norm, product, swiglu",
            run_other,
        )

    def _store_kv(self, count: int) -> dict[str, object]:
        config = self._shapes.config
        num_heads = config.num_heads
        qkv = self._normal(count, num_heads + 2 * config.num_kv_heads, config.head_dim)
        pages, positions, rotation = self._pages(count)

        def run() -> None:
            store_kv(qkv, pages, positions, positions, num_heads, rotation)

        num_bytes = 2 * qkv.numel() * self._dtype.itemsize
        return self._row("store_kv", f"{count} rows", num_bytes, run, "", None)

    def _adapter(self, count: int) -> dict[str, object]:
        """The adapter with every row of the batch flagged."""
        config = self._shapes.config
        size_in, size_out = config.num_heads * config.head_dim, config.hidden_size
        rank = min(128, size_in)
        x, y = self._normal(count, size_in), self._normal(count, size_out)
        down, up = self._normal(rank, size_in) * size_in**-0.5, self._normal(size_out, rank) * rank**-0.5
        rows = torch.arange(count, dtype=torch.int32, device=self._device)
        num_bytes = (x.numel() + 2 * y.numel() + down.numel() + up.numel()) * self._dtype.itemsize

        def run_other() -> torch.Tensor:
            return y.index_add_(0, rows, (x.index_select(0, rows) @ down.t()) @ up.t())

        def run() -> None:
            add_adapter(y, x, down, up, rows)

        return self._row("adapter", f"{count} rows, rank {rank}", num_bytes, run, "index_add", run_other)

    def _flex(self, start: int) -> Iterator[dict[str, object]]:
        """FlexAttention on the dense equivalent of the widest block batch."""
        from torch.nn.attention.flex_attention import flex_attention

        batch, length = self._shapes.block_batches[-1], self._shapes.block
        queries, pages, inputs = self._case(batch, start, length, causal=False)
        output, scratch = torch.empty_like(queries), self._scratch()
        dense = self._dense(queries, pages, inputs, batch, start + length)
        compiled = torch.compile(flex_attention)

        def run() -> None:
            ragged_paged_attention(
                queries, pages, output, inputs.segments, inputs.page_table, inputs.work, scratch
            )

        num_bytes = 2 * self._dtype.itemsize * queries.numel() + pages.numel() * self._dtype.itemsize
        shape = f"block, bidirectional: batch {batch}, {length} queries, {start + length} keys"

        def run_other() -> object:
            return compiled(*dense, enable_gqa=True)

        yield self._row("ragged_paged_attention", shape, num_bytes, run, "FlexAttention, dense", run_other)

    def _tiles(self, context: int) -> Iterator[dict[str, object]]:
        """Attention with other tile shapes than the chosen, to be chosen from."""
        kinds = (
            (0, self._shapes.batch, context - 1, 1),
            (2, self._shapes.block_batches[-1], context, self._shapes.block),
        )
        for index, batch, start, length in kinds:
            queries, pages, inputs = self._case(batch, start, length, causal=length == 1)
            output = torch.empty_like(queries)
            chosen = TILE_SHAPES[index]
            for shape in _alternatives(chosen):
                yield self._tile(shape, queries, pages, output, inputs, shape == chosen)

    def _tile(
        self,
        shape: TileShape,
        queries: torch.Tensor,
        pages: torch.Tensor,
        output: torch.Tensor,
        inputs: StepInputs,
        chosen: bool,
    ) -> dict[str, object]:
        [group] = [work for work in inputs.work if len(work.items)]
        work, scratch = [replace(group, shape=shape)], self._scratch()

        def run() -> None:
            ragged_paged_attention(queries, pages, output, inputs.segments, inputs.page_table, work, scratch)

        name = f"tile {shape.block_m}x{shape.block_n}, {shape.num_warps} warps, {shape.num_stages} stages"
        what = f"{name}: {len(inputs.segments)} segments{' (chosen)' if chosen else ''}"
        return self._row("ragged_paged_attention", what, pages.numel() * self._dtype.itemsize, run, "", None)


def _alternatives(chosen: TileShape) -> Iterator[TileShape]:
    yield chosen
    for block_n in (32, 64, 128):
        for num_stages in (2, 3, 4):
            if block_n * num_stages <= 256:
                yield replace(chosen, block_n=block_n, num_stages=num_stages)
