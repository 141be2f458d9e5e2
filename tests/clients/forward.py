"""Log-probabilities by transformers: `python -m tests.clients.forward` in the server's environment.

Reads a JSON list of [context ids, continuation ids] and writes for each [sum of the continuation's
log-probabilities, whether all of its tokens are the likeliest].
"""

import json
import sys
from pathlib import Path

import replicas
from tests.reference import Reference

CHECKPOINT = Path(replicas.__path__[0]) / "checkpoints" / "triad-5m"


def scored(reference: Reference, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logits = reference.causal_logits([*context, *continuation]).double()
    logits[:, reference.mask_token_id] = float("-inf")
    rows = logits.log_softmax(-1)[len(context) - 1 : -1]
    logprobs = [float(row[token]) for row, token in zip(rows, continuation, strict=True)]
    return sum(logprobs), rows.argmax(-1).tolist() == continuation


if __name__ == "__main__":
    reference = Reference(CHECKPOINT)
    json.dump([scored(reference, *pair) for pair in json.load(sys.stdin)], sys.stdout)
