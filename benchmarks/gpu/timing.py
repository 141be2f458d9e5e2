"""Time on a device: medians of single runs with cold caches, within a budget for the whole benchmark."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

_FLUSH_BYTES = 256 << 20
_MAX_RUNS = 200


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one run: the median, and the standard deviation over num_runs."""

    ms: float
    std_ms: float
    num_runs: int


class Clock:
    """Times runs on a device within a budget.

    budget_s: seconds from the clock's making on, for everything measured with it
    """

    def __init__(self, device: torch.device, budget_s: float):
        self.device = device
        self._end_s = time.monotonic() + budget_s
        self._on_gpu = device.type == "cuda"
        self._flush = torch.empty(_FLUSH_BYTES // 4 if self._on_gpu else 1, dtype=torch.int32, device=device)

    @property
    def left_s(self) -> float:
        return self._end_s - time.monotonic()

    def time(self, run: Callable[[], object], *, for_s: float = 0.15, cold: bool = True) -> Timing:
        """Times `run` for about for_s seconds, at least 5 times (once off a GPU), after one run to warm up.

        cold: overwrites the L2 cache before each run
        """
        run()
        self.wait()
        if not self._on_gpu:
            began_s = time.perf_counter()
            run()
            return Timing((time.perf_counter() - began_s) * 1e3, 0.0, 1)
        began_s = time.perf_counter()
        times: list[float] = []
        while len(times) < 5 or (time.perf_counter() - began_s < for_s and len(times) < _MAX_RUNS):
            times.extend(self._run_some(run, 5, cold))
        return Timing(statistics.median(times), statistics.pstdev(times), len(times))

    def _run_some(self, run: Callable[[], object], count: int, cold: bool) -> Iterator[float]:
        """Queues runs together, so that a kernel's launch hides behind what runs before it."""
        new = torch.cuda.Event
        events = [[new(enable_timing=True) for _ in range(2)] for _ in range(count)]  # type: ignore[no-untyped-call]
        for start, end in events:
            if cold:
                self._flush.zero_()
            start.record()
            run()
            end.record()
        self.wait()
        return (start.elapsed_time(end) for start, end in events)

    def wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self.device)


@dataclass(slots=True)
class Ceilings:
    """The device's limits, measured in this run."""

    copy_gb_s: float
    """GB/s of a copy, read and written bytes both counted."""
    bf16_tflop_s: float
    """TFLOP/s of a bfloat16 matrix product."""

    @classmethod
    def measure(cls, clock: Clock, size: int) -> "Ceilings":
        """Measures products of square matrices of this size, and copies of 64 such matrices."""
        source = torch.zeros(128 * size * size, dtype=torch.uint8, device=clock.device)
        target = torch.empty_like(source)
        copied = clock.time(lambda: target.copy_(source), for_s=0.5, cold=False)
        a, b = (torch.randn(size, size, device=clock.device).bfloat16() for _ in range(2))
        product = clock.time(lambda: a @ b, for_s=0.5, cold=False)
        return cls(2 * len(source) / copied.ms / 1e6, 2 * size**3 / product.ms / 1e9)


@dataclass(slots=True)
class Report:
    """The results found so far."""

    about: dict[str, object]
    ceilings: dict[str, float] = field(default_factory=dict)
    kernels: list[dict[str, object]] = field(default_factory=list)
    sweep: list[dict[str, object]] = field(default_factory=list)
    overhead: list[dict[str, object]] = field(default_factory=list)
    crossovers: list[dict[str, object]] = field(default_factory=list)
    targets: list[dict[str, object]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    """The sections that the budget left out."""
