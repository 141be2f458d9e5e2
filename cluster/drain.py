"""`python -m cluster.drain` ends Triad with nothing lost: new requests get 503, those begun are finished.

Run beside a running cluster, whose Ray it finds as `ray` commands do. Then the application is deleted;
Serve itself stays. For a pod's preStop hook, and what `make serve` does on SIGTERM.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

PROG = "python -m cluster.drain"
PERIOD_S = 0.5


async def drain(app: str, timeout_s: float) -> int:
    """Drains, and returns the number of requests still there when the time was up: 0 if nothing was lost."""
    ingress: DeploymentHandle[object] = serve.get_app_handle(app)
    deadline_s = time.monotonic() + timeout_s
    while True:
        answers = await ingress.broadcast("drain").results_async(timeout_s=10.0, return_exceptions=True)
        # One that does not answer has ended.
        num_left = sum(answer for answer in answers if isinstance(answer, int))
        if num_left == 0 or time.monotonic() >= deadline_s:
            return num_left
        await asyncio.sleep(PERIOD_S)


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog=prog, description="Ends Triad with nothing lost: new requests get 503, those begun are finished."
    )
    found.add_argument("--app", default="triad")
    found.add_argument("--timeout-s", type=float, default=600.0, help="for the longest stream")
    found.add_argument("--address", default="auto", help="of the Ray cluster")
    return found


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    options = parser(prog).parse_args(arguments)
    ray.init(address=options.address, namespace="serve", log_to_driver=False)
    num_left = asyncio.run(drain(options.app, options.timeout_s))
    if num_left == 0:
        serve.delete(options.app)
    else:
        sys.exit(f"{num_left} requests had not ended within {options.timeout_s:g} s")


if __name__ == "__main__":
    main()
