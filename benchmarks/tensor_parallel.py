"""What two processes that share a model tell each other in a step: `python -m benchmarks.tensor_parallel`.

The steps are all those of an engine that serves `triad-5m`. Each is sent to the other process as a pickle
over gloo and as what has changed through shared memory, in turns, and for each the tokens of random logits of
its rows are chosen from gathered rows and from each process's most probable ones, in turns. Times are
medians, bytes means.
"""

import argparse
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch
import torch.distributed as dist

from benchmarks.machine import ROOT
from benchmarks.modes import CHECKPOINT
from benchmarks.tables import table
from policies.modes import Mode
from replicas.config import EngineConfig
from replicas.engine.batch import ScheduledBatch, Segment, SegmentOutput
from replicas.engine.engine import Engine
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.lockstep import STEP_TIMEOUT, Meeting, join
from replicas.model.logit_rules import Row
from replicas.model.parallel import Parallel, VocabPart
from replicas.model.runner import TorchRunner, rows_of
from replicas.model.sampler import sample
from replicas.model.split_sampler import SplitSampler
from replicas.model.step_changes import Step, StepDecoder, StepEncoder
from replicas.model.step_channel import open_receiver, open_sender, own_place

OPTIONS = (
    DecodingOptions(Mode.AR),
    DecodingOptions(Mode.SELF_SPECULATION, 16),
    DecodingOptions(Mode.DIFFUSION, 32),
)
CONCURRENCIES = (1, 16, 64)
PROMPT_TOKENS, MAX_TOKENS = 200, 100
FLOAT_BYTES, BEST_BYTES = 4, 24
"""Of a logit, and of a row's most probable token, its logit and the log-sum."""


class Recorder:
    """A runner that keeps the batches it runs."""

    def __init__(self, runner: TorchRunner):
        self._runner = runner
        self.spec = runner.spec
        self.batches: list[ScheduledBatch] = []

    def run(self, batch: ScheduledBatch) -> Sequence[SegmentOutput]:
        self.batches.append(batch)
        return self._runner.run(batch)


@dataclass(frozen=True, slots=True)
class Load:
    """The steps of an engine that serves so many requests of one kind, from their prompts on."""

    mode: Mode
    num_requests: int
    batches: tuple[ScheduledBatch, ...]

    @property
    def label(self) -> str:
        return f"`{self.mode.value}`, {self.num_requests}"


def recorded() -> Iterator[Load]:
    runner = TorchRunner.load(str(CHECKPOINT), num_pages=2500, num_threads=1)
    for options in OPTIONS:
        for num_requests in CONCURRENCIES:
            recorder = Recorder(runner)
            engine = Engine(recorder, EngineConfig(max_running=num_requests))
            for number in range(num_requests):
                prompt = [10 + (7 * number + at) % 900 for at in range(PROMPT_TOKENS)]
                sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
                engine.submit(str(number), prompt, sampling, options)
            while engine.has_work:
                engine.step()
            assert options.mode is not None
            yield Load(options.mode, num_requests, tuple(recorder.batches))


