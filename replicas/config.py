"""The settings that one replica is given at its start."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from policies.scaling import Targets


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """The settings of one replica, checked by cluster.config, where each is explained to operators."""

    checkpoint: str
    """A folder or a hub name."""
    served_model_name: str
    app: str
    redis_url: str
    policy: str
    policy_params: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    """'cpu' or 'cuda'."""
    dtype: str = "auto"
    quantization: str | None = None
    """'int8' or None, of weights on a CPU."""
    forward: str = "auto"
    num_threads: int | None = None
    """Threads of each process on a CPU; None for its share of the cores it may use."""
    num_sharing: int = 1
    """The processes that share these cores."""
    page_size: int = 16
    kv_cache_mb: int = 256
    """Memory for K/V pages of each process, in MiB."""
    kv_dtype: str = "auto"
    """'auto', 'bfloat16' or 'fp8'."""
    tensor_parallel: int = 1
    """The number of processes that share the model."""
    max_running: int = 64
    """Sequences in one forward."""
    max_step_tokens: int = 512
    """Query tokens in one forward."""
    max_prefill_tokens: int = 256
    """Prompt tokens in a forward that decodes too."""
    max_step_ms: float | None = None
    """Milliseconds that a forward with prompts and decoding in it may take; None for no bound."""
    overlap_blocks: bool = True
    """If true, a block of diffusion is begun in the commit of the one before."""
    max_waiting: int = 256
    """Sequences queued beyond those running."""
    calibration_s: float = 1.5
    """Seconds spent at the start on measuring what forwards take."""
    log_format: str = "text"
    tool_parser: str = "auto"
    """The format of calls: a name in replicas.tools.families, 'auto' by the chat template, or 'none'."""
    reasoning_parser: str = "auto"
    """The marks of reasoning: a name in replicas.tools.reasoning, 'auto' by the chat template, or 'none'."""
    targets: Targets = field(default_factory=Targets)
    """The targets by which the replica reports its demand, where Serve scales."""
