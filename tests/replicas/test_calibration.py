"""The sweep over a scripted runner whose clock is its own cost model."""

import pytest

from policies.cost import UNMEASURED, StepCost
from policies.modes import Mode
from replicas.calibration import calibrate, warm_up
from replicas.engine.batch import ScheduledBatch, SegmentOutput
from tests.replicas.engine.scripted import ScriptedRunner

TRUE = StepCost((1, 16, 128, 512), (3.0, 6.0, 20.0, 70.0), segment_ms=0.3, cached_ms=0.9)


class TimedRunner(ScriptedRunner):
    """Forwards take what a cost says by this runner's own clock; the first of each shape more."""

    def __init__(self, cost: StepCost = TRUE, num_pages: int = 600, max_context: int = 2048) -> None:
        super().__init__(num_pages=num_pages, page_size=16, max_context=max_context)
        self.now_s = 0.0
        self.shapes: list[tuple[int, int]] = []
        self._cost = cost

    def clock(self) -> float:
        return self.now_s

    def run(self, batch: ScheduledBatch):
        for segment in batch.segments:
            assert len(segment.pages) * self.spec.page_size >= segment.start + len(segment.token_ids)
            assert max(segment.pages) < self.spec.num_pages
            assert segment.start + len(segment.token_ids) <= self.spec.max_context
        shape = batch.num_tokens, len(batch.segments)
        first = 10.0 if shape not in self.shapes else 1.0
        self.shapes.append(shape)
        num_cached = sum(segment.start for segment in batch.segments)
        self.now_s += first * self._cost.ms(*shape, num_cached) / 1000.0
        return super().run(batch)


def sweep(
    runner: TimedRunner, budget_s: float, max_running: int = 64, max_step_tokens: int = 512
) -> StepCost:
    return calibrate(
        runner,
        max_running=max_running,
        max_step_tokens=max_step_tokens,
        budget_s=budget_s,
        clock=runner.clock,
    )


def test_it_finds_what_forwards_take() -> None:
    found = sweep(TimedRunner(), budget_s=30.0)
    for shape in [(1, 1, 100), (8, 8, 800), (64, 8, 800), (256, 16, 1600), (400, 1, 0)]:
        assert found.ms(*shape) == pytest.approx(TRUE.ms(*shape), rel=0.1)


def test_it_keeps_to_its_budget_and_to_small_shapes_on_a_slow_machine() -> None:
    slow = TimedRunner(TRUE.scaled(20.0))
    found = sweep(slow, budget_s=2.0)
    assert slow.now_s < 3.5
    assert found.ms(1) >= 30.0


def test_without_a_budget_one_forward_scales_the_usual_line() -> None:
    runner = TimedRunner()
    found = sweep(runner, budget_s=0.0)
    assert len(runner.shapes) == 1
    assert found.ms(1) == pytest.approx(30.0)
    assert found.ms(512) / found.ms(1) == pytest.approx(UNMEASURED.ms(512) / UNMEASURED.ms(1))


@pytest.mark.parametrize(
    ("num_pages", "max_context", "max_running"), [(6, 96, 64), (40, 300, 2), (128, 64, 8)]
)
def test_it_keeps_to_context_pages_and_places(num_pages: int, max_context: int, max_running: int) -> None:
    runner = TimedRunner(num_pages=num_pages, max_context=max_context)
    sweep(runner, budget_s=30.0, max_running=max_running, max_step_tokens=128)
    assert max(num_segments for _, num_segments in runner.shapes) <= max_running
    assert max(num_tokens for num_tokens, _ in runner.shapes) <= 128


class Compiles(ScriptedRunner):
    """Has two batches to run before it serves."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, int]] = []
        self.ran: list[ScheduledBatch] = []
        self.batches = tuple(ScheduledBatch((), mode=mode) for mode in (None, Mode.AR))

    def warm_up_batches(self, max_running: int, max_step_tokens: int) -> tuple[ScheduledBatch, ...]:
        self.asked.append((max_running, max_step_tokens))
        return self.batches

    def settle(self) -> None: ...

    def run(self, batch: ScheduledBatch) -> list[SegmentOutput]:
        self.ran.append(batch)
        return []


def test_warming_up_runs_all_that_the_runner_asks_for_by_the_engines_bounds() -> None:
    runner = Compiles()
    warm_up(runner, max_running=7, max_step_tokens=300)
    assert runner.asked == [(7, 300)]
    assert runner.ran == list(runner.batches)