def timed_s(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


class Ways:
    """Both ways of a step and of a choice, as one of the two processes takes them."""

    def __init__(self, rank: int):
        runner = TorchRunner.load(str(CHECKPOINT), num_pages=16, num_threads=1)
        spec = runner.spec
        self._rank = rank
        self._parallel = Parallel(rank, 2)
        self._vocab_size, self._mask, self._ends = spec.vocab_size, spec.mask_token_id, spec.eos_token_ids
        self._width = VocabPart.of(spec.vocab_size, self._parallel).width
        self._split = SplitSampler(spec.vocab_size, spec.mask_token_id, spec.eos_token_ids, self._parallel)
        self._generator = torch.Generator().manual_seed(rank)

    def gather_s(self, rows: Sequence[Row]) -> float:
        """The time until all tokens are chosen from gathered rows."""
        part = torch.randn(len(rows), self._width, generator=self._generator)

        def choose() -> None:
            whole = self._parallel.gather(part, self._vocab_size)
            if self._rank == 0:
                sample(whole, rows, self._mask, self._ends)

        dist.barrier()
        return timed_s(choose)

    def best_s(self, rows: Sequence[Row]) -> float:
        """The time until they are chosen of each process's most probable ones."""
        part = torch.randn(len(rows), self._width, generator=self._generator)
        dist.barrier()
        return timed_s(lambda: self._split.sample(part, rows, range(len(rows))))


def rows_in(segments: Sequence[Segment]) -> list[Row]:
    return [row for segment in segments for row in rows_of(segment)]


def lead(port: Meeting, loads: Sequence[Load]) -> Iterator[Sequence[str]]:
    """A table's line for each load."""
    join(port, 0, 2, "cpu")
    dist.broadcast_object_list([loads], src=0)
    ways, sender = Ways(0), open_sender(STEP_TIMEOUT, own_place())
    for load in loads:
        encoder = StepEncoder()
        begun: dict[str, list[float]] = {"gloo": [], "shared": []}
        taken: dict[str, list[float]] = {"gloo": [], "shared": [], "gather": [], "best": []}
        sizes: dict[str, list[int]] = {"gloo": [], "shared": []}
        for batch in load.batches:
            step = Step(batch, False)
            dist.barrier()
            begun["gloo"].append(time.perf_counter())
            dist.broadcast_object_list([step], src=0)
            taken["gloo"].append(time.perf_counter() - begun["gloo"][-1])
            sizes["gloo"].append(len(pickle.dumps(step)))
            dist.barrier()
            begun["shared"].append(time.perf_counter())
            message = encoder.encode(step)
            sender.send(message)
            taken["shared"].append(time.perf_counter() - begun["shared"][-1])
            sizes["shared"].append(len(message))
            if rows := rows_in(batch.segments):
                taken["gather"].append(ways.gather_s(rows))
                taken["best"].append(ways.best_s(rows))
        ended: list[dict[str, list[float]]] = [{}]
        dist.broadcast_object_list(ended, src=1)  # the same clock in all processes of a host
        reached = {
            way: [end - begin for begin, end in zip(begun[way], ended[0][way], strict=True)] for way in begun
        }
        num_rows = fmean(len(rows_in(batch.segments)) for batch in load.batches)
        width = VocabPart.of(ways._vocab_size, Parallel(0, 2)).width
        yield (
            load.label,
            f"{fmean(sizes['gloo']):,.0f} → {fmean(sizes['shared']):,.0f}",
            *(
                f"{1e6 * median(times[before]):,.0f} → {1e6 * median(times[after]):,.0f}"
                for times, before, after in (
                    (taken, "gloo", "shared"),
                    (reached, "gloo", "shared"),
                    (taken, "gather", "best"),
                )
            ),
            f"{num_rows * width * FLOAT_BYTES:,.0f} → {num_rows * BEST_BYTES:,.0f}",
        )


def follow(port: int) -> None:
    join(port, 1, 2, "cpu")
    received: list[Sequence[Load]] = [()]
    dist.broadcast_object_list(received, src=0)
    ways, receiver = Ways(1), open_receiver(own_place())
    for load in received[0]:
        decoder = StepDecoder()
        ended: dict[str, list[float]] = {"gloo": [], "shared": []}
        for batch in load.batches:
            step: list[Step | None] = [None]
            dist.barrier()
            dist.broadcast_object_list(step, src=0)
            ended["gloo"].append(time.perf_counter())
            dist.barrier()
            came = decoder.decode(receiver.receive())
            ended["shared"].append(time.perf_counter())
            assert came == step[0]
            if rows := rows_in(batch.segments):
                ways.gather_s(rows)
                ways.best_s(rows)
        dist.broadcast_object_list([ended], src=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.port is not None:
        follow(arguments.port)
    else:
        loads = tuple(recorded())
        meeting = Meeting(2)
        command = [sys.executable, "-m", "benchmarks.tensor_parallel", "--port", str(meeting.port)]
        follower = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            lines = list(lead(meeting, loads))
        finally:
            follower.kill()
            follower.wait()
        head = (
            "mode, requests",
            "bytes a step",
            "leader's µs to send it",
            "µs until the follower has it",
            "µs until tokens are chosen",
            "bytes of logits a process sends",
        )
        print(table(head, lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
