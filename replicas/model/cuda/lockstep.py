"""One runner to the engine, several processes behind it: each runs every step on its part of the model."""

from collections.abc import Sequence

import torch.distributed as dist

from replicas.engine.plan import ModelSpec, Runner, SegmentOutput, StepPlan


class Leader:
    """Rank 0's runner. Every plan goes to the followers before it runs; `close` lets them end.

    A step that fails on one process leaves the others waiting in a collective for up to the group's
    timeout: give `init_process_group` one, and restart all of the processes after it.
    """

    def __init__(self, runner: Runner):
        self._runner = runner

    @property
    def spec(self) -> ModelSpec:
        return self._runner.spec

    def run(self, plan: StepPlan) -> Sequence[SegmentOutput]:
        dist.broadcast_object_list([plan], src=0)
        return self._runner.run(plan)

    def close(self) -> None:
        dist.broadcast_object_list([None], src=0)


def follow(runner: Runner) -> None:
    """The other ranks': runs what the leader runs until it closes."""
    while True:
        received: list[StepPlan | None] = [None]
        dist.broadcast_object_list(received, src=0)
        plan = received[0]
        if plan is None:
            return
        runner.run(plan)
