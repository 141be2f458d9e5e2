"""The GPU's implementation of replicas.engine.batch.Runner."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from replicas.engine.batch import ModelSpec, ScheduledBatch, Segment, SegmentOutput
from replicas.engine.decoders.self_speculation import PROB_ONE
from replicas.kernels.confidence import confidence
from replicas.kernels.follow import follow, pack
from replicas.kernels.normed_product import CODES, encoded
from replicas.kernels.rules import apply_rules
from replicas.kernels.sample_rows import Drawn, Ruled, sample_rows
from replicas.messages import SamplingParams
from replicas.model.checkpoint import (
    DTYPES,
    CheckpointError,
    ModelWeights,
    load_weights,
    resolve_folder,
    weights_to,
)
from replicas.model.config import ModelConfig
from replicas.model.cuda.attention import PagedKv, TritonAttention
from replicas.model.cuda.choices import Choices
from replicas.model.cuda.graphs import GraphCache, GraphRecorder, Replay
from replicas.model.cuda.inputs import HostStep, StepInputs, StepSize, sections_of
from replicas.model.cuda.opens import opens_of
from replicas.model.cuda.sampling import Sampled, first_rows
from replicas.model.cuda.sizes import GraphSizes, batches, eager
from replicas.model.cuda.staging import Staging
from replicas.model.cuda.transformer import CudaTransformer
from replicas.model.kv_budget import check_pool, device_budget_bytes
from replicas.model.kv_cache import KvCache
from replicas.model.logit_rules import takes_most_probable
from replicas.model.parallel import ALONE, Parallel, VocabPart, shard, shard_config
from replicas.model.runner import spec_of
from replicas.resident import trim_heap

KV_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
_GRAPH_PAGE_ENTRIES = 1 << 20
_SAMPLED = SamplingParams(temperature=1.0)
_FP8_SINCE = (8, 9)
"""The first compute capability that converts fp8 in hardware, as Triton asks for."""


@dataclass(frozen=True, slots=True)
class Options:
    """Ways to make steps faster; on the CPU, where tests run, `pads` alone can be had."""

    pads: bool = True
    """Pads steps to few sizes, as graphs need."""
    graphs: bool = True
    """Captures the padded steps and replays them."""
    runs_ahead: bool = True
    """Takes a step while the one before it runs."""


class CudaRunner:
    """Runs batches on one device. Not thread-safe: one thread calls `run`.

    weights: on the device already
    parallel: this process's place among those that share the model; weights and config are then its own part
    (replicas.model.parallel.shard)
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        *,
        num_pages: int,
        page_size: int,
        max_context: int,
        kv_dtype: torch.dtype | None = None,
        parallel: Parallel = ALONE,
        options: Options = Options(),
    ):
        # Sums in bfloat16 between the parts of a product would differ by its number of rows, as modes do.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self.config = config
        self.device = weights.embedding.device
        self._page_size = page_size
        self._options = options
        pages = PagedKv(config, num_pages, page_size, kv_dtype or weights.embedding.dtype, self.device)
        attention = TritonAttention(config, pages, max_context)
        self.model = CudaTransformer(config, weights, attention, parallel)
        self._parallel = parallel
        self._part = VocabPart.of(config.vocab_size, parallel)
        self._staging = Staging(self.device)
        self._num_places = attention.num_places
        self._sizes = GraphSizes(config, attention.num_places, weights.embedding.dtype)
        self._graphs: GraphCache | None = None
        spec = spec_of(config, num_pages=num_pages, page_size=page_size, max_context=max_context)
        self._spec = replace(spec, runs_ahead=options.runs_ahead)
        if options.graphs and self.device.type != "cpu":
            self._prepare_graphs(weights.embedding.dtype)

    @classmethod
    def load(
        cls,
        checkpoint: str,
        *,
        dtype: str = "bfloat16",
        device: str = "cuda",
        num_pages: int | None = None,
        kv_budget_bytes: int | None = None,
        device_share: float = 1.0,
        kv_dtype: str = "auto",
        quantization: str | None = None,
        page_size: int = 64,
        max_context: int | None = None,
        options: Options = Options(),
    ) -> "CudaRunner":
        """Loads a checkpoint from a folder or by its hub name. Raises CheckpointError.

        num_pages or kv_budget_bytes sizes the page pool, the first before the second; with neither it takes
        what the device, or this process's share of it, has left beside weights and steps
        (replicas.model.kv_budget). kv_dtype: 'auto' is the weights'. quantization: 'int8' or 'fp8' holds the
        matrices of linear layers, the head's among them, in 8 bits with a scale a row. Under
        torch.distributed's default group the model is split among its processes.
        """
        if dtype not in DTYPES:
            raise CheckpointError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if kv_dtype not in KV_DTYPES:
            raise CheckpointError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, got {kv_dtype!r}")
        if quantization not in (None, *CODES):
            raise CheckpointError(
                f"quantization on a GPU must be 'int8', 'fp8' or None, got {quantization!r}"
            )
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise CheckpointError(f"device {device!r} was asked for, but torch sees no CUDA device")
        for name, asked in (("kv_dtype", kv_dtype), ("quantization", quantization)):
            if asked == "fp8":
                _check_fp8(name, torch.device(device))
        folder = resolve_folder(checkpoint)
        parallel = Parallel.of_default_group()
        whole = ModelConfig.from_folder(folder)
        config = shard_config(whole, parallel)
        part = shard(whole, load_weights(folder, whole, DTYPES[dtype]), parallel)
        weights = _placed(part, torch.device(device), quantization)
        stored = KV_DTYPES[kv_dtype] or DTYPES[dtype]
        page_bytes = KvCache.page_bytes(config, page_size, stored)
        left = device_budget_bytes(torch.device(device), device_share)
        if num_pages is None:
            num_pages = parallel.min((left if kv_budget_bytes is None else kv_budget_bytes) // page_bytes)
        if num_pages < 1:
            raise CheckpointError(
                f"the K/V budget holds no page; one of {page_size} tokens takes {page_bytes} bytes"
            )
        check_pool(num_pages * page_bytes, left)
        limits = [config.max_position_embeddings, num_pages * page_size]
        return cls(
            config,
            weights,
            num_pages=num_pages,
            page_size=page_size,
            max_context=min(limits if max_context is None else [*limits, max_context]),
            kv_dtype=stored,
            parallel=parallel,
            options=options,
        )

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    def run(self, batch: ScheduledBatch) -> Sequence[SegmentOutput]:
        return self.begin(batch, None).outputs(batch.segments) if batch.segments else ()

    @torch.inference_mode()
    def begin(self, batch: ScheduledBatch, before: Sampled | None) -> Sampled:
        """Queues a step's work on the device; nothing is waited for."""
        segments, spec = batch.segments, self._spec
        choices = Choices.of(segments, self.config.vocab_size, spec.eos_token_ids)
        host = HostStep.pack(segments, self.config, self._page_size, self._num_places, choices)
        size, graphs = self._size(host)
        buffer = self._staging.send_step(host, size, None if graphs is None else self._buffer)
        if before is not None:
            self._follow(segments, host, before, sections_of(buffer, size))
        if graphs is None:
            logits, drawn = self._compute(StepInputs.view(buffer, size))
        else:
            graphs.run(size)
            logits, drawn = self._outputs(size.num_wanted)
        if self._parallel.size > 1 and not all(takes_most_probable(part) for part in segments if part.wanted):
            logits = self._parallel.gather(logits, self.config.vocab_size)
            drawn = self._sample(StepInputs.view(buffer, size), logits)
        logits = logits[: host.size.num_wanted]
        return Sampled.of(segments, logits, drawn, spec.mask_token_id, self._staging)

    def can_be_followed(self, segment: Segment) -> bool:
        sampling = segment.sampling
        if segment.allowed or sampling.has_penalties or sampling.has_masks:
            return False
        # Behind a verify or a draft positions are open, and with them which rows may be the end.
        forbids_end = segment.start < segment.prompt_len + sampling.min_tokens
        return len(segment.wanted) == 1 or not (sampling.min_tokens and forbids_end)

    def warm_up_batches(self, max_running: int, max_step_tokens: int) -> Iterator[ScheduledBatch]:
        """A batch for each graph that steps with these bounds can need, and for what runs beside graphs."""
        if not self._options.pads:
            return
        spec, sizes = self._spec, self._sizes.up_to(max_running, max_step_tokens)
        if max_step_tokens > sizes[-1].num_rows:
            sizes = (*sizes, eager(replace(sizes[-1], num_rows=max_step_tokens)))
        for batch in batches(sizes, spec.page_size, spec.num_pages, spec.max_context):
            yield batch
            if self._parallel.size > 1:  # whole rows are sampled beside graphs
                yield ScheduledBatch(tuple(replace(segment, sampling=_SAMPLED) for segment in batch.segments))
        if self._parallel.size == 1:
            self.warm_up_following()

    def settle(self) -> None:
        trim_heap()  # pages are the device's, and taken for good

    def forward(self, segments: Sequence[Segment]) -> torch.Tensor:
        """Logits [W, vocab] of the segments' wanted rows, without graphs; for tests and measurements."""
        host = HostStep.pack(segments, self.config, self._page_size, self._num_places)
        buffer = self._staging.send_step(host, host.size, None)
        logits = self.model.forward(StepInputs.view(buffer, host.size))
        return self._parallel.gather(logits, self.config.vocab_size)

    def _compute(
        self, inputs: StepInputs, logits: torch.Tensor | None = None, drawn: Drawn | None = None
    ) -> tuple[torch.Tensor, Drawn]:
        """The logits [W, vocab] of a step and its tokens, into the tensors given if any.

        Of several processes each has its part of the logits, and the tokens are the most probable ones.
        """
        logits = self.model.forward(inputs, logits)
        if self._parallel.size > 1:
            return logits, self._most_probable(logits, drawn)
        return logits, self._sample(inputs, logits, drawn)

    def _sample(self, inputs: StepInputs, logits: torch.Tensor, drawn: Drawn | None = None) -> Drawn:
        """The tokens of whole rows of logits."""
        mask_token_id = self._spec.mask_token_id
        best = confidence(logits, mask_token_id)
        ruled = None
        if len(inputs.ruled):
            lines = apply_rules(logits, inputs.ruled, inputs.page_table, mask_token_id)
            ruled = Ruled(inputs.slots_ruled, lines)
        return sample_rows(logits, best, inputs.draws, mask_token_id, ruled, drawn)

    def _most_probable(self, logits: torch.Tensor, drawn: Drawn | None) -> Drawn:
        """The most probable tokens of rows of which each process has its part, alike in all of them."""
        part, drawn = self._part, drawn or Drawn.empty(len(logits), logits.device)
        best = confidence(part.without_padding(logits), part.column(self._spec.mask_token_id))
        largest = logits.gather(1, best.tokens[:, None]).squeeze(1).float()
        largest, tokens, log_sums = self._parallel.best(largest, best.tokens + part.first, best.log_sums)
        drawn.tokens.copy_(tokens)
        torch.stack(
            (tokens.double(), (largest - log_sums).double().exp(), log_sums.double()), out=drawn.report
        )
        return drawn

    def _outputs(self, num_wanted: int) -> tuple[torch.Tensor, Drawn]:
        """Where graphs of steps with so many wanted rows leave what `_compute` gives."""
        report = self._report[: 3 * num_wanted].view(3, num_wanted)
        return self._logits[:num_wanted], Drawn(self._tokens[:num_wanted], report)

    def following_pairs(self) -> Iterator[tuple[ScheduledBatch, ScheduledBatch]]:
        for adapts in {False, self._spec.mask_token_id is not None}:
            first = Segment(0, 0, (1,), (0,) * 4, 1, False, (0,), SamplingParams())
            tokens = (0, 1) if adapts else (0,)
            then = replace(first, start=1, token_ids=tokens, adapter=adapts, follows=first)
            yield ScheduledBatch((first,)), ScheduledBatch((then,))

    def warm_up_following(self) -> None:
        """Has the kernel compiled that completes steps begun ahead, with the adapter and without."""
        for first, then in self.following_pairs():
            self.begin(then, self.begin(first, None))

    def _follow(
        self,
        segments: Sequence[Segment],
        host: HostStep,
        before: Sampled,
        parts: Mapping[str, torch.Tensor],
    ) -> None:
        """Has the device complete the segments that follow those of the step before."""
        opens = opens_of(segments, host, first_rows(before.segments))
        if opens:
            packed = self._staging.send(pack(opens, before.drawn.report.shape[1]))
            mask_token_id = self._spec.mask_token_id
            follow(packed, len(opens), before.drawn, parts, self._page_size, mask_token_id, PROB_ONE)

    def _size(self, host: HostStep) -> tuple[StepSize, GraphCache | None]:
        """The size to pad to, and the graphs if the step fits one."""
        if not self._options.pads:
            return host.size, None
        size = self._sizes.padded(host.size)
        if size is None:
            return eager(host.size), None
        return size, self._graphs if len(host.page_table) <= _GRAPH_PAGE_ENTRIES else None

    def _prepare_graphs(self, dtype: torch.dtype) -> None:
        """Makes the tensors that graphs read from and write to, and the way they are captured."""
        device = self.device
        num_ints = max(size.num_ints for size in self._sizes.sizes) + _GRAPH_PAGE_ENTRIES
        self._buffer = torch.zeros(num_ints, dtype=torch.int32, device=device)
        num_wanted = self._sizes.max_wanted
        self._logits = torch.empty(num_wanted, self._part.width, dtype=dtype, device=device)
        self._tokens = torch.empty(num_wanted, dtype=torch.int64, device=device)
        self._report = torch.empty(3 * num_wanted, dtype=torch.float64, device=device)
        recorder = GraphRecorder(device)

        def capture(size: StepSize) -> Replay:
            def compute() -> None:
                self._compute(StepInputs.view(self._buffer, size), *self._outputs(size.num_wanted))

            return recorder.capture(compute)

        self._graphs = GraphCache(capture)


def _check_fp8(setting: str, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _FP8_SINCE:
        name = torch.cuda.get_device_name(device)
        raise CheckpointError(f"{setting} 'fp8' needs a GPU like Ada's or Hopper's or newer, not a {name}")


def _placed(weights: ModelWeights, device: torch.device, quantization: str | None) -> ModelWeights:
    try:
        encode = None if quantization is None else partial(encoded, dtype=CODES[quantization])
        return weights_to(weights, device, encode)
    except torch.OutOfMemoryError as error:
        raise CheckpointError(
            f"the weights do not fit {device}: use bfloat16, quantization 'int8', a smaller checkpoint, or "
            f"tensor_parallel ({error})"
        ) from error
