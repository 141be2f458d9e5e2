"""One of two processes that share a model: rank, file to meet at, checkpoint. Rank 0 prints the tokens."""

import sys
from datetime import timedelta

import torch.distributed as dist

from policies.modes import Mode
from replicas.engine.engine import Engine
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.cuda.lockstep import Leader, follow
from replicas.model.cuda.runner import CudaRunner, Options
from tests.replicas.model.conftest import prompt


def main() -> None:
    rank, store, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=150)
    )
    runner = CudaRunner.load(
        folder, dtype="float32", device="cpu", num_pages=16, page_size=8, options=Options(pads=False)
    )
    assert (runner.config.num_heads, runner.config.num_kv_heads) == (3, 1)
    if rank:
        follow(runner)
    else:
        leader = Leader(runner)
        engine = Engine(leader)
        sampling = SamplingParams(max_tokens=4, ignore_eos=True)
        options = DecodingOptions(Mode.SELF_SPECULATION, 3)
        sequence = engine.submit("r", prompt(9, seed=1), sampling, options)
        while engine.has_work:
            engine.step()
        leader.close()
        print(*sequence.tokens[sequence.num_prompt_tokens :])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
