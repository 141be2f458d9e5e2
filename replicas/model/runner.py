"""The implementation of replicas.engine.batch.Runner: a model on this machine, native or in torch."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain, repeat
from math import isfinite
from pathlib import Path

import torch

from replicas.engine.batch import ModelSpec, ScheduledBatch, Segment, SegmentOutput, TokenProb
from replicas.model.adapter import AdapterRows
from replicas.model.attention import AttentionPlan, CpuAttention
from replicas.model.checkpoint import (
    DTYPES,
    CheckpointError,
    ModelWeights,
    load_weights,
    resolve_folder,
    weights_bytes,
)
from replicas.model.config import ModelConfig
from replicas.model.kv_budget import cpu_budget_bytes
from replicas.model.kv_cache import KvCache
from replicas.model.logit_rules import Row, takes_most_probable
from replicas.model.native.build import NativeUnavailable
from replicas.model.native.model import NativeModel, native_page_bytes, require_native
from replicas.model.parallel import ALONE, Parallel, shard, shard_config
from replicas.model.penalties import Penalise, penalise
from replicas.model.sampler import Choose, Sampled, choose, sample
from replicas.model.split_sampler import SplitSampler
from replicas.model.transformer import Batch, Transformer
from replicas.resident import forget, forget_code, trim_heap

FORWARDS = ("auto", "native", "torch")
QUANTIZATIONS = (None, "int8")
_WORTH_THREADS = 1 << 20
"""The logits that torch reads from where its threads beside the native forward's save more time than they
cost; of a row that is sorted each counts _SORTED times."""
_SORTED = 8

logger = logging.getLogger(__name__)


class TorchModel:
    """The forward in torch: the reference of the native one, and its stand-in where there is no compiler."""

    choose: Choose = staticmethod(choose)
    penalise: Penalise = staticmethod(penalise)

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        num_pages: int,
        page_size: int,
        max_context: int,
        parallel: Parallel = ALONE,
    ):
        """Takes the weights over (Transformer)."""
        cache = KvCache(config, num_pages, page_size, weights.embedding.dtype)
        self.pages = cache.layers
        self._attention = CpuAttention(cache, config.num_heads)
        self._transformer = Transformer(config, weights, self._attention, max_context, parallel)

    def forward(self, segments: Sequence[Segment]) -> tuple[tuple[int, ...], torch.Tensor]:
        """Runs the segments -> the order in which they were packed, and the logits [W, vocab] of their wanted
        rows; of several processes each has its part of them."""
        attention = self._attention.plan(segments)
        ordered = [segments[index] for index in attention.order]
        return attention.order, self._transformer.forward(_batch(ordered, attention))


class TorchRunner:
    """Runs batches on the CPU. Not thread-safe: one thread calls `run`."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        *,
        num_pages: int,
        page_size: int,
        max_context: int,
        native_threads: int | None = None,
        quantization: str | None = None,
        parallel: Parallel = ALONE,
    ):
        """Takes the weights over. native_threads: of the native forward; None: the forward is torch's.

        quantization: the native forward's, as of load.

        parallel: this process's place among those that share the model, for torch's forward alone; weights
        and config are then its own part (replicas.model.parallel.shard).
        """
        self._model: TorchModel | NativeModel
        if native_threads is None:
            self._model = TorchModel(config, weights, num_pages, page_size, max_context, parallel)
        else:
            self._model = NativeModel(
                config,
                weights,
                num_pages=num_pages,
                page_size=page_size,
                num_positions=max_context,
                num_threads=native_threads,
                quantization=quantization,
            )
        self._spec = spec = spec_of(
            config, num_pages=num_pages, page_size=page_size, max_context=max_context
        )  # fmt: skip
        self._split: SplitSampler | None = None
        if parallel.size > 1:
            self._split = SplitSampler(spec.vocab_size, spec.mask_token_id, spec.eos_token_ids, parallel)

    @classmethod
    def load(
        cls,
        checkpoint: str,
        *,
        dtype: str = "float32",
        num_pages: int | None = None,
        kv_budget_bytes: int | None = None,
        page_size: int = 16,
        max_context: int | None = None,
        num_threads: int | None = None,
        num_sharing: int = 1,
        forward: str = "auto",
        quantization: str | None = None,
    ) -> "TorchRunner":
        """Loads a checkpoint, a folder or a hub name. Raises CheckpointError.

        num_pages or kv_budget_bytes sizes the page pool, the first before the second; with neither it takes
        a share of the free memory (replicas.model.kv_budget). max_context is at most the model's own and what
        the pool holds.
        num_threads: None is torch's number, which is the cores'
        num_sharing: processes like this one that share the memory
        forward: 'native', 'torch', or 'auto', which is native where that can be had
        quantization: 'int8' holds the weights of linear layers, the head among them, in 8 bits, for the
        native forward alone; embedding, adapter, activations and K/V keep the dtype

        Raises NativeUnavailable for 'native' or 'int8' where it can't be had. Under torch.distributed's
        default group the model is split among its processes, in torch.
        """
        if dtype not in DTYPES:
            raise CheckpointError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if forward not in FORWARDS:
            raise CheckpointError(f"forward must be one of {', '.join(FORWARDS)}, got {forward!r}")
        if quantization not in QUANTIZATIONS:
            raise CheckpointError(f"quantization must be 'int8' or None, got {quantization!r}")
        if page_size < 1:
            raise CheckpointError(f"page_size must be positive, got {page_size}")
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        folder = resolve_folder(checkpoint)
        whole = ModelConfig.from_folder(folder)
        parallel = Parallel.of_default_group()
        config = shard_config(whole, parallel)
        is_native = False
        if quantization and (forward == "torch" or parallel.size > 1):
            raise NativeUnavailable(
                f"quantization {quantization!r} is of the native forward, which runs in one process: "
                f"leave out forward='torch' and tensor_parallel"
            )
        if parallel.size == 1:
            is_native = forward != "torch" and _has_native(config, forward == "native", quantization)
        elif forward == "native":
            raise NativeUnavailable("the native forward runs in one process; tensor_parallel takes torch's")
        page_bytes_of = native_page_bytes if is_native else KvCache.page_bytes
        page_bytes = page_bytes_of(config, page_size, DTYPES[dtype])
        if num_pages is None:
            if kv_budget_bytes is None:
                kv_budget_bytes = cpu_budget_bytes(weights_bytes(config, DTYPES[dtype]), num_sharing)
            num_pages = parallel.min(kv_budget_bytes // page_bytes)
        if num_pages < 1:
            raise CheckpointError(
                f"the K/V budget holds no page; one of {page_size} tokens takes {page_bytes} bytes"
            )
        limits = [config.max_position_embeddings, num_pages * page_size]
        weights = load_weights(folder, whole, DTYPES[dtype], reserved_bytes=num_pages * page_bytes)
        return cls(
            config,
            shard(whole, weights, parallel),
            num_pages=num_pages,
            page_size=page_size,
            max_context=min(limits if max_context is None else [*limits, max_context]),
            native_threads=torch.get_num_threads() if is_native else None,
            quantization=quantization,
            parallel=parallel,
        )

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    def warm_up_batches(self, max_running: int, max_step_tokens: int) -> Sequence[ScheduledBatch]:
        return ()  # nothing is compiled or captured

    def settle(self) -> None:
        for pages in self._model.pages:
            forget(pages.data_ptr(), pages.nbytes)
        forget_code(Path(torch.__file__).parent / "lib")
        trim_heap()

    def run(self, batch: ScheduledBatch) -> Sequence[SegmentOutput]:
        if not batch.segments:
            return ()
        order, logits = self._model.forward(batch.segments)
        segments = [batch.segments[index] for index in order]
        outputs = [SegmentOutput((), ())] * len(segments)
        if not any(segment.wanted for segment in segments):
            return outputs
        sampled = self._sample(segments, logits)
        if sampled is None:  # nobody asks the others for their tokens
            return outputs
        for index, output in zip(order, outputs_of(segments, *sampled), strict=True):
            outputs[index] = output
        return outputs

    def _sample(self, segments: Sequence[Segment], logits: torch.Tensor) -> Sampled | None:
        """The choice for the segments' wanted rows; None on all but the first of several processes."""
        spec, model = self._spec, self._model
        if isinstance(model, NativeModel) and all(
            takes_most_probable(segment) for segment in segments if segment.wanted
        ):
            return *model.most_probable(logits.shape[0], spec.mask_token_id), {}
        rows = list(chain.from_iterable(rows_of(segment) for segment in segments))
        if self._split is not None:
            takes = chain.from_iterable(
                repeat(takes_most_probable(segment), len(segment.wanted)) for segment in segments
            )
            return self._split.sample(
                logits, rows, [index for index, takes_it in enumerate(takes) if takes_it]
            )
        is_alone = isinstance(model, NativeModel) and _num_read(rows, spec.vocab_size) < _WORTH_THREADS
        with _one_thread() if is_alone else nullcontext():
            return sample(logits, rows, spec.mask_token_id, spec.eos_token_ids, model.choose, model.penalise)


def _has_native(config: ModelConfig, required: bool, quantization: str | None) -> bool:
    """True if there is a native forward. Raises NativeUnavailable where one is required, for a quantization
    too, and can't be had."""
    try:
        require_native(config)
    except NativeUnavailable as error:
        if quantization:
            raise NativeUnavailable(
                f"quantization {quantization!r} needs the native forward: {error}"
            ) from error
        if required:
            raise
        logger.warning("the forward is torch's, several times slower than the native one: %s", error)
        return False
    return True


def _num_read(rows: Sequence[Row], vocab_size: int) -> int:
    """The logits that torch reads for draws and log-probabilities, those of sorted rows as many times as that
    takes longer."""
    num_read = 0
    for row in rows:
        sampling = row.sampling
        if sampling.temperature > 0:
            num_read += _SORTED if sampling.top_k > 0 or sampling.top_p < 1 else 1
        num_read += sampling.logprobs is not None
    return vocab_size * num_read


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps torch's operations to the calling thread.

    OpenMP's other threads spin for some 8 ms behind an operation that they took part in, on the cores of the
    native forward's.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def spec_of(config: ModelConfig, *, num_pages: int, page_size: int, max_context: int) -> ModelSpec:
    """The facts that the engine must know of a model with a pool of so many pages."""
    return ModelSpec(
        modes=config.modes,
        mask_token_id=config.mask_token_id,
        eos_token_ids=config.eos_token_ids,
        max_context=max_context,
        num_pages=num_pages,
        page_size=page_size,
        vocab_size=config.vocab_size,
        denoise_with_adapter=config.denoise_with_adapter,
        sampler=config.sampler,
    )


def rows_of(segment: Segment) -> list[Row]:
    """The rows of a segment whose logits are wanted.

    A causal row knows, of its own segment, the tokens up to itself; a bidirectional one the causal tokens,
    and those that are fixed.
    """
    rows = []
    num_seen = len(segment.history) - segment.start
    masks = chain(segment.allowed, repeat(None))
    for index, position, allowed in zip(segment.wanted, segment.sampled_positions, masks, strict=False):
        then: tuple[int, ...] = ()
        if segment.sampling.has_penalties:
            then = segment.token_ids[num_seen : min(index + 1, segment.num_causal)]
            then += segment.fixed if index >= segment.num_causal else ()
        rows.append(Row(segment.sampling, position, segment.prompt_len, segment.history, allowed, then))
    return rows


def outputs_of(
    segments: Sequence[Segment],
    tokens: Sequence[int],
    probs: Sequence[float],
    most_probable: Mapping[int, tuple[TokenProb, ...]],
) -> list[SegmentOutput]:
    """The output of each segment, from what the sampler gave for its rows, in order.

    A row whose probability is not finite has no token. What has causal tokens ends before its first one,
    since it may never come to that row; any other segment with one fails.
    """
    outputs = []
    end = 0
    for segment in segments:
        first, end = end, end + len(segment.wanted)
        made = tuple(probs[first:end])
        if not all(map(isfinite, made)):
            count = next(index for index, prob in enumerate(made) if not isfinite(prob))
            if not count or not segment.num_causal:
                outputs.append(SegmentOutput((), (), failure=_failure(segment)))
                continue
            made = made[:count]
        last = first + len(made)
        is_asked = segment.sampling.logprobs is not None
        top = tuple(most_probable[row] for row in range(first, last)) if is_asked else ()
        outputs.append(SegmentOutput(tuple(tokens[first:last]), made, top))
    return outputs


def _failure(segment: Segment) -> str:
    sampling = segment.sampling
    acting = {
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty != 1.0,
        "logit_bias": sampling.logit_bias,
        "min_tokens": sampling.min_tokens,
        sampling.grammar_field: segment.allowed,
    }
    rules = ", ".join(name for name, acts in acting.items() if acts)
    if not rules:
        return "the model's logits are not finite (NaN or infinity), so no token can be sampled"
    return (
        f"no token can be sampled: the logits are not finite, or all impossible, with the request's {rules}"
    )


def _batch(segments: Sequence[Segment], attention: AttentionPlan) -> Batch:
    """Makes the forward's tensors from segments in packed order."""
    token_ids = torch.tensor(list(chain.from_iterable(segment.token_ids for segment in segments)))
    wanted: list[int] = []
    adapter: list[int] = []
    wanted_adapter: list[int] = []
    row = 0
    for segment in segments:
        length = len(segment.token_ids)
        if segment.adapter:
            adapter.extend(range(row + segment.num_causal, row + length))
            first = sum(index < segment.num_causal for index in segment.wanted)
            wanted_adapter.extend(range(len(wanted) + first, len(wanted) + len(segment.wanted)))
        wanted.extend(row + index for index in segment.wanted)
        row += length
    return Batch(
        token_ids=token_ids,
        attention=attention,
        wanted=None if len(wanted) == row else torch.tensor(wanted, dtype=torch.int64),
        adapter=_adapter_rows(adapter, row),
        wanted_adapter=_adapter_rows(wanted_adapter, len(wanted)),
    )


def _adapter_rows(rows: list[int], num_rows: int) -> AdapterRows | None:
    if not rows:
        return None
    return AdapterRows(None if len(rows) == num_rows else torch.tensor(rows))
