"""CUDA graphs of steps: captured when a size is first met, the longest unused dropped, memory shared."""

from collections import OrderedDict
from collections.abc import Callable

import torch

from replicas.model.cuda.inputs import StepSize

MAX_GRAPHS = 64
MAX_GRAPH_ROWS = 512

Replay = Callable[[], object]


class GraphCache:
    """Replays captured steps by size; keeps at most max_graphs of them.

    capture: makes the replay of a step of a size; called once a size, and again after that size was dropped
    """

    def __init__(self, capture: Callable[[StepSize], Replay], max_graphs: int = MAX_GRAPHS):
        if max_graphs < 1:
            raise ValueError(f"max_graphs must be at least 1, got {max_graphs}")
        self._capture = capture
        self._max_graphs = max_graphs
        self._replays: OrderedDict[StepSize, Replay] = OrderedDict()

    def __len__(self) -> int:
        return len(self._replays)

    def run(self, size: StepSize) -> None:
        replay = self._replays.pop(size, None)
        if replay is None:
            if len(self._replays) >= self._max_graphs:
                self._replays.popitem(last=False)
            replay = self._capture(size)
        self._replays[size] = replay
        replay()


class GraphRecorder:
    """Captures a function of fixed addresses into CUDA graphs that share one memory pool.

    Only one graph runs at a time, and what it leaves for others is written to tensors from outside the
    pool, so the graphs may all use the same memory.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, compute: Callable[[], object]) -> Replay:
        """Captures compute, which runs twice: first outside, to compile kernels and set up libraries."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            compute()
        return graph.replay
