"""A forward against its lower bounds on this machine: `python -m benchmarks.floor --checkpoint <folder>`.

In one run, turn by turn: reading all weights of a forward once; its linear layers alone, as torch runs them
prepacked and as the native forward does, with int8 weights too; and of the checkpoint as it is and in int8,
forwards with sampling and the engine's tokens a second. Every figure is the fastest turn, since other work on
the machine only ever adds. `--cpu-time` counts the process's CPU time on one thread instead of wall time,
which is the figure to trust on a busy machine.
"""

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.modes import CHECKPOINT
from policies.modes import Mode
from replicas.config import EngineConfig
from replicas.engine.batch import ScheduledBatch, Segment
from replicas.engine.engine import Engine
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.checkpoint import DTYPES
from replicas.model.config import ModelConfig
from replicas.model.linear import make_linear
from replicas.model.native import structures
from replicas.model.native.build import load_library
from replicas.model.native.model import BLOCK, pack, pack_codes, quantize
from replicas.model.runner import TorchRunner

ROWS = (1, 4, 16, 32, 64)
NUM_CACHED = 150
CONCURRENCY = (1, 4, 16, 32)
NUM_NEW = 48
GREEDY = SamplingParams(max_tokens=1)


class Matrices:
    """Random weights of a model's shapes, packed as torch's forward has them and for the native forward."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, num_threads: int):
        attention = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        layer = [
            (attention, config.hidden_size),
            (config.hidden_size, config.num_heads * config.head_dim),
            (2 * config.intermediate_size, config.hidden_size),
            (config.hidden_size, config.intermediate_size),
        ]
        shapes = layer * config.num_layers + [(config.vocab_size, config.hidden_size)]
        self._bfloat16 = ctypes.c_int64(dtype is torch.bfloat16)
        weights = [torch.randn(shape).to(dtype) for shape in shapes]
        self._packed = [pack(weight) for weight in weights]
        self._codes = []
        for weight in weights:
            codes, scales = quantize(weight)
            self._codes.append((pack_codes(codes, dtype), F.pad(scales, (0, -len(scales) % BLOCK))))
        self._matrices = {
            "native": [
                structures.Matrix(p.data_ptr(), None, *s) for p, s in zip(self._packed, shapes, strict=True)
            ],
            "int8": [
                structures.Matrix(codes.data_ptr(), scales.data_ptr(), *s)
                for (codes, scales), s in zip(self._codes, shapes, strict=True)
            ],
        }
        self._torch = [make_linear(weight) for weight in weights]
        self._inputs = {(r, k): torch.randn(r, k).to(dtype) for r in ROWS for _, k in shapes}
        self._outputs = {(r, n): torch.empty(r, -(-n // BLOCK) * BLOCK) for r in ROWS for n, _ in shapes}
        self._library = load_library()
        self._context = ctypes.c_void_p(self._library.triad_open(ctypes.c_int64(num_threads)))
        self.num_bytes = sum(packed.nbytes for packed in self._packed)

    def read(self) -> None:
        for packed in self._packed:
            pointer = ctypes.c_void_p(packed.data_ptr())
            self._library.triad_read(self._context, pointer, ctypes.c_int64(packed.nbytes))

    def native(self, rows: int, weights: str) -> None:
        for matrix in self._matrices[weights]:
            x, y = self._inputs[rows, matrix.k], self._outputs[rows, matrix.n]
            self._library.triad_linear(
                self._context,
                self._bfloat16,
                ctypes.byref(matrix),
                ctypes.c_void_p(x.data_ptr()),
                ctypes.c_int64(rows),
                ctypes.c_void_p(y.data_ptr()),
            )

    def by_torch(self, rows: int) -> None:
        """Runs the products as torch's forward has them: prepacked by oneDNN, where it can the dtype."""
        for linear, matrix in zip(self._torch, self._matrices["native"], strict=True):
            linear(self._inputs[rows, matrix.k])


