"""The processes that share a replica's model: rank 0 is the replica itself, the others are actors beside it.

Serve gives a replica a placement group with a bundle for each rank, all on one machine, and ends the group
with the replica; Ray ends the actors when the replica's process goes. So no rank outlives another.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from replicas.config import ReplicaConfig
from replicas.engine.batch import ServingRunner
from replicas.model.lockstep import Leader, Meeting, follow, join
from replicas.runner_loader import load_runner


class TensorParallelWorker:
    """A process of a rank above 0, an actor. Called in this order: join, load, follow."""

    def __init__(self, config: ReplicaConfig, rank: int):
        self._config = config
        self._rank = rank

    def join(self, port: int) -> None:
        join(port, self._rank, self._config.tensor_parallel, self._config.device)

    def load(self) -> None:
        self._runner = load_runner(self._config)

    def follow(self) -> None:
        """Runs the leader's steps; returns when it closes."""
        follow(self._runner)


class Workers:
    """All ranks above 0, which run every step that `runner` runs.

    runner: rank 0's, for the engine.
    """

    def __init__(
        self, runner: Leader, following: Sequence["ray.ObjectRef[None]"], actors: list[ActorHandle[Any]]
    ):
        self.runner = runner
        self._following = following
        self._actors = actors  # Ray ends an actor whose last handle is gone

    @classmethod
    def start(cls, config: ReplicaConfig) -> "Workers":
        """Starts the workers, from the replica's own process. Raises CheckpointError and what a worker's
        start raises."""
        size = config.tensor_parallel
        group = get_current_placement_group()
        if group is None or group.bundle_count < size:
            raise RuntimeError(f"tensor_parallel={size} needs a placement group of as many bundles")
        actors: list[Any] = []  # handles, whose remote methods are not typed
        for rank in range(1, size):
            resources = group.bundle_specs[rank]
            actor = ray.remote(TensorParallelWorker).options(
                num_cpus=resources.get("CPU", 0),
                num_gpus=resources.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
            )
            actors.append(actor.remote(config, rank))
        # A worker that can't even be made is told of before anybody waits for it.
        ray.get([actor.__ray_ready__.remote() for actor in actors])
        meeting = Meeting(size)
        joining = [actor.join.remote(meeting.port) for actor in actors]
        try:
            join(meeting, 0, size, config.device)
        finally:
            _raise_failed(joining)  # why it could not be joined
        loading = [actor.load.remote() for actor in actors]
        runner: ServingRunner = load_runner(config)
        ray.get(loading)
        following = [actor.follow.remote() for actor in actors]
        return cls(Leader(runner), following, actors)

    async def lost(self) -> str:
        """Waits until one of the workers has ended, which none does before `close`; says how."""
        waiting = {asyncio.ensure_future(_end(reference)): reference for reference in self._following}
        ended, others = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for other in others:
            other.cancel()
        rank = 1 + min(self._following.index(waiting[task]) for task in ended)
        return f"the process of rank {rank} of {1 + len(self._following)} ended: {ended.pop().result()}"

    def close(self) -> None:
        """Lets the workers end."""
        self.runner.close()


async def _end(reference: "ray.ObjectRef[None]") -> str:
    try:
        await reference
    except Exception as error:
        return str(error)
    return "it was told to"


def _raise_failed(references: Sequence["ray.ObjectRef[None]"]) -> None:
    """Raises the errors of the calls that have failed by now."""
    done, _ = ray.wait(list(references), num_returns=len(references), timeout=1.0)
    ray.get(done)
