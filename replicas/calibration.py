"""What a replica does before it serves, through its Runner: it warms up, then measures what forwards of some
shapes take."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from policies.cost import UNMEASURED, ForwardStats, StepCost
from policies.cost_fit import fit_step_cost, knots_up_to
from replicas.engine.batch import ModelSpec, Runner, ScheduledBatch, Segment, ServingRunner
from replicas.messages import SamplingParams
from replicas.progress import logged

logger = logging.getLogger(__name__)

NUM_CACHED = (0, 256)
NUM_SEQUENCES = (4, 16, 64)
BLOCKS = (1, 8, 16)
MANY_CACHED = 64
MIN_SHAPES = 4
"""The number of shapes below which no line is fitted: the usual one is scaled to them."""


@dataclass(frozen=True, slots=True)
class StepOverhead:
    """The milliseconds of a step beside its forward, as replicas.overhead finds them."""

    step_ms: float = 0.0
    """Of any step."""
    segment_ms: float = 0.0
    """Of each of its segments."""
    row_ms: float = 0.0
    """Of each row whose logits are sampled."""

    def ms(self, num_segments: int, num_rows: int) -> float:
        return self.step_ms + self.segment_ms * num_segments + self.row_ms * num_rows


NO_OVERHEAD = StepOverhead()


@dataclass(frozen=True, slots=True)
class Shape:
    """A forward to time: num_segments sequences of num_tokens query tokens each, after num_cached cached
    ones."""

    num_segments: int
    num_tokens: int
    num_cached: int

    @property
    def total(self) -> int:
        return self.num_segments * self.num_tokens

    @property
    def num_wanted(self) -> int:
        """The rows of each segment that are sampled: all as in a verify, or a long prompt's last."""
        return self.num_tokens if self.num_segments > 1 or self.num_tokens <= MANY_CACHED else 1


def warm_up(runner: ServingRunner, *, max_running: int, max_step_tokens: int) -> None:
    """Runs what the runner needs to have run before it serves, and logs how far it has come."""
    batches = tuple(runner.warm_up_batches(max_running, max_step_tokens))
    for batch in logged(batches, len(batches), "warming up", logger):
        runner.run(batch)


def calibrate(
    runner: Runner,
    *,
    max_running: int,
    max_step_tokens: int,
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> StepCost:
    """Returns the cost of a forward alone as sweep() finds it here and now."""
    forwards = sweep(
        runner, max_running=max_running, max_step_tokens=max_step_tokens, budget_s=budget_s, clock=clock
    )
    return forward_cost(forwards, max_step_tokens)


def sweep(
    runner: Runner,
    *,
    max_running: int,
    max_step_tokens: int,
    budget_s: float,
    overhead: StepOverhead = NO_OVERHEAD,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[ForwardStats, ...]:
    """Measures for about budget_s seconds, a forward of one token at the least; the least of each shape.

    overhead: what a step takes beside its forward, which is added to each.

    Before anything is served: it writes garbage into the K/V pages. Small shapes come first, every
    shape before any comes again, and one that would by the last one's pace overrun is left out.
    """
    deadline_s = clock() + budget_s
    shapes = sorted(_shapes(runner.spec, max_running, max_step_tokens), key=lambda shape: shape.total)
    turns: list[list[ForwardStats]] = []
    while not turns or (clock() < deadline_s and len(turns) < 4):
        measured: list[ForwardStats] = []
        turns.append(measured)
        for shape in shapes:
            pace_ms = measured[-1].ms / measured[-1].num_tokens if measured else 0.0
            if measured and clock() + pace_ms * shape.total / 1000.0 > deadline_s:
                break
            plan = _plan(runner.spec, shape)
            began_s = clock()
            runner.run(plan)
            ms = max(1000.0 * (clock() - began_s), 1e-3)
            ms += overhead.ms(shape.num_segments, shape.num_segments * shape.num_wanted)
            num_cached = shape.num_segments * shape.num_cached
            measured.append(ForwardStats(shape.total, shape.num_segments, num_cached, ms))
    return merged(*turns)


def merged(*turns: Iterable[ForwardStats]) -> tuple[ForwardStats, ...]:
    """Returns the least of each shape: whatever else the machine does, and compiling at first, only adds."""
    least: dict[tuple[int, int, int], ForwardStats] = {}
    for forward in chain(*turns):
        shape = forward.num_tokens, forward.num_segments, forward.num_cached
        if shape not in least or forward.ms < least[shape].ms:
            least[shape] = forward
    return tuple(least.values())


def forward_cost(forwards: Sequence[ForwardStats], max_step_tokens: int) -> StepCost:
    """Fits a cost to a sweep; where it has too few shapes for that, scales the usual one."""
    if len({forward.num_tokens for forward in forwards}) < MIN_SHAPES:
        last = max(forwards, key=lambda forward: forward.num_tokens)
        usual = UNMEASURED.scaled(last.ms / UNMEASURED.ms(last.num_tokens))
        knots = knots_up_to(max_step_tokens)
        return StepCost(knots, tuple(usual.ms(knot) for knot in knots))
    return fit_step_cost(forwards, knots_up_to(max_step_tokens))


def _shapes(spec: ModelSpec, max_running: int, max_step_tokens: int) -> Iterator[Shape]:
    """The shapes that context, pages and the step's limits have room for."""
    lengths = [length for length in knots_up_to(max_step_tokens) if length <= max_step_tokens]
    shapes = [Shape(1, length, cached) for cached in NUM_CACHED for length in lengths]
    shapes += [Shape(num, block, MANY_CACHED) for num in NUM_SEQUENCES for block in BLOCKS]
    for shape in shapes:
        per_sequence = shape.num_tokens + shape.num_cached
        num_pages = shape.num_segments * -(-per_sequence // spec.page_size)
        fits = per_sequence <= spec.max_context and num_pages <= spec.num_pages
        if fits and shape.num_segments <= max_running and shape.total <= max_step_tokens:
            yield shape


def _plan(spec: ModelSpec, shape: Shape) -> ScheduledBatch:
    """A batch of the shape, of causal segments."""
    per_sequence = -(-(shape.num_tokens + shape.num_cached) // spec.page_size)
    token_ids = tuple((7 * index + 3) % spec.vocab_size for index in range(shape.num_tokens))
    wanted = tuple(range(shape.num_tokens))[-shape.num_wanted :]
    return ScheduledBatch(
        tuple(
            Segment(
                seq_id=number,
                start=shape.num_cached,
                token_ids=token_ids,
                pages=tuple(range(number * per_sequence, (number + 1) * per_sequence)),
                num_causal=shape.num_tokens,
                adapter=False,
                wanted=wanted,
                sampling=SamplingParams(),
            )
            for number in range(shape.num_segments)
        )
    )
