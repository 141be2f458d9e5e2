"""Blocks of diffusion begun in the commit of the one before, against one after the other: `python -m
benchmarks.overlap [--json PATH]`.

The engine alone, in this process, with the embedded checkpoint and held-out prompts of its task families.
Both ways take turns at each block and concurrency; the median turn counts. Exact: the share of answers that
the task's own checker accepts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.modes import CHECKPOINT
from policies.modes import Mode
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.engine.sequence import Sequence
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec
from training.tasks.family import Task
from training.tasks.registry import FAMILIES, held_out_tasks

BLOCKS = (8, 16, 32)
MAX_TOKENS = 320


def measure(
    runner: TorchRunner,
    codec: TextCodec,
    tasks: list[Task],
    block_length: int,
    concurrency: int,
    overlaps: bool,
) -> tuple[float, float, float]:
    """Tokens a second, tokens a forward and the share of right answers."""
    engine = Engine(
        runner, EngineConfig(max_running=concurrency, max_waiting=len(tasks), overlap_blocks=overlaps)
    )
    options = DecodingOptions(Mode.DIFFUSION, block_length)
    sampling = SamplingParams(max_tokens=MAX_TOKENS)
    asked = [codec.encode(({"role": "user", "content": task.prompt},)) for task in tasks]
    sequences = [engine.submit(str(number), prompt, sampling, options) for number, prompt in enumerate(asked)]
    began_s = time.perf_counter()
    while engine.has_work:
        engine.step()
    took_s = time.perf_counter() - began_s
    num_right = sum(
        sequence.tokens[-1] in engine.spec.eos_token_ids
        and FAMILIES[task.family].check(task.params, _text(codec, sequence))
        for task, sequence in zip(tasks, sequences, strict=True)
    )
    num_tokens = engine.scheduler.counters.num_tokens
    num_forwards = sum(sequence.num_forwards for sequence in sequences)
    return num_tokens / took_s, num_tokens / num_forwards, num_right / len(tasks)


def _text(codec: TextCodec, sequence: Sequence) -> str:
    stream = codec.stream()
    return stream.push(tuple(sequence.tokens[sequence.num_prompt_tokens :])) + stream.finish()


def rows(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    runner = TorchRunner.load(str(CHECKPOINT), num_threads=options.threads)
    codec = TextCodec.load(str(CHECKPOINT))
    by_family = [list(held_out_tasks(family, options.tasks)) for family in FAMILIES]
    tasks = [task for row in zip(*by_family, strict=True) for task in row]
    measure(runner, codec, tasks[:8], 16, 4, True)  # warm-up
    for block_length in BLOCKS:
        for concurrency in options.concurrency:
            turns = [
                [measure(runner, codec, tasks, block_length, concurrency, way) for way in (True, False)]
                for _ in range(options.turns)
            ]
            begun, apart = zip(*turns, strict=True)
            rates = [statistics.median(rate for rate, _, _ in found) for found in (begun, apart)]
            yield {
                "block_length": block_length,
                "concurrency": concurrency,
                "ratio": round(rates[0] / rates[1], 2),
                "tokens_per_s": [round(rate, 1) for rate in rates],
                "tokens_per_forward": [round(found[0][1], 2) for found in (begun, apart)],
                "exact": [round(found[0][2], 4) for found in (begun, apart)],
                "turns": [[round(rate, 1) for rate, _, _ in found] for found in (begun, apart)],
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=8, help="of each of the 13 families")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    print(f"CPU, {options.threads} threads, float32; begun in the commit / one after the other")
    found = []
    for row in rows(options):
        found.append(row)
        print(json.dumps(row), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
