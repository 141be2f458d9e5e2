"""A controller in a process of its own: python -m tests.policies.control.controller_process URL APP NAME."""

import asyncio
import sys

from policies.control.controller import Controller
from policies.control.store import LoadStore
from policies.registry import create_policy

QUICK = {"stabilise": {"dwell_s": 0.0, "max_shifts_per_minute": 10_000}}


async def main(url: str, app: str, name: str) -> None:
    controller = Controller(LoadStore(url, app), create_policy("threshold", QUICK), name=name)
    await controller.step()
    print("running", flush=True)
    await controller.run(asyncio.Event())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
