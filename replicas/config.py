"""What one replica is given at its start."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from policies.scaling import Targets


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """Checked by cluster.config, where each field is explained to operators.

    checkpoint: a folder or a hub name. device: 'cpu' or 'cuda'. num_threads: of each process on a CPU; None:
    its share of the cores it may use, which num_sharing processes are on.
    quantization: 'int8' or None, of weights on a CPU.
    kv_cache_mb: memory for K/V pages of each process, in MiB. kv_dtype: 'auto', 'bfloat16' or 'fp8'.
    tensor_parallel: processes that share the model. max_running: sequences in one forward.
    max_step_tokens: query tokens in one forward; max_prefill_tokens: of them prompt tokens beside
    decoding ones; max_step_ms: what a forward of both may take; None: no bound. overlap_blocks: of
    diffusion, each begun in the commit before. max_waiting: queued beyond those running. calibration_s:
    seconds spent at the start on measuring what forwards take. targets: what it reports its demand by, where
    Serve scales.
    """

    checkpoint: str
    served_model_name: str
    app: str
    redis_url: str
    policy: str
    policy_params: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    dtype: str = "auto"
    quantization: str | None = None
    forward: str = "auto"
    num_threads: int | None = None
    num_sharing: int = 1
    page_size: int = 16
    kv_cache_mb: int = 256
    kv_dtype: str = "auto"
    tensor_parallel: int = 1
    max_running: int = 64
    max_step_tokens: int = 512
    max_prefill_tokens: int = 256
    max_step_ms: float | None = None
    overlap_blocks: bool = True
    max_waiting: int = 256
    calibration_s: float = 1.5
    log_format: str = "text"
    targets: Targets = field(default_factory=Targets)
