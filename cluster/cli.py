"""The `triad` command: what the Makefile and `python -m` do, under one name.

Beside it `serve run cluster.app:deploy` stays the entry for a cluster that is there already.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import shtab

SCRIPT = Path(__file__).with_name("serve.sh")

MODULES = {
    "loadtest": ("loadtest.__main__", "load a running server, or one of its own, and write a report"),
    "new-key": ("cluster.new_key", "make an API key, shown once, and its entry for the key file"),
    "drain": ("cluster.drain", "end a running Triad with nothing lost"),
    "replay": ("policies.control.replay", "what another policy would have decided"),
}
"""Commands that are modules with arguments of their own: `triad drain --help` is the module's help."""


def parser(*, in_full: bool = False) -> argparse.ArgumentParser:
    """The command's arguments.

    in_full: with those of the modules, which takes their imports.
    """
    found = argparse.ArgumentParser(prog="triad", description="An adaptive serving cluster.")
    commands = found.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve a model on this machine until Ctrl-C")
    serve.add_argument("--model", help="triad-5m, triad-5m-tools, a folder or a hub name")
    serve.add_argument("--dtype", help="of the weights; default: float32 on CPUs, bfloat16 on GPUs")
    serve.add_argument("--replicas", type=int, help="default: 1")
    serve.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    serve.add_argument("--redis-url", help="default: a server of its own, on loopback")
    serve.add_argument("--policy", help="who chooses the mode; default: cost_model")
    serve.add_argument("--log", choices=["debug"], help="debug: what Ray and the actors say comes here")
    serve.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="further settings; host=0.0.0.0")
    for name, (module, what) in MODULES.items():
        of_module = [importlib.import_module(module).parser()] if in_full else []
        commands.add_parser(name, help=what, add_help=False, parents=of_module)
    doctor = commands.add_parser("doctor", help="check this machine: what would fail here, or be slow")
    doctor.add_argument("--redis-url", help="check this one, too")
    doctor.add_argument("--port", type=int, default=8000, help="which is to be free; default: %(default)s")
    completion = commands.add_parser("completion", help="what a shell is to run to complete these commands")
    completion.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    return found


def serve_command(options: argparse.Namespace) -> list[str]:
    return ["bash", str(SCRIPT), *options.settings]


def serve_environment(options: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of cluster/serve.sh for these options; a model's folder by its whole path."""
    model = options.model
    if model is not None and Path(model).is_dir():
        model = str(Path(model).resolve())
    given = {
        "MODEL": model,
        "DTYPE": options.dtype,
        "REPLICAS": options.replicas,
        "PORT": options.port,
        "REDIS_URL": options.redis_url,
        "POLICY": options.policy,
        "LOG": options.log,
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    said = {name: str(value) for name, value in given.items() if value is not None}
    return {**environment, "PATH": path} | said


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in MODULES:
        module, _ = MODULES[given[0]]
        sys.exit(importlib.import_module(module).main(given[1:], prog=f"triad {given[0]}"))
    options = parser().parse_args(given)
    if options.command == "serve":
        os.execvpe("bash", serve_command(options), serve_environment(options, os.environ))
    if options.command == "completion":
        print(shtab.complete(parser(in_full=True), options.shell))
        return
    from cluster.doctor import run  # torch takes seconds to import

    sys.exit(run(options.port, options.redis_url))


if __name__ == "__main__":
    main()
