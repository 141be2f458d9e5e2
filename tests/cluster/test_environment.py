import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.environment import EPHEMERAL, OWN_PORTS, free_ports, serving_environment

LONGEST_SOCKET = 107
NODE_ID = "f" * 56
"""Ray makes a folder of this name for each node."""


def test_two_clusters_on_a_machine_share_no_port_and_no_file(tmp_path: Path) -> None:
    first, second = serving_environment(tmp_path / "1"), serving_environment(tmp_path / "2")
    ports = [environment[name] for environment in (first, second) for name in OWN_PORTS]
    assert len(set(ports[: len(OWN_PORTS)])) == len(OWN_PORTS)
    files = {name for name, value in first.items() if str(tmp_path) in value}
    assert len(files) == 5
    assert all(first[name] != second[name] for name in files)


def test_no_outgoing_connection_can_take_a_port_before_its_server_does() -> None:
    first = int(EPHEMERAL.read_text().split()[0])
    own, served = free_ports(50), free_ports(50, to_listen_on=True)
    assert len({*own, *served}) == 100, "nor can a cluster take one that a server was told to listen on"
    assert all(1024 <= port < first for port in (*own, *served))
    assert not {*own, *served} & set(range(30_000, 31_001)) or first < 31_768, "those of Serve's ingresses"


def test_where_outgoing_connections_may_have_every_port_any_free_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = tmp_path / "range"
    every.write_text("1024\t65535\n")
    monkeypatch.setattr("cluster.environment.EPHEMERAL", every)
    assert len({port for port in free_ports(50) if port >= 1024}) == 50


def test_haproxy_is_the_one_with_our_bounds_and_can_be_started(tmp_path: Path) -> None:
    environment = serving_environment(tmp_path)
    assert os.access(environment["RAY_SERVE_HAPROXY_BINARY_PATH"], os.X_OK)
    done = subprocess.run(
        [environment["RAY_SERVE_HAPROXY_BINARY_PATH"], "-v"],
        env={"TRIAD_PYTHON": environment["TRIAD_PYTHON"], "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("HAProxy version")


def test_what_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    assert serving_environment(Path("/tmp/t"))["RAY_SERVE_ENABLE_HA_PROXY"] == "0"


def test_a_shell_takes_it() -> None:
    """And the sockets of a folder such as serve.sh makes are short enough for the kernel."""
    folder = "/tmp/triad-XXXXXX"
    command = f'eval "$({sys.executable} -m cluster.environment {folder})"; env'
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    environment = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    folder_of_node, name = environment["RAY_SERVE_HAPROXY_SOCKET_PATH"].rsplit("/", 1)
    assert len(f"{folder_of_node}/{NODE_ID}/{name}") + len(".12345.tmp") <= LONGEST_SOCKET
