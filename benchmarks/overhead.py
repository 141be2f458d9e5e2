"""The cost of a step besides the model: `python -m benchmarks.overhead`.

The engine, the layout of a step's arrays and the way of its tokens into text and events run as they do while
serving; the native library's forward and choice of tokens are replaced by ones that do nothing. CPU
milliseconds a step of one thread, which other work on the machine does not disturb.
"""

import argparse
import json
import time
from pathlib import Path

from benchmarks.modes import CHECKPOINT
from policies.modes import Mode
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.messages import DecodingOptions, GenerateRequest, SamplingParams
from replicas.model.native.model import NativeModel
from replicas.model.runner import TorchRunner
from replicas.preparation import Prepared
from replicas.requests import RequestTable
from replicas.stats import EngineSnapshot
from replicas.text import TextCodec

PROMPT_TOKENS = 40
MAX_TOKENS = 150
OPTIONS = (
    DecodingOptions(Mode.AR),
    DecodingOptions(Mode.SELF_SPECULATION, 16),
    DecodingOptions(Mode.DIFFUSION, 32),
)


class IdleModel(NativeModel):
    """A native model whose forward computes nothing and whose every token is the same."""

    def _run(self, *arrays: int) -> None:
        pass

    def most_probable(self, num_rows: int, forbidden: int | None) -> tuple[list[int], list[float]]:
        return [77] * num_rows, [0.37] * num_rows


def engine_ms(engine: Engine, options: DecodingOptions, concurrency: int) -> float:
    """Milliseconds of the fastest of the steps in which all sequences decode."""
    sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    for number in range(concurrency):
        engine.submit(str(number), list(range(10, 10 + PROMPT_TOKENS)), sampling, options)
    fastest = float("inf")
    while engine.has_work:
        prefilling = any(sequence.is_prefilling for sequence in engine.scheduler.running)
        began_s = time.process_time()
        engine.step()
        taken_ms = (time.process_time() - began_s) * 1e3
        if not prefilling and len(engine.scheduler.running) == concurrency:
            fastest = min(fastest, taken_ms)
    return fastest


def publish_ms(engine: Engine, codec: TextCodec, concurrency: int) -> float:
    """Milliseconds to make events and the load out of an AR step's tokens, without sending them.

    Their text is made in the step.
    """
    requests = RequestTable(
        engine, codec, "r", time.monotonic, is_open=lambda channel_id: True, send=lambda events: None
    )
    sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    prompt = list(range(10, 10 + PROMPT_TOKENS))
    for number in range(concurrency):
        request = GenerateRequest(str(number), "c", (tuple(prompt),), sampling, OPTIONS[0])
        requests.submit(request, Prepared([prompt], [None], [None]))
    fastest = float("inf")
    while engine.has_work:
        progress = engine.step()
        began_s = time.process_time()
        requests.publish(progress)
        EngineSnapshot.read(engine, "r")
        taken_ms = (time.process_time() - began_s) * 1e3
        if len(progress) == concurrency:
            fastest = min(fastest, taken_ms)
    return fastest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    runner = TorchRunner.load(str(CHECKPOINT), num_threads=1, forward="native")
    runner._model.__class__ = IdleModel
    codec = TextCodec.load(str(CHECKPOINT))
    found = []
    for concurrency in arguments.concurrency:
        for options in OPTIONS:
            engine = Engine(runner, EngineConfig(max_running=concurrency, max_step_tokens=4096))
            taken_ms = engine_ms(engine, options, concurrency)
            found.append({"concurrency": concurrency, "what": str(options.mode), "ms": round(taken_ms, 3)})
        taken_ms = publish_ms(Engine(runner, EngineConfig(max_running=concurrency)), codec, concurrency)
        found.append({"concurrency": concurrency, "what": "publish ar", "ms": round(taken_ms, 3)})
    for row in found:
        print(f"{row['concurrency']:>3} {row['what']:<18} {row['ms']:>8.3f} ms")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
