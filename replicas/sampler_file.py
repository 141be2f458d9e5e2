"""A checkpoint's learned sampler, kept beside its weights: `python -m training.sampler` writes the file.

It is of these weights alone: with others its trust means nothing.
"""

import json
from dataclasses import asdict
from pathlib import Path

from policies.modes import MAX_RISK
from replicas.engine.decoders.learned_sampler import LearnedSampler, Weights
from replicas.model.fields import CheckpointError, Fields, read_json

SAMPLER_FILE = "sampler.json"
VERSION = 1
MAX_WEIGHT = 1000.0
MIN_RISK = 1e-6
_LEAST = {"odds": 0.0}
_MOST = {"doubts": 0.0}


def write_sampler(checkpoint: Path, sampler: LearnedSampler, source: str) -> None:
    """Writes a sampler into a checkpoint's folder.

    source: what fitted it, and to what, for people to read.
    """
    raw = {"version": VERSION, "source": source, **asdict(sampler)}
    (checkpoint / SAMPLER_FILE).write_text(json.dumps(raw, indent=1) + "\n")


def read_sampler(checkpoint: Path) -> LearnedSampler | None:
    """Reads a checkpoint's sampler; None where there is no file.

    Raises CheckpointError for one that can't be gone by, since answers would depend on that.
    """
    path = checkpoint / SAMPLER_FILE
    if not path.exists():
        return None
    raw = read_json(path)
    fields = Fields(raw, SAMPLER_FILE)
    if raw.get("version") != VERSION:
        raise fields.error(
            "version", f"must be {VERSION}, got {raw.get('version')!r}; make the file anew or delete it"
        )
    given = fields.object("weights")
    names = Weights.__dataclass_fields__
    if unknown := sorted(given.keys() - names.keys()):
        raise CheckpointError(f"{SAMPLER_FILE}: weights has {', '.join(unknown)}, which nothing is known of")
    weights = Fields(given, SAMPLER_FILE, "weights.")
    numbers = {
        name: weights.number(name, None, _LEAST.get(name, -MAX_WEIGHT), _MOST.get(name, MAX_WEIGHT))
        for name in names
    }
    return LearnedSampler(Weights(**numbers), fields.number("risk", None, MIN_RISK, MAX_RISK))
