"""One of two processes that share a model, or one that has it alone: the runner's kind, a checkpoint, and for
rank 1 the port, or "alone" and the name of requests.

Rank 0 prints the port to meet at, then that it is ready; after a line of input it runs the requests named in
it, prints "begun" after the first step, and at the end the outcome of each. So does the one alone, at once.
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
GREEDY = {"max_tokens": 3}
SAMPLED = {"max_tokens": 3, "temperature": 0.9, "seed": 5}
RULED = (
    {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
    {"logit_bias": ((7, 4.0), (60, 4.0)), "min_tokens": 2, "logprobs": 3},
)
REQUESTS = {
    "greedy": [GREEDY],
    # Rows of which the most probable token is enough, beside such as need all of their logits.
    "mixed": [GREEDY, SAMPLED, SAMPLED | RULED[0], GREEDY | RULED[1]],
    "long": [{"max_tokens": 100}],
}


def load(kind: str, folder: str) -> Runner:
    if kind == "torch":
        return TorchRunner.load(folder, num_pages=160, page_size=8, num_threads=1, forward="torch")
    options = Options(pads=False)
    runner = CudaRunner.load(
        folder, dtype="float32", device="cpu", num_pages=160, page_size=8, options=options
    )
    if dist.is_initialized():
        assert (runner.config.num_heads, runner.config.num_kv_heads) == (3, 1)
    return runner


def serve(runner: Runner, name: str) -> None:
    engine = Engine(runner)
    sequences = [
        engine.submit(str(number), prompt(9, seed=1), SamplingParams(ignore_eos=True, **sampling), decoding)
        for number, (decoding, sampling) in enumerate((d, s) for s in REQUESTS[name] for d in DECODING)
    ]
    logprobs: dict[int, list[tuple[int, ...]]] = {}
    is_first = True
    while engine.has_work:
        for made in engine.step():
            ranked = [tuple(token for token, _ in entry.top) for entry in made.logprobs]
            logprobs.setdefault(made.sequence.seq_id, []).extend(ranked)
        if is_first:
            print("begun", flush=True)
        is_first = False
    for sequence in sequences:
        print(*sequence.tokens[sequence.num_prompt_tokens :], *logprobs[sequence.seq_id])


def main() -> None:
    kind, folder = sys.argv[1:3]
    if sys.argv[3:4] == ["alone"]:
        serve(load(kind, folder), sys.argv[4])
        return
    if len(sys.argv) > 3:
        join(int(sys.argv[3]), 1, 2, "cpu")
        follow(load(kind, folder))
    else:
        meeting = Meeting(2)
        print(meeting.port, flush=True)
        join(meeting, 0, 2, "cpu")
        leader = Leader(load(kind, folder))
        print("ready", flush=True)
        asked = sys.stdin.readline().strip()
        assert not list(leader.warm_up_batches(2, 16))  # but for what is begun behind another
        serve(leader, asked)
        leader.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
