"""One of two processes that share a model: the runner's kind, a checkpoint, and for rank 1 the port.

Rank 0 prints the port to meet at, then that it is ready; after a line of input it prints the
tokens, a mode a line.
"""

import sys

import torch.distributed as dist

from policies.modes import Mode
from replicas.engine.batch import Runner
from replicas.engine.engine import Engine
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.cuda.runner import CudaRunner, Options
from replicas.model.lockstep import Leader, Meeting, follow, join
from replicas.model.runner import TorchRunner
from tests.replicas.model.conftest import prompt

DECODING = (
    DecodingOptions(Mode.AR),
    DecodingOptions(Mode.SELF_SPECULATION, 3),
    DecodingOptions(Mode.DIFFUSION, 3, 0.9),
)


def load(kind: str, folder: str) -> Runner:
    if kind == "torch":
        return TorchRunner.load(folder, num_pages=32, page_size=8, num_threads=1)
    options = Options(pads=False)
    runner = CudaRunner.load(
        folder, dtype="float32", device="cpu", num_pages=32, page_size=8, options=options
    )
    assert (runner.config.num_heads, runner.config.num_kv_heads) == (3, 1)
    return runner


def lead(runner: Leader) -> None:
    engine = Engine(runner)
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    sequences = [
        engine.submit(str(number), prompt(9, seed=1), sampling, decoding)
        for number, decoding in enumerate(DECODING)
    ]
    while engine.has_work:
        engine.step()
    runner.close()
    for sequence in sequences:
        print(*sequence.tokens[sequence.num_prompt_tokens :])


def main() -> None:
    kind, folder = sys.argv[1:3]
    if len(sys.argv) > 3:
        join(int(sys.argv[3]), 1, 2, "cpu")
        follow(load(kind, folder))
    else:
        meeting = Meeting(2)
        print(meeting.port, flush=True)
        join(meeting, 0, 2, "cpu")
        leader = Leader(load(kind, folder))
        print("ready", flush=True)
        sys.stdin.readline()
        lead(leader)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
