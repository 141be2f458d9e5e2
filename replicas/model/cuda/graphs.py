"""CUDA graphs of steps: one a size, captured when it is first met and kept, their memory shared."""

from collections.abc import Callable

import torch

from replicas.model.cuda.inputs import StepSize

Replay = Callable[[], object]


class GraphCache:
    """Replays captured steps by size.

    None is ever dropped: sizes are few (replicas.model.cuda.sizes), and destroying one graph may free what
    cuBLAS has given to all that were captured on its stream.

    capture: makes the replay of a step of a size; called once a size
    """

    def __init__(self, capture: Callable[[StepSize], Replay]):
        self._capture = capture
        self._replays: dict[StepSize, Replay] = {}

    def __len__(self) -> int:
        return len(self._replays)

    def run(self, size: StepSize) -> None:
        replay = self._replays.get(size)
        if replay is None:
            replay = self._replays[size] = self._capture(size)
        replay()


class GraphRecorder:
    """Captures a function of fixed addresses into CUDA graphs that share one memory pool.

    Only one graph runs at a time, and what it leaves for others is written to tensors from outside the
    pool, so the graphs may all use the same memory. All are captured on one stream, as cuBLAS keeps a
    workspace for every stream it has met.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, compute: Callable[[], object]) -> Replay:
        """Captures compute, which runs twice: first outside, to compile kernels and set up libraries."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            compute()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            compute()
        return graph.replay
