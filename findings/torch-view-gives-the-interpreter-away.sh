#!/usr/bin/env bash
# torch (seen in 2.13.0, on CPython 3.11.7): an operation gives the interpreter's lock away however little it does,
# a view that computes nothing too. A thread that waits for the lock takes it in a part of these moments, and keeps it
# for its 5 ms (sys.getswitchinterval). So beside a thread that computes in Python an operation of 2 µs takes tens to
# hundreds of µs on average, of which half the time would be its share. NumPy (2.4.6) keeps the lock in operations of
# few numbers, and so gets just that share. `shape` and `data_ptr` keep it in torch too.
#
# Guessed before: operations of a few numbers take their fair share, twice as long as alone, in torch as in NumPy; then,
# for torch, 5 ms each. Both wrong.
# Seen, µs alone and beside the thread, two runs: torch's view 2.4 and 1,067, 2.0 and 41; torch's sum of 16 numbers 2.8
# and 371, 2.7 and 25; NumPy's sum 0.8 and 1.9, 0.7 and 1.7; NumPy's reshape 0.3 and 0.7.
# What follows: between two forwards, ten small operations of torch cost an engine's thread up to several ms beside its
# event loop. Triad chooses greedy tokens without any (docs/experiments/engine.md, "What a greedy step costs beside its
# forward").
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import statistics
import sys
import threading
import time

import numpy
import torch

SECONDS = 1.5
torch.set_num_threads(1)
tensor, array = torch.ones(16), numpy.ones(16, numpy.float32)
operations = {
    "torch view": lambda: tensor.view(4, 4),
    "torch sum": lambda: tensor + tensor,
    "numpy reshape": lambda: array.reshape(4, 4),
    "numpy sum": lambda: array + array,
}


def microseconds(operation):
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        for _ in range(100):
            operation()
        count += 100
    return 1e6 * (time.perf_counter() - began) / count


is_over = False


def compute():
    number = 0
    while not is_over:
        number += 1


alone = {name: microseconds(operation) for name, operation in operations.items()}
thread = threading.Thread(target=compute)
thread.start()
beside = {
    name: statistics.median(microseconds(operation) for _ in range(3)) for name, operation in operations.items()
}
is_over = True
thread.join()
times = {name: beside[name] / alone[name] for name in operations}
for name in operations:
    print(f"{name:<14} alone {alone[name]:6.2f} us, beside a thread {beside[name]:8.2f} us: {times[name]:6.1f} times")
if min(times["torch view"], times["torch sum"]) < 6 or max(times["numpy reshape"], times["numpy sum"]) > 5:
    sys.exit("changed: torch's operations took less than 6 times as long beside a thread, or NumPy's more than 5")
print("as seen: torch gives the interpreter away in each operation, NumPy in none of these")
PY
