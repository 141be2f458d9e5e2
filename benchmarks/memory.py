"""Resident memory over many requests: `python -m benchmarks.memory [--requests 10000]`.

The engine with text and events around it, in this process, on the embedded checkpoint; prompts and
lengths vary, a tenth of the requests is cancelled. Prints resident MiB at every tenth of the way.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.modes import CHECKPOINT
from policies.modes import Mode
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.messages import DecodingOptions, GenerateRequest, SamplingParams
from replicas.model.runner import TorchRunner
from replicas.requests import RequestTable
from replicas.stats import EngineSnapshot
from replicas.text import TextCodec

CONCURRENCY = 32
KV_CACHE_MB = 64


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def serve(num_requests: int, num_marks: int = 10) -> Iterator[tuple[int, float]]:
    """Answers the requests; yields those answered so far and resident MiB, at so many marks."""
    runner = TorchRunner.load(str(CHECKPOINT), kv_budget_bytes=KV_CACHE_MB << 20, num_threads=1)
    codec = TextCodec.load(str(CHECKPOINT))
    engine = Engine(runner, EngineConfig(max_running=CONCURRENCY))
    requests = RequestTable(
        engine, codec, "r", time.monotonic, is_open=lambda channel_id: True, send=lambda events: None
    )
    rng = random.Random(1)
    num_submitted = num_ended = 0
    next_mark = 0
    while num_ended < num_requests:
        while num_submitted - num_ended < CONCURRENCY and num_submitted < num_requests:
            prompt = tuple(rng.randrange(300, 1600) for _ in range(rng.randint(5, 60)))
            sampling = SamplingParams(
                max_tokens=rng.randint(1, 24), temperature=rng.choice((0.0, 1.0)), seed=num_submitted
            )
            options = DecodingOptions(rng.choice((Mode.AR, Mode.SELF_SPECULATION, Mode.DIFFUSION)), 8)
            if options.mode is Mode.AR:
                options = DecodingOptions(Mode.AR)
            name = str(num_submitted)
            request = GenerateRequest(name, "c", (prompt,), sampling, options)
            requests.submit(request, [list(prompt)], [None])
            num_submitted += 1
        if rng.random() < 0.1 * len(requests.request_ids) / CONCURRENCY:
            requests.cancel([rng.choice(requests.request_ids)])
        requests.publish(engine.step())
        EngineSnapshot.read(engine, "r")
        num_ended = num_submitted - len(requests.request_ids)
        if num_ended >= next_mark:
            yield num_ended, resident_mib()
            next_mark += max(1, num_requests // num_marks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for num_ended, mib in serve(options.requests):
        print(f"{num_ended:>7} requests {mib:>8.1f} MiB", flush=True)
        found.append({"requests": num_ended, "resident_mib": round(mib, 1)})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
