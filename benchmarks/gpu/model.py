"""Models of the published architectures with random weights, made on the device."""

from dataclasses import dataclass
from functools import partial

import torch

from replicas.engine.batch import Segment
from replicas.kernels.attention import num_places
from replicas.kernels.confidence import confidence
from replicas.kernels.normed_product import CODES, encoded
from replicas.messages import SamplingParams
from replicas.model.adapter import LowRank
from replicas.model.checkpoint import LayerWeights, ModelWeights, weights_to
from replicas.model.config import ModelConfig
from replicas.model.cuda.inputs import HostStep, StepInputs
from replicas.model.cuda.runner import CudaRunner, Options
from replicas.model.parallel import Parallel, VocabPart, shard_config

_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 34},
    "14B": {"hidden_size": 5120, "intermediate_size": 16384, "num_hidden_layers": 40},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1},
}
_TINY = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300}
_ADAPTER_RANK = 128
_GREEDY = SamplingParams(max_tokens=1)


@dataclass(frozen=True, slots=True)
class Work:
    """The sizes at which one model is measured; smaller where it only has to run."""

    name: str
    page_size: int = 64
    num_cached: int = 800
    max_concurrency: int = 128
    max_queries: int = 32
    num_rounds: int = 30
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    """None for dtype."""
    codes: str | None = None
    """The kind of codes that weights are (replicas.kernels.normed_product.CODES), if any."""
    num_layers: int | None = None
    """None for all the model has."""
    num_processes: int = 1
    """The number among which the model is split; this one is the first."""


def published_config(name: str, num_layers: int | None = None) -> ModelConfig:
    """The published 8B and 14B models' configuration, or a tiny one of the same kind; with as many layers, if
    given."""
    raw: dict[str, object] = {
        "model_type": "nemotron_labs_diffusion",
        "vocab_size": 131072,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 16384,
        "rope_parameters": _ROPE,
        "tie_word_embeddings": False,
        "mask_token_id": 100,
        "block_size": 32,
        "eos_token_id": 2,
    }
    raw |= _SHAPES[name] | (_TINY if name == "tiny" else {})
    if num_layers is not None:
        raw["num_hidden_layers"] = num_layers
    return ModelConfig.parse(raw, has_adapter=True)


def random_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, codes: str | None = None
) -> ModelWeights:
    """Small normal weights in the engine's layout, with an adapter on every output projection.

    codes: the kind that those of linear layers are, if any
    """

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02)

    def ones() -> torch.Tensor:
        return torch.ones(config.hidden_size, dtype=dtype, device=device)

    queries = config.num_heads * config.head_dim
    rank = min(_ADAPTER_RANK, queries // 8)
    layers = [
        LayerWeights(
            input_norm=ones(),
            qkv=normal((config.num_heads + 2 * config.num_kv_heads) * config.head_dim, config.hidden_size),
            qkv_bias=None,
            query_norm=None,
            key_norm=None,
            o=normal(config.hidden_size, queries),
            post_norm=ones(),
            gate_up=normal(2 * config.intermediate_size, config.hidden_size),
            down=normal(config.hidden_size, config.intermediate_size),
            adapters={"o": LowRank(normal(rank, queries), normal(config.hidden_size, rank))},
        )
        for _ in range(config.num_layers)
    ]
    vocabulary = (config.vocab_size, config.hidden_size)
    weights = ModelWeights(normal(*vocabulary), layers, ones(), normal(*vocabulary))
    return weights if codes is None else weights_to(weights, device, partial(encoded, dtype=CODES[codes]))


def make_runner(work: Work, device: torch.device, options: Options) -> CudaRunner:
    """A runner with pages for max_concurrency sequences of num_cached tokens and a block each."""
    whole = published_config(work.name, work.num_layers)
    parallel = Parallel(0, work.num_processes)
    config = shard_config(whole, parallel)
    weights = random_weights(config, work.dtype, device, work.codes)
    weights.head = weights.head[: VocabPart.of(whole.vocab_size, parallel).width]
    per_sequence = -(-(work.num_cached + 4 * work.max_queries) // work.page_size)
    return CudaRunner(
        config,
        weights,
        num_pages=work.max_concurrency * per_sequence,
        page_size=work.page_size,
        max_context=work.num_cached + 4 * work.max_queries,
        kv_dtype=work.kv_dtype,
        parallel=parallel,
        options=options,
    )


def segments(work: Work, concurrency: int, num_queries: int, *, draft: bool) -> list[Segment]:
    """A segment for each sequence, after its cached tokens.

    draft: it wants all but its seed, else it is a verify or a step
    """
    per_sequence = -(-(work.num_cached + num_queries) // work.page_size)
    return [
        Segment(
            seq_id=number,
            start=work.num_cached,
            token_ids=tuple(7 + (number + index) % 89 for index in range(num_queries)),
            pages=tuple(number + concurrency * page for page in range(per_sequence)),
            num_causal=0 if draft else num_queries,
            adapter=draft,
            wanted=tuple(range(1 if draft else 0, num_queries)),
            sampling=_GREEDY,
        )
        for number in range(concurrency)
    ]


class Forward:
    """One forward of a fixed step, with its tokens' choice, to be run again and again."""

    def __init__(self, runner: CudaRunner, asked: list[Segment]):
        config = runner.config
        places = num_places(config.num_kv_heads, runner.device)
        host = HostStep.pack(asked, config, runner.spec.page_size, places)
        buffer = torch.empty(host.num_ints(host.size), dtype=torch.int32)
        host.write(buffer.numpy(), host.size)
        self._buffer = buffer.to(runner.device)
        self._size = host.size
        self._runner = runner

    def __call__(self) -> None:
        inputs = StepInputs.view(self._buffer, self._size)
        confidence(self._runner.model.forward(inputs), self._runner.spec.mask_token_id)
