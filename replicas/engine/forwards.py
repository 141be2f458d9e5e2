"""Runs the steps that a scheduler makes, ahead of their turn where the runner can; blames what fails."""

import logging
import threading
import time
from collections.abc import Sequence as Seq
from typing import cast

from replicas.engine.batch import AheadRunner, Begun, Runner, RunnerLost, ScheduledBatch, SegmentOutput
from replicas.engine.isolate import is_sticky, nobodys_segment, run_apart
from replicas.engine.scheduler import Scheduler

MAX_FAILED = 3
"""Steps in a row in which a runner could not even run nobody's segment, after which it is lost."""
MAX_FRUITLESS = 32
"""Steps in a row in which it could run nobody's segment, but none of a request, after which it is lost."""

logger = logging.getLogger(__name__)


class HostTime:
    """CPU time of the thread that runs forwards, beside them; entered for each forward."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """CPU seconds so far between one forward and the next one of the same thread."""
        self._thread_id: int | None = None
        self._ended_s = 0.0

    def __enter__(self) -> None:
        if threading.get_ident() == self._thread_id:
            self.seconds += time.thread_time() - self._ended_s

    def __exit__(self, *error: object) -> None:
        self._thread_id, self._ended_s = threading.get_ident(), time.thread_time()


class Forwards:
    """The forwards of an engine, one a step: `schedule`, then `run` what that gave."""

    def __init__(self, runner: Runner, scheduler: Scheduler):
        self._runner = runner
        self._ahead = cast("AheadRunner", runner) if runner.spec.runs_ahead else None
        self._scheduler = scheduler
        self.host_time = HostTime()
        """What was not spent in forwards; on a device that runs ahead, in waiting for them."""
        self._begun: Begun | None = None  # the forward of the step under way, where it is begun already
        self._num_failed = self._num_fruitless = 0  # steps in a row, as for MAX_FAILED and MAX_FRUITLESS

    def schedule(self) -> ScheduledBatch:
        """The next step: the one begun ahead, unless nothing of that is of use any more; without segments
        where there is nothing to do."""
        if self._begun is not None:
            batch = self._scheduler.resume()
            if batch.segments:
                return batch
            self._begun = None
        return self._scheduler.schedule()

    def run(self, batch: ScheduledBatch) -> tuple[Seq[SegmentOutput | None], bool]:
        """Runs the step, and begins the one after it if its runner runs ahead; returns the outputs, and
        whether one forward gave them all. Raises RunnerLost.

        Where a forward fails, its segments are run again in parts, so that those at fault end alone. Where
        the runner can run nothing, no segment is at fault: all are to be scheduled again.
        """
        runner = self._ahead
        following = None if runner is None else self._scheduler.schedule_ahead(runner.can_be_followed)
        try:
            if runner is None:
                with self.host_time:
                    outputs = self._runner.run(batch)
            else:
                outputs = self._wait(runner, batch, following)
        except RunnerLost:
            raise
        except Exception as error:
            logger.exception("a forward of %d sequences failed", len(batch.segments))
            self._begun = None
            self._scheduler.drop_ahead()
            return self._run_apart(batch, error), False
        self._num_failed = self._num_fruitless = 0
        return outputs, True

    def _wait(
        self, runner: AheadRunner, batch: ScheduledBatch, following: ScheduledBatch | None
    ) -> Seq[SegmentOutput]:
        """Begins the step, where it is not begun yet, and the one that follows it, if any; then waits for
        the first."""
        begun = self._begun or runner.begin(batch, None)
        self._begun = None
        if following is not None:
            try:
                self._begun = runner.begin(following, begun)
            except RunnerLost:
                raise
            except Exception:
                logger.exception("a forward of %d sequences can't be begun", len(following.segments))
                self._scheduler.drop_ahead()  # what can't be run is told once it is scheduled anew
        with self.host_time:
            return begun.outputs(batch.segments)

    def _run_apart(self, batch: ScheduledBatch, error: Exception) -> Seq[SegmentOutput | None]:
        if not self._runs_at_all():
            return (None,) * len(batch.segments)
        apart = run_apart(self._runner.run, batch, error)
        if any(output is not None and output.failure is None for output in apart):
            self._num_fruitless = 0
        else:
            self._num_fruitless += 1
            if self._num_fruitless == MAX_FRUITLESS:
                raise RunnerLost(f"no segment of {MAX_FRUITLESS} steps could be run: {error}") from error
        return apart

    def _runs_at_all(self) -> bool:
        """True if the runner runs a segment that is nobody's, which is tried after a failed forward.

        Raises RunnerLost after MAX_FAILED steps in a row in which that failed too, and at once where the
        device says that it will go on to.
        """
        page = self._scheduler.spare_page()
        if page is None:
            return True  # as far as can be told
        try:
            self._runner.run(ScheduledBatch((nobodys_segment(page),)))
        except RunnerLost:
            raise
        except Exception as error:
            self._num_failed += 1
            if is_sticky(error) or self._num_failed == MAX_FAILED:
                message = f"{self._num_failed} forwards in a row failed, whatever they ran: {error}"
                raise RunnerLost(message) from error
            return False
        self._num_failed = 0
        return True
