"""The first token of a short prompt on an idle server, against the prompt's forward itself.

`python -m benchmarks.first_token [--checkpoint DIR]`: the whole stack (Serve's proxy, ingress, replica),
one request at a time, no prompt twice; and in this process, by turns with it, the forward of the same
prompts. Also what a GET costs that the ingress answers by itself, so that the rest can be told apart. Wanted:
under 1.5 forwards and 10 ms.
"""

import argparse
import asyncio
import json
import signal
import statistics
import sys
import time
from pathlib import Path

from benchmarks.load import complete
from benchmarks.modes import CHECKPOINT
from benchmarks.processes import Triad
from replicas.engine.batch import ScheduledBatch, Segment
from replicas.messages import SamplingParams
from replicas.model.checkpoint import DTYPES
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec

MODEL = "first"
NUM_WARM_UP = 5
PLACES = ("Rome", "Oslo", "Lima", "Cairo", "Paris", "Delhi", "Quito", "Dakar", "Tunis", "Sofia")
ASKED = ("Where is", "How big is", "Who lives in", "Name a street in")


def prompts(turn: int) -> list[str]:
    """Prompts of about ten words, all different from the first on, so that no prefix is found cached."""
    return [f"{turn}{number}: {ask} {place}?" for number, place in enumerate(PLACES) for ask in ASKED]


def forward_ms(runner: TorchRunner, token_ids: list[int]) -> float:
    num_pages = -(-len(token_ids) // runner.spec.page_size)
    segment = Segment(
        seq_id=0,
        start=0,
        token_ids=tuple(token_ids),
        pages=tuple(range(num_pages)),
        num_causal=len(token_ids),
        adapter=False,
        wanted=(len(token_ids) - 1,),
        sampling=SamplingParams(),
    )
    began_s = time.perf_counter()
    runner.run(ScheduledBatch((segment,)))
    return 1e3 * (time.perf_counter() - began_s)


async def get_ms(port: int, path: str) -> float:
    head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"
    began_s = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode())
    answer = await reader.read()
    writer.close()
    if b" 200 " not in answer.partition(b"\r\n")[0]:
        raise RuntimeError(f"GET {path}: {answer[:200]!r}")
    return 1e3 * (time.perf_counter() - began_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", default=str(CHECKPOINT))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--port", type=int, default=8133)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    codec = TextCodec.load(options.checkpoint)
    runner = TorchRunner.load(options.checkpoint, dtype=options.dtype, num_pages=512)
    found: dict[str, list[float]] = {"ttft": [], "forward": [], "get": []}
    num_tokens = []
    given = (f"dtype={options.dtype}", f"served_model_name={MODEL}", "policy=ar")
    model = f"model={Path(options.checkpoint).absolute()}"
    with Triad(model, *given, port=options.port):
        for turn in range(options.turns + 1):
            for number, prompt in enumerate(prompts(turn)):
                token_ids = codec.encode(({"role": "user", "content": prompt},))
                answered = asyncio.run(complete(options.port, MODEL, prompt, 2, {}))
                one_get_ms = asyncio.run(get_ms(options.port, "/healthz"))
                one_forward_ms = min(forward_ms(runner, token_ids) for _ in range(2))
                if turn == 0 and number >= NUM_WARM_UP:
                    break
                if turn:
                    num_tokens.append(len(token_ids))
                    found["ttft"].append(1e3 * answered.ttft_s)
                    found["forward"].append(one_forward_ms)
                    found["get"].append(one_get_ms)
    median = {name: statistics.median(values) for name, values in found.items()}
    wanted_ms = 1.5 * median["forward"] + 10.0
    print(
        json.dumps(
            {
                "model": Path(options.checkpoint).name,
                "dtype": options.dtype,
                "num_requests": len(num_tokens),
                "prompt_tokens": statistics.median(num_tokens),
                "ttft_ms": round(median["ttft"], 2),
                "ttft_p90_ms": round(statistics.quantiles(found["ttft"], n=10)[-1], 2),
                "forward_ms": round(median["forward"], 2),
                "get_ms": round(median["get"], 2),
                "wanted_ms": round(wanted_ms, 2),
                "is_met": median["ttft"] <= wanted_ms,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
