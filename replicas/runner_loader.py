"""The runner that a replica's configuration asks for."""

from replicas.config import ReplicaConfig
from replicas.engine.batch import ServingRunner
from replicas.machine import default_num_threads
from replicas.model.runner import TorchRunner


def load_runner(config: ReplicaConfig) -> ServingRunner:
    """Loads the runner; in a process of a group (replicas.model.lockstep) this one's part. Raises
    CheckpointError."""
    if config.device == "cuda":
        from replicas.model.cuda.runner import CudaRunner  # Triton is there on Linux only

        return CudaRunner.load(
            config.checkpoint,
            dtype=config.weights_dtype,
            kv_budget_bytes=config.kv_budget_bytes,
            device_share=config.num_gpus,
            kv_dtype=config.kv_dtype,
            quantization=config.quantization,
            page_size=config.kv_page_size,
        )
    num_threads = config.num_threads
    if num_threads is None:
        # Asked here, on the machine it is for. Ray would give an actor with a fraction of a CPU one thread.
        num_threads = default_num_threads(config.num_sharing)
    return TorchRunner.load(
        config.checkpoint,
        dtype=config.weights_dtype,
        kv_budget_bytes=config.kv_budget_bytes,
        page_size=config.kv_page_size,
        num_threads=num_threads,
        num_sharing=config.num_sharing,
        forward=config.forward,
        quantization=config.quantization,
    )
