"""Runs the image as the chart would, and asserts what it does: streams in each mode, an end by SIGTERM."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Sequence

import httpx

from benchmarks.processes import ServerProcess, free_port
from tests.e2e.clients import PATH, Streamed, chat, state_of, stream
from tests.eventually import eventually
from tests.image.build import RUN

NAME = "triad-image"
MODES = ("ar", "diffusion", "self_speculation", "auto")
SERVE_RUN = ("serve", "run", "cluster.app:deploy", "num_replicas=1")
LONG = chat("Write a short story about Anna.", max_tokens=900)
NUM_LONG = 4

USER = "import os; print(os.getuid(), os.getgid())"
WRITES = "import pathlib; pathlib.Path('/opt/triad/a-file').touch()"
LIBRARIES = "grep -ho '/[^ ]*/forward-[^ ]*[.]so' /proc/[0-9]*/maps | sort -u"


def in_it(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(("podman", "exec", NAME, *command), capture_output=True, text=True, timeout=60)


def run_command(image: str, port: int, command: Sequence[str]) -> list[str]:
    """The chart's security and volumes, and no more: whatever else the image writes to fails."""
    return [
        *(*RUN, "--rm", "--name", NAME),
        *(
            "--read-only",
            "--read-only-tmpfs=false",
            "--cap-drop",
            "all",
            "--security-opt",
            "no-new-privileges",
        ),
        *("--tmpfs", "/tmp:rw,mode=1777", "--volume", "/home/triad", "--shm-size", "512m"),
        *("--publish", f"127.0.0.1:{port}:8000", image, *command),
    ]


def look(image: str, command: Sequence[str] = ()) -> None:
    """Starts the image, by its own command if none is given, asserts what it does, and ends it by SIGTERM."""
    print(f"== {image} {' '.join(command)} ==", flush=True)
    port, began_s = free_port(), time.monotonic()
    try:
        with ServerProcess(run_command(image, port, command), port, "/readyz", os.environ) as server:
            server.wait_until_ready()
            print(f"ready after {time.monotonic() - began_s:.0f} s", flush=True)
            look_inside()
            asyncio.run(use(server, drains=not command))
    finally:
        subprocess.run(("podman", "rm", "--force", "--ignore", NAME), capture_output=True)


async def use(server: ServerProcess, drains: bool) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=120.0) as client:
        await each_mode(client)
        await end(client, server, drains)


def look_inside() -> None:
    user = in_it("python", "-c", USER).stdout.strip()
    assert user == "10001 10001", user
    written = in_it("python", "-c", WRITES)
    assert "Read-only file system" in written.stderr, written
    (library,) = in_it("sh", "-c", LIBRARIES).stdout.split()
    assert "/portable/" in library
    print(f"user {user}; / is read-only; the forward is {library.rpartition('/')[2]}", flush=True)


async def each_mode(client: httpx.AsyncClient) -> None:
    for mode in MODES:
        streamed = await stream(client, LONG | {"max_tokens": 200, "decoding": {"mode": mode}})
        assert streamed.done
        assert streamed.last is not None
        assert mode == "auto" or streamed.modes == {mode}
        tokens = streamed.last["decoding"]["tokens"]
        print(f"{mode}: {tokens} in {streamed.num_chunks} chunks, [DONE]", flush=True)


async def end(client: httpx.AsyncClient, server: ServerProcess, drains: bool) -> None:
    """SIGTERM while streams run. drains: what has begun is to be finished, and what is new refused."""

    async def all_run() -> bool:
        return sum(r["load"]["num_running"] for r in (await state_of(client))["replicas"]) == NUM_LONG

    async def refused() -> httpx.Response | None:
        response = await client.post(PATH, json=chat("Hello", max_tokens=1))
        return None if response.status_code == 200 else response

    body = LONG | {"decoding": {"mode": "ar"}}
    alone = await stream(client, body)
    begun = [asyncio.create_task(stream(client, body)) for _ in range(NUM_LONG)]
    await eventually(all_run, within_s=20, every_s=0.02)
    server.process.send_signal(signal.SIGTERM)
    began_s = time.monotonic()
    if drains:
        refusal = await eventually(refused, within_s=20, every_s=0.02)
        assert refusal.status_code == 503
        assert int(refusal.headers["retry-after"]) >= 1
    ended = await asyncio.gather(*begun, return_exceptions=True)
    whole = [
        s for s in ended if isinstance(s, Streamed) and s.done and s.error is None and s.text == alone.text
    ]
    assert not drains or len(whole) == NUM_LONG, ended
    code = await asyncio.to_thread(server.process.wait, 120)
    took_s = time.monotonic() - began_s
    print(
        f"SIGTERM: {len(whole)} of {NUM_LONG} streams whole, exit status {code} after {took_s:.1f} s",
        flush=True,
    )
    assert not drains or code == 0
