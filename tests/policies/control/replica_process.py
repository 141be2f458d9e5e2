"""A replica's side of the control path in a process of its own, with a load that stays as it is.

python -m tests.policies.control.replica_process URL APP REPLICA_ID NUM_IN_FLIGHT

On SIGTERM it leaves in good order.
"""

import asyncio
import signal
import sys

from policies.control.plan_sync import PlanFollower
from policies.control.store import LoadStore
from policies.registry import create_policy
from tests.policies.control.controller_process import QUICK
from tests.policies.helpers import a_load


async def main(url: str, app: str, replica_id: str, num_in_flight: str) -> None:
    load = a_load(int(num_in_flight), replica_id)
    follower = PlanFollower(LoadStore(url, app), create_policy("threshold", QUICK), lambda: load)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await follower.step()
    print("running", flush=True)
    await follower.run(stop)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
