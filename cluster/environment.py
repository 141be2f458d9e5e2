"""The environment that Ray has to find when it starts: `eval "$(python -m cluster.environment FOLDER)"`.

Serve's own proxy is a Python process that every chunk of every stream goes through. With these variables
HAProxy stands in its place, which Ray brings along, and clients reach the ingresses through it.
"""

import os
import random
import shlex
import socket
import sys
from contextlib import ExitStack
from itertools import chain, repeat
from pathlib import Path

from replicas.machine import default_num_threads

LONGEST_STREAM_S = 3600
"""The time an HAProxy has to end what it has begun, once a new one runs because ingresses came or went."""
SILENT_CLIENT_S = 120
"""The time for which a client may neither send what it owes nor take what there is for it."""
MIN_DRAIN_S = 1
"""The time for which an ingress that is to end still answers: HAProxy has stopped sending by then."""

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
NUM_BELOW = 8192
"""The number of ports below those of outgoing connections that are looked through."""
NUM_SERVED = 1024
"""The number next to them that is left to those who choose a port for a server to listen on. Between both lie
those of Serve's ingresses, from 30000 on by default."""

OWN_PORTS = (
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
)


def serving_environment(folder: Path) -> dict[str, str]:
    """The variables to set; what the environment has already stays as it is.

    folder: the cluster's own on this machine, absent or not; its path short, for sockets lie in it
    """
    haproxy = folder / "h"
    wanted = {
        # Ray starts its workers with a low priority, which suits batch jobs and not servers.
        "RAY_worker_niceness": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, default_num_threads(2))),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).with_name("haproxy.sh")),
        "TRIAD_PYTHON": sys.executable,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(SILENT_CLIENT_S),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(LONGEST_STREAM_S),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(MIN_DRAIN_S),
        # Completions go past what Serve puts around a request.
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "router.direct.middleware",
    }
    # Of a cluster's own: sent to the port of another one's, a request would be answered by that.
    wanted |= dict(zip(OWN_PORTS, map(str, free_ports(len(OWN_PORTS))), strict=True))
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def free_ports(count: int, to_listen_on: bool = False) -> list[int]:
    """Finds ports that are all different: each stays taken until the last is found.

    They lie below those that the system gives to outgoing connections, where there are any: Ray makes
    hundreds of these while it starts, and one of them would take a port before its server does.
    to_listen_on: of those that no cluster takes for itself; a cluster's own are drawn before it listens.
    """
    with ExitStack() as stack:
        probes: list[socket.socket] = []
        first = _first_ephemeral()
        most, least = (NUM_SERVED, 0) if to_listen_on else (NUM_BELOW, NUM_BELOW // 2)
        below = range(max(1024, first - most), max(1024, first - least))
        for port in chain(random.sample(below, len(below)), repeat(0)):  # 0 is any
            if len(probes) == count:
                break
            probe = stack.enter_context(socket.socket())
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:  # it is taken
                if not port:
                    raise
                probe.close()
            else:
                probes.append(probe)
        return [probe.getsockname()[1] for probe in probes]


def _first_ephemeral() -> int:
    try:
        return int(EPHEMERAL.read_text().split()[0])
    except OSError:
        return 32768


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m cluster.environment FOLDER")
    for name, value in serving_environment(Path(sys.argv[1])).items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
