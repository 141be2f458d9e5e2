"""Several processes behind one runner: each runs every step on its part of the model."""

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from replicas.engine.batch import (
    AheadRunner,
    Begun,
    ModelSpec,
    Runner,
    RunnerLost,
    ScheduledBatch,
    Segment,
    SegmentOutput,
    ServingRunner,
)
from replicas.model.step_changes import Step, StepDecoder, StepEncoder
from replicas.model.step_channel import open_receiver, open_sender, own_place

JOIN_TIMEOUT = timedelta(seconds=120)
"""The first of the processes waits this long for the last one."""
STEP_TIMEOUT = timedelta(seconds=100)
"""A process waits this long in a step for another that lives but does not come; compiling kernels counts."""
_END = b""
"""The message that ends the followers; a step's is never empty."""


class Meeting:
    """The store at which the processes find each other, on a loopback port that rank 0 drew.

    They are on one machine, as tensor parallelism asks for, so no other can reach it.
    """

    def __init__(self, size: int):
        listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = listener.getsockname()[1]
        self.store = TCPStore(
            "127.0.0.1",
            self.port,
            size,
            is_master=True,
            timeout=JOIN_TIMEOUT,
            wait_for_workers=False,
            use_libuv=False,  # which takes no socket of ours
            master_listen_fd=listener.detach(),
        )


def join(meeting: Meeting | int, rank: int, size: int, device: str) -> None:
    """Makes torch.distributed's default group. Waits for the others, JOIN_TIMEOUT at most.

    meeting: rank 0's own for itself, its port for the others

    Steps are computed over NCCL on 'cuda'; what they are goes by replicas.model.step_channel.
    """
    if isinstance(meeting, Meeting):
        store = meeting.store
    else:
        store = TCPStore("127.0.0.1", meeting, size, timeout=JOIN_TIMEOUT, use_libuv=False)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP_TIMEOUT)


@dataclass(frozen=True, slots=True)
class LeadersStep:
    """A step that is begun on all processes: an implementation of replicas.engine.batch.Begun."""

    begun: Begun
    failing: Callable[[], AbstractContextManager[None]]

    def outputs(self, segments: Sequence[Segment]) -> Sequence[SegmentOutput]:
        with self.failing():
            return self.begun.outputs(segments)


class Leader:
    """Rank 0's runner. Every step goes to the followers before it runs; `close` lets them end.

    After a step that failed on any process nobody knows what the others have done, so it is the last one:
    RunnerLost, and all of the processes are to be started again.
    """

    def __init__(self, runner: ServingRunner):
        self._runner = runner
        self._sender = open_sender(STEP_TIMEOUT, own_place())
        self._encoder = StepEncoder()
        self._is_lost = False

    @property
    def spec(self) -> ModelSpec:
        return self._runner.spec

    def warm_up_batches(self, max_running: int, max_step_tokens: int) -> Iterable[ScheduledBatch]:
        yield from self._runner.warm_up_batches(max_running, max_step_tokens)
        if self.spec.runs_ahead:
            for first, then in cast("AheadRunner", self._runner).following_pairs():
                self.begin(then, self.begin(first, None))

    def settle(self) -> None:
        """Gives back this process's memory; the followers keep theirs."""
        self._runner.settle()

    def run(self, batch: ScheduledBatch) -> Sequence[SegmentOutput]:
        with self._failing():
            self._send(batch, None)
            return self._runner.run(batch)

    def begin(self, batch: ScheduledBatch, before: "LeadersStep | None") -> "LeadersStep":
        runner = cast("AheadRunner", self._runner)
        with self._failing():
            self._send(batch, before)
            return LeadersStep(runner.begin(batch, None if before is None else before.begun), self._failing)

    def can_be_followed(self, segment: Segment) -> bool:
        return cast("AheadRunner", self._runner).can_be_followed(segment)

    def _send(self, batch: ScheduledBatch, before: "LeadersStep | None") -> None:
        self._sender.send(self._encoder.encode(Step(batch, before is not None)))

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._is_lost = True
            raise RunnerLost(f"a step failed on a part of the model: {error}") from error

    def close(self) -> None:
        """Ends the followers. Does nothing after RunnerLost, when they may never come for it."""
        if not self._is_lost:
            self._sender.send(_END)


def follow(runner: Runner) -> None:
    """Runs on every other rank what the leader runs, until it closes. Raises what a step raises."""
    receiver, decoder = open_receiver(own_place()), StepDecoder()
    ahead = cast("AheadRunner", runner) if runner.spec.runs_ahead else None
    begun: Begun | None = None
    while message := receiver.receive():
        step = decoder.decode(message)
        if ahead is None:
            runner.run(step.batch)
        else:
            begun = ahead.begin(step.batch, begun if step.follows else None)
