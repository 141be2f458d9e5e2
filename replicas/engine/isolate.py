"""Finds the segments at fault for a failed forward by running it again in parts. No state, no torch.

That they can be run again is part of what a Runner is: K/V goes to the same slots, and what is sampled
depends on the segment alone. A segment that fails by itself is at fault, unless the runner can't even run
a segment of nobody's.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq

from replicas.engine.batch import RunnerLost, ScheduledBatch, Segment, SegmentOutput
from replicas.messages import SamplingParams

Run = Callable[[ScheduledBatch], Seq[SegmentOutput]]

FORWARDS_A_HALVING = 4
"""Finding one segment at fault takes two forwards a halving, and so two are found at once."""


def failed(error: Exception) -> SegmentOutput:
    """The output of a segment whose forward raised."""
    return SegmentOutput((), (), failure=f"the model's forward failed ({type(error).__name__})")


def max_forwards(num_segments: int) -> int:
    """The number of further forwards that a failed one of so many segments may cost."""
    return FORWARDS_A_HALVING * (num_segments - 1).bit_length()


def run_apart(run: Run, batch: ScheduledBatch, error: Exception) -> list[SegmentOutput | None]:
    """The output of each segment of a batch that raised `error` as a whole, found by halving.

    `failed` for those that raise alone; None for those that were not run before max_forwards() were
    spent, which is so where many are at fault: they are to be scheduled again. Raises RunnerLost.
    """
    segments = batch.segments
    outputs: list[SegmentOutput | None] = [None] * len(segments)
    forwards_left = max_forwards(len(segments))
    suspects: list[range] = []

    def suspect(indices: range, raised: Exception) -> None:
        if len(indices) == 1:
            outputs[indices[0]] = failed(raised)
        else:
            suspects.append(indices)

    suspect(range(len(segments)), error)
    while suspects:
        indices = suspects.pop()
        middle = len(indices) // 2
        for half in (indices[middle:], indices[:middle]):  # what is at fault in the first is found first
            if forwards_left == 0:
                return outputs
            forwards_left -= 1
            try:
                made = run(ScheduledBatch(tuple(segments[index] for index in half)))
            except RunnerLost:
                raise
            except Exception as again:
                suspect(half, again)
            else:
                for index, output in zip(half, made, strict=True):
                    outputs[index] = output
    return outputs


def nobodys_segment(page: int) -> Segment:
    """A segment of one token without a past, in a page of nobody's: a runner that can't run it can run
    nothing."""
    return Segment(-1, 0, (0,), (page,), 1, adapter=False, wanted=(0,), sampling=SamplingParams())


def is_sticky(error: Exception) -> bool:
    """True if a device that raised this will go on to, as a CUDA context does after a kernel's fault.

    By name, since the engine knows no torch: torch.AcceleratorError, which was a RuntimeError that said "CUDA
    error". Memory that ran out comes back.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    says_so = "AcceleratorError" in kinds or "CUDA error" in str(error)
    return says_so and "OutOfMemoryError" not in kinds and "out of memory" not in str(error)
