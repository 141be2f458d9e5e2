"""Runs the clients, each suite in an environment of its own, against one real server: `make test-clients`.

    python -m tests.clients                 all suites
    python -m tests.clients openai2 node    some
    python -m tests.clients --url URL       against a server that runs, which serves triad-5m under that name

Clients that want different releases of one package can't share an environment. Ends with 1 if a suite fails.
A suite without its environment fails too, but those for Node are skipped where there is none.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from benchmarks.processes import Triad

ROOT = Path(__file__).parent.parent.parent
HERE = "tests/clients"
URL = "TRIAD_CLIENTS_URL"
SUITES = {
    "openai3": ("openai", "anthropic", "litellm", "langchain", "pydantic_ai", "openai_agents", "lm_eval"),
    "openai2": ("openai", "instructor", "llama_index"),
    "openai1": ("aisuite",),
    "agents": (
        "autogen",
        "ag2",
        "haystack",
        "outlines",
        "smolagents",
        "dspy",
        "llm",
        "inspect",
        "litellm_proxy",
    ),
    "kernel": ("semantic_kernel",),
}
"""Of each environment for Python, `tests/clients/<name>.txt`, the files of tests."""
NODE_SUITES = ("node", "promptfoo")
"""Folders with tests for Node."""


def command(suite: str, environments: Path) -> list[str]:
    """The command that runs a suite."""
    if suite in NODE_SUITES:
        folder = ROOT / HERE / suite
        own = folder / "node_modules" / "node" / "bin" / "node"  # of those that want a newer one
        return [str(own) if own.exists() else "node", "--test", *map(str, sorted(folder.glob("*.test.mjs")))]
    files = [f"{HERE}/test_{name}.py" for name in SUITES[suite]]
    # Without the conftest above, which needs packages that clients have no use for.
    return [str(environments / suite / "bin" / "python"), "-m", "pytest", f"--confcutdir={HERE}", *files]


def run(suites: Sequence[str], environments: Path, url: str) -> list[str]:
    """Runs the suites; returns those that failed."""
    env = os.environ | {URL: url, "TRIAD_PYTHON": sys.executable}
    failed = []
    for suite in suites:
        print(f"== {suite} ==", flush=True)
        missing = [name for name in ("node", "npm") if suite in NODE_SUITES and shutil.which(name) is None]
        if missing:
            print(f"skipped: there is no {' and no '.join(missing)} here (20 or newer is wanted)")
        elif subprocess.run(command(suite, environments), cwd=ROOT, env=env).returncode:
            failed.append(suite)
    return failed


def main() -> None:
    known = [*SUITES, *NODE_SUITES]
    parser = argparse.ArgumentParser(prog="tests.clients")
    parser.add_argument("suites", nargs="*", metavar="suite", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--url", help="a server that runs; by default one is started")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-clients")
    options = parser.parse_args()
    if unknown := set(options.suites) - set(known):
        parser.error(f"there is no suite {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    with nullcontext() if options.url else Triad() as server:
        url = options.url or server.url
        failed = run(options.suites or known, options.environments, url)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