def steps(num_sequences: int, num_tokens: int, page_size: int, causal: bool) -> ScheduledBatch:
    """A step of sequences with NUM_CACHED tokens cached; a causal one wants its last row, a draft all."""
    pages = -(-(NUM_CACHED + num_tokens) // page_size)
    wanted = (num_tokens - 1,) if causal else tuple(range(num_tokens))
    return ScheduledBatch(
        tuple(
            Segment(
                seq_id=i,
                start=NUM_CACHED,
                token_ids=(7,) * num_tokens,
                pages=tuple(range(i * pages, (i + 1) * pages)),
                num_causal=num_tokens if causal else 0,
                adapter=False,
                wanted=wanted,
                sampling=GREEDY,
            )
            for i in range(num_sequences)
        )
    )


def generate(runner: TorchRunner, num_sequences: int) -> None:
    """Generates NUM_NEW tokens for each sequence after a prompt of 16, from submission to the last."""
    engine = Engine(runner, EngineConfig(max_running=num_sequences))
    for i in range(num_sequences):
        sampling = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True)
        engine.submit(str(i), list(range(50 + i, 66 + i)), sampling, DecodingOptions(Mode.AR))
    while engine.has_work:
        engine.step()


def measure(
    tasks: dict[str, Callable[[], object]], num_turns: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Milliseconds by name, each the fastest of its turns."""
    fastest: dict[str, float] = {}
    for _ in range(num_turns):
        for name, task in tasks.items():
            began_s = clock()
            task()
            taken_ms = (clock() - began_s) * 1e3
            fastest[name] = min(taken_ms, fastest.get(name, taken_ms))
    return fastest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", default=str(CHECKPOINT))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    num_threads = 1 if options.cpu_time else options.threads
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(num_threads)
    config = ModelConfig.from_folder(Path(options.checkpoint))
    matrices = Matrices(config, DTYPES[options.dtype], num_threads)
    runners = {
        name: TorchRunner.load(
            options.checkpoint,
            dtype=options.dtype,
            num_threads=num_threads,
            num_pages=64 * 16,
            forward="native",
            quantization=quantization,
        )
        for name, quantization in (("native", None), ("int8", "int8"))
    }
    size = runners["native"].spec.page_size
    plans = {f"step of {number}": steps(number, 1, size, True) for number in ROWS}
    plans["block of 32"] = steps(1, 32, size, False)
    torch.set_num_threads(num_threads)
    tasks: dict[str, Callable[[], object]] = {"read": matrices.read}
    for rows in ROWS:
        tasks[f"torch linears {rows}"] = partial(matrices.by_torch, rows)
        for name in runners:
            tasks[f"{name} linears {rows}"] = partial(matrices.native, rows, name)
    for what, plan in plans.items():
        for name, runner in runners.items():
            tasks[what if name == "native" else f"{name} {what}"] = partial(runner.run, plan)
    for number in CONCURRENCY:
        for name, runner in runners.items():
            tasks[f"{name} engine {number}"] = partial(generate, runner, number)
    found = measure(tasks, options.turns, clock)
    found |= {f"{what} / int8": found[what] / found[f"int8 {what}"] for what in plans}
    for number in CONCURRENCY:
        for name in runners:
            found[f"{name} tokens/s of {number}"] = (
                number * NUM_NEW * 1e3 / found.pop(f"{name} engine {number}")
            )
    found |= {
        "step of 1 / read": found["step of 1"] / found["read"],
        "step of 32 / torch linears 32": found["step of 32"] / found["torch linears 32"],
        "block of 32 / torch linears 32": found["block of 32"] / found["torch linears 32"],
    }
    kind = "CPU ms" if options.cpu_time else "ms"
    print(
        f"CPU, {num_threads} threads, {options.dtype}, {kind}; weights {matrices.num_bytes / 1e6:.0f} MB, "
        f"{matrices.num_bytes / found['read'] / 1e6:.1f} GB/s read; {NUM_CACHED} tokens cached a sequence"
    )
    for name, value in found.items():
        print(f"{name:<34} {value:>9.2f}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({k: round(v, 3) for k, v in found.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
