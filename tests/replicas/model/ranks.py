"""Functions that several processes run together: `python ranks.py <name> <rank> <size> [<port>]`.

Rank 0 prints the port to meet at, and is given no port. What a function prints is for the test.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from replicas.messages import SamplingParams
from replicas.model.lockstep import Meeting, join
from replicas.model.logit_rules import Row
from replicas.model.parallel import Parallel, VocabPart
from replicas.model.sampler import sample
from replicas.model.split_sampler import SplitSampler
from replicas.model.step_channel import Place, open_receiver, open_sender, own_place

ROOT = Path(__file__).parents[3]
TIMEOUT = timedelta(seconds=60)
MESSAGES = (b"a", bytes(range(256)) * 40_000, b"b" * (4 << 20), b"c")
"""Two of them are longer than what may be under way."""


@contextmanager
def ranks(name: str, size: int) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of a function, which are killed at the end if they are still there."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(rank: int, *port: str) -> subprocess.Popen[str]:
        command = [sys.executable, __file__, name, str(rank), str(size), *port]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    with ExitStack() as stack:
        started: list[subprocess.Popen[str]] = []
        port: list[str] = []
        for rank in range(size):
            started.append(start(rank, *port))
            stack.callback(started[-1].wait)
            stack.callback(started[-1].kill)
            if rank == 0:
                port = [started[0].stdout.readline().strip()]
        yield started


def channel(rank: int, place: Place | None) -> None:
    """Rank 0 sends the messages, waits for a line of input, and is gone; the others tell what came."""
    if rank == 0:
        sender = open_sender(TIMEOUT, place)
        for message in MESSAGES:
            sender.send(message)
        print(type(sender).__name__, flush=True)
        sys.stdin.readline()
        return
    receiver = open_receiver(place)
    print(*(receiver.receive() == message for message in MESSAGES), flush=True)
    try:
        receiver.receive()
    except (ConnectionError, RuntimeError):
        print("gone", flush=True)


def split_choice(rank: int, size: int) -> None:
    """Rank 0 prints for how many rows a choice from split logits was not the one from whole ones."""
    num_wrong = num_rows = num_odd = 0
    parallel = Parallel(rank, size)
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        vocab = int(torch.randint(3, 70, (), generator=generator))
        mask = [None, 0, vocab - 1][seed % 3]
        logits, rows, greedy = _some_rows(generator, vocab, dtype=(torch.float32, torch.bfloat16)[seed % 2])
        part = VocabPart.of(vocab, parallel)
        padded = torch.nn.functional.pad(logits, (0, size * part.width - vocab))
        own = padded[:, part.first : part.first + part.width].clone()
        found = SplitSampler(vocab, mask, {1}, parallel).sample(own, rows, greedy)
        if found is None:
            continue
        tokens, probs, ranked = sample(logits.clone(), rows, mask, {1})
        assert found[2].keys() == ranked.keys()
        for index, (token, prob) in enumerate(zip(tokens, probs, strict=True)):
            is_finite = prob == prob and abs(prob) < torch.inf
            num_odd += not is_finite
            close = (
                abs(found[1][index] - prob) <= 1e-5 * prob
                if is_finite
                else found[1][index] != found[1][index]
            )
            num_wrong += not (close and (not is_finite or found[0][index] == token))
            num_wrong += repr(ranked.get(index)) != repr(found[2].get(index))  # NaN is alike here
            num_rows += 1
    if rank == 0:
        print(num_wrong, num_rows > 500, num_odd > 20, flush=True)


def _some_rows(
    generator: torch.Generator, vocab: int, dtype: torch.dtype
) -> tuple[torch.Tensor, list[Row], list[int]]:
    """Rows with equal largest logits, with NaN and infinities, of any sampling."""

    def draw(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    rows, greedy = [], []
    logits = (torch.randn(draw(9) + 1, vocab, generator=generator) * 3).round().to(dtype)
    for index, line in enumerate(logits):
        for value in (torch.nan, torch.inf, -torch.inf):
            if not draw(12):
                line[draw(vocab)] = value
        if not draw(12):
            line.fill_(-torch.inf)
        kind = draw(6)
        samplings = (
            SamplingParams(temperature=0.8, seed=index),
            SamplingParams(logprobs=3),
            SamplingParams(logit_bias=((draw(vocab), 2.0),)),
        )
        sampling = samplings[kind] if kind < len(samplings) else SamplingParams()
        if kind >= len(samplings):
            greedy.append(index)
        rows.append(Row(sampling, 5))
    return logits, rows, greedy


def main() -> None:
    name, rank, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if rank == 0:
        meeting = Meeting(size)
        print(meeting.port, flush=True)
        join(meeting, rank, size, "cpu")
    else:
        join(int(sys.argv[4]), rank, size, "cpu")
    functions = {
        "ring": lambda: channel(rank, own_place()),
        "gloo": lambda: channel(rank, None if rank == size - 1 else own_place()),
        "split_choice": lambda: split_choice(rank, size),
    }
    functions[name]()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
