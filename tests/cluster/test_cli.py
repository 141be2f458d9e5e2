"""The `triad` command, and the doctor's checks."""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cluster import cli, doctor
from cluster.doctor import State
from cluster.embedded_redis import EmbeddedRedis
from replicas.model.native.build import NativeUnavailable

ROOT = Path(cli.__file__).parent.parent


def options(*given: str) -> argparse.Namespace:
    return cli.parser().parse_args(["serve", *given])


def test_the_command_is_installed_and_its_script_is_packed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["triad"] == "cluster.cli:main"
    assert cli.SCRIPT.name in project["tool"]["setuptools"]["package-data"]["cluster"]
    assert cli.SCRIPT.is_file()


def test_serve_s_options_are_the_script_s_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    given = options("--model", "model", "--port", "81", "--replicas", "2", "--log", "debug")
    made = cli.serve_environment(given, {"PATH": "/bin", "HOME": "/h", "POLICY": "slo"})
    assert made == {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}/bin",
        "HOME": "/h",
        "POLICY": "slo",
        "MODEL": str(tmp_path / "model"),
        "PORT": "81",
        "REPLICAS": "2",
        "LOG": "debug",
    }
    assert cli.serve_environment(options("--model", "triad-5m"), {})["MODEL"] == "triad-5m"


def test_further_settings_are_the_script_s_arguments() -> None:
    given = options("--port", "81", "max_running=3", "host=0.0.0.0")
    assert cli.serve_command(given) == ["bash", str(cli.SCRIPT), "max_running=3", "host=0.0.0.0"]


@pytest.mark.parametrize("name", list(cli.MODULES))
def test_the_other_commands_are_modules_with_their_own_help(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: triad {name} ")
    assert "python -m" not in told


def test_a_command_that_is_a_module_runs_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["new-key", "ops", "--admin"])
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["keys"][0]["name"] == "ops"


def test_an_unknown_command_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sevre"])
    said = capsys.readouterr().err
    assert all(name in said for name in ("serve", "doctor", *cli.MODULES))


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_the_options_of_every_command(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["completion", shell])
    script = capsys.readouterr().out
    for option in ("--redis-url", "--dtype", "--users", "--requests-per-minute", "--timeout-s", "--policy"):
        assert option in script, option


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["completion", "bash"])
    (tmp_path / "triad.bash").write_text(capsys.readouterr().out)
    asked = 'source "$0"; COMP_WORDS=(triad serve --po); COMP_CWORD=2; _shtab_triad; echo "${COMPREPLY[@]}"'
    made = subprocess.run(
        ["bash", "-c", asked, str(tmp_path / "triad.bash")], capture_output=True, text=True, check=True
    )
    assert set(made.stdout.split()) == {"--port", "--policy"}


def test_an_old_python_fails() -> None:
    assert doctor.python((3, 10, 4)).state is State.FAILS
    assert doctor.python((3, 11, 0)).state is State.OK


def test_no_compiler_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise NativeUnavailable("no C++ compiler found")

    monkeypatch.setattr(doctor, "load_library", missing)
    found = doctor.compiler()
    assert (found.state, "no C++ compiler" in found.told) == (State.SLOW, True)


@pytest.mark.parametrize(
    ("flags", "state", "word"),
    [
        ("fpu avx2", State.SLOW, "avx2"),
        ("avx2 avx512f amx_tile", State.OK, "amx_tile"),
        ("fpu", State.SLOW, "none"),
    ],
)
def test_the_processor_is_read(tmp_path: Path, flags: str, state: State, word: str) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    found = doctor.processor(tmp_path, "x86_64")
    assert (found.state, word in found.told) == (state, True)
    assert doctor.processor(tmp_path, "aarch64").state is State.OK


@pytest.mark.parametrize(("free_kb", "state"), [(64, State.FAILS), (64 * 2**20, State.OK)])
def test_memory_is_held_against_what_is_wanted(tmp_path: Path, free_kb: int, state: State) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemAvailable:   {free_kb} kB\n")
    assert doctor.memory(tmp_path).state is state


def test_a_quota_of_less_than_two_cores_is_slow(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("150000 100000\n")
    found = doctor.cores(tmp_path)
    assert (found.state, "1.5" in found.told) == (State.SLOW, True) or os.cpu_count() == 1


async def test_redis_is_asked() -> None:
    server = EmbeddedRedis.start()
    try:
        assert (await doctor.redis(server.url)).state is State.OK
    finally:
        server.stop()
    assert (await doctor.redis("redis://127.0.0.1:1/0")).state is State.FAILS
    assert (await doctor.redis("http://nowhere")).state is State.FAILS


def test_one_failure_is_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert doctor.run(port, None) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines][-1] == "port"
    assert lines[-1].startswith("fails")
