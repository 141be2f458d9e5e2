"""How many kernels a step launches, a layer and in all: `python -m benchmarks.gpu.offline.launches`.

The 8B's steps on meta tensors (benchmarks.gpu.offline.trace), as JSON, one object a kind of step. A product
of torch's counts as one; cuBLAS may take a kernel more, which adds the parts of its sum. Copies to the
device are counted, those to the host are not. `--processes 2`: of the first of so many that share the model.
"""

import argparse
import json
import os
from collections import Counter

os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are imported

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.gpu.model import Work
from benchmarks.gpu.offline.devices import DEVICES
from benchmarks.gpu.offline.trace import STEPS, Trace, trace_step

_NUM_LAYERS = 34


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.processes > 1:
        store = FakeStore()
        dist.init_process_group("fake", rank=0, world_size=arguments.processes, store=store)
    for name in arguments.steps:
        few, more = (_launches(name, num_layers, arguments.processes) for num_layers in (2, 3))
        layer = more - few
        in_all = few.total() + (_NUM_LAYERS - 2) * layer.total()
        print(json.dumps({"step": name, "layer": layer.total(), "in_all": in_all, "of": layer}))


def _launches(name: str, num_layers: int, num_processes: int) -> Counter[str]:
    trace = Trace()
    work = Work("8B", num_layers=num_layers, num_processes=num_processes)
    trace_step(DEVICES["sm_90"], trace, work, name)
    return Counter(launch.split()[0].lstrip("_").removeprefix("aten::") for launch in trace.launches)


if __name__ == "__main__":
    main()
