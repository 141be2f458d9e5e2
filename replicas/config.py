"""The settings of one replica."""

from pathlib import Path
from typing import Literal

from pydantic import Field

import replicas
from policies.config import EMBEDDED_MODEL, Capacity, Settings, SharedConfig
from policies.modes import MAX_BLOCK_LENGTH
from policies.scaling import Targets

CHECKPOINTS = {EMBEDDED_MODEL: "triad-5m", "triad-5m-tools": "triad-5m-tools", "smollm2": "smollm2-135m"}
"""Models with a name of their own, and their folders under replicas/checkpoints."""

MIN_STEP_TOKENS = 3 * MAX_BLOCK_LENGTH
"""The least max_step_tokens: a block, the next one behind it, and the share that is kept for prompts."""


class EngineConfig(Capacity):
    """The bounds of an engine and of its steps. Where the rounds of a step alone take longer than it is to,
    prompts go on by a few tokens a step all the same."""

    max_step_tokens: int = Field(default=512, ge=MIN_STEP_TOKENS, description="Query tokens in one forward.")
    max_prefill_tokens: int = Field(
        default=256,
        ge=1,
        description="Prompt tokens in a forward that decodes too: bounds the delay of its streams.",
    )
    max_step_ms: float | None = Field(
        default=None,
        gt=0.0,
        description="Longest forward, by its measured cost, that prompts may join when it decodes too: "
        "bounds the delay between its streams' tokens. None: max_prefill_tokens alone.",
    )
    overlap_blocks: bool = Field(
        default=True,
        description="Begin a block of diffusion in the forward that commits the one before: fewer forwards, "
        "and tokens that may differ. false: one block after the other, as Nemotron's authors decode.",
    )


class DemandConfig(Settings):
    """The number of replicas, and the targets by which it follows the demand where it may."""

    num_replicas: int = Field(default=1, ge=1, description="Model servers; with max_replicas, at the start.")
    max_replicas: int | None = Field(
        default=None,
        ge=1,
        description="Their number follows the demand, up to so many; None: it stays as it is.",
    )
    target_ttft_s: float = Field(
        default=1.0, gt=0.0, description="With max_replicas: seconds to the first token that are to be kept."
    )
    target_tpot_s: float = Field(
        default=0.05, gt=0.0, description="With max_replicas: seconds a token after it that are to be kept."
    )

    @property
    def targets(self) -> Targets:
        """The targets by which a replica reports its demand, where Serve scales."""
        return Targets(self.target_ttft_s, self.target_tpot_s)


class ReplicaConfig(EngineConfig, SharedConfig, DemandConfig):
    """The settings of one replica; what can't be had together is told by cluster.config."""

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Of weights and K/V; auto: float32 on CPUs, bfloat16 on GPUs."
    )
    quantization: Literal["int8", "fp8"] | None = Field(
        default=None,
        description="Linear layers' weights in 8 bits: int8 on GPUs and in the native forward; fp8 on GPUs "
        "like Ada's or newer, less exact; None: all in dtype.",
    )
    forward: Literal["auto", "native", "torch"] = Field(
        default="auto",
        description="On CPUs: compiled C++, or torch alone; auto: native where there is a compiler.",
    )
    num_threads: int | None = Field(
        default=None,
        ge=1,
        description="The most CPU threads of a replica; None: its share of the cores it may use.",
    )
    page_size: int | None = Field(
        default=None, ge=1, description="Tokens a K/V page. None: 16 on CPUs, 64 on GPUs."
    )
    kv_cache_mb: int | None = Field(
        default=None,
        ge=1,
        description="Memory for K/V pages, in MiB, of each of a replica's processes. None: on GPUs what "
        "weights and steps leave; on CPUs a quarter of the free memory, divided by the processes, "
        "256 to 4096.",
    )
    kv_dtype: Literal["auto", "bfloat16", "fp8"] = Field(
        default="auto", description="Of K/V on GPUs: auto is dtype's; fp8 holds twice as many tokens."
    )
    tool_parser: Literal["auto", "hermes", "mistral", "llama3_json", "pythonic", "none"] = Field(
        default="auto",
        description="The format in which the model calls tools; auto: by its chat template.",
    )
    reasoning_parser: Literal["auto", "think", "mistral", "none"] = Field(
        default="auto",
        description="The marks of its reasoning, <think> or [THINK]; auto: by its chat template.",
    )
    calibration_s: float = Field(
        default=1.5, ge=0.0, le=60.0, description="Seconds a replica measures its forwards before it serves."
    )
    num_gpus: float = Field(
        default=0.0, ge=0.0, description="GPUs of each of a replica's processes, one at most."
    )
    tensor_parallel: int = Field(
        default=1, ge=1, description="Processes, on one machine, among which each replica's model is split."
    )

    @property
    def checkpoint(self) -> str:
        """The folder or the hub name of the weights."""
        if self.model not in CHECKPOINTS:
            return self.model
        return str(Path(replicas.__path__[0]) / "checkpoints" / CHECKPOINTS[self.model])

    @property
    def device(self) -> str:
        """'cpu' or 'cuda'."""
        return "cuda" if self.num_gpus > 0 else "cpu"

    @property
    def weights_dtype(self) -> str:
        """The dtype of weights; on a CPU float32, in which greedy decoding is the same in any batch."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if self.num_gpus else "float32"

    @property
    def kv_page_size(self) -> int:
        """Tokens a K/V page, by the device where nothing is set: the GPU's kernels read 64 keys at once."""
        return self.page_size or (64 if self.num_gpus else 16)

    @property
    def kv_budget_bytes(self) -> int | None:
        """Bytes for K/V pages; None for what the runner finds free."""
        return None if self.kv_cache_mb is None else self.kv_cache_mb * 2**20

    @property
    def num_sharing(self) -> int:
        """The processes that share a machine's cores; all on one machine is the case to be right for."""
        return (self.max_replicas or self.num_replicas) * self.tensor_parallel
