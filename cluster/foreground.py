"""`python -m cluster.serve FILE` is `serve run FILE` that knows SIGTERM: it drains, and then it stops.

Ctrl-C stops at once, as with `serve run`, which cuts streams. A second SIGTERM, too. Where a replica can't
start, such as for want of its model, it ends with 1; `serve run` would wait for ever. A Ray that it starts is
without Ray's dashboard, and so without `serve status`.
"""

import argparse
import asyncio
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import ray
import yaml
from ray import serve
from ray.serve.schema import ApplicationStatus
from ray.serve.scripts import run

from cluster.config import ClusterConfig
from cluster.drain import drain

POLL_S = 1.0


class Terminated(BaseException):
    """Raised by SIGTERM; not an Exception, or `serve run` would take it for an error of its own."""


def terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise Terminated


class Failed(BaseException):
    """Raised by SIGUSR1, which the watch sends; not an Exception, for the same reason."""


def fail(number: int, frame: FrameType | None) -> None:
    raise Failed


def watch(name: str) -> None:
    """Waits until the application runs or has failed to; then interrupts the main thread."""
    while True:
        application = serve.status().applications.get(name)
        status = application and application.status
        if status == ApplicationStatus.RUNNING:
            return
        if status == ApplicationStatus.DEPLOY_FAILED:
            os.kill(os.getpid(), signal.SIGUSR1)
            return
        time.sleep(POLL_S)


def causes(name: str) -> list[str]:
    """Why its deployments failed: of each the last line of what it says."""
    deployments = serve.status().applications[name].deployments.values()
    messages = [deployment.message.strip() for deployment in deployments]
    return [message.splitlines()[-1] for message in messages if message]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cluster.serve", description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    (application,) = yaml.safe_load(file.read_text())["applications"]
    timeout_s = ClusterConfig.model_validate(application.get("args", {})).drain_timeout_s
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Before `serve run` does, since this sets a handler of SIGTERM. The dashboard is ten processes more.
    ray.init(namespace="serve", include_dashboard=False)
    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGUSR1, fail)
    threading.Thread(target=watch, args=(application["name"],), daemon=True).start()
    try:
        run.main([str(file)], standalone_mode=False)
    except Failed:
        told = causes(application["name"])
        serve.shutdown()  # type: ignore[no-untyped-call]
        sys.exit("\n".join(told) or "no replica could start")
    except Terminated:
        print("== no new requests; those begun are finished ==", flush=True)
        num_left = asyncio.run(drain(application["name"], timeout_s))
        if num_left:
            print(f"== {num_left} requests had not ended within {timeout_s:g} s ==", file=sys.stderr)
        serve.delete(application["name"])
        serve.shutdown()  # type: ignore[no-untyped-call]
