"""The yields of a checkpoint's plans and the answers they give, measured before and kept beside its weights.

`python -m training.evaluate --yields` writes the file; a replica starts from it.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from policies.cost import RoundYield

logger = logging.getLogger(__name__)

YIELDS_FILE = "yields.json"
MAX_BYTES = 1 << 20
"""The size past which a file is taken for another."""


@dataclass(frozen=True, slots=True)
class YieldsFile:
    """The content of the file."""

    source: str
    """What measured them, and of what, for people to read."""
    yields: tuple[RoundYield, ...]


_FILE = TypeAdapter(YieldsFile)


def write_yields(checkpoint: Path, yields: list[RoundYield], source: str) -> None:
    """Writes the yields into a checkpoint's folder."""
    text = _FILE.dump_json(YieldsFile(source, tuple(yields)), indent=1)
    (checkpoint / YIELDS_FILE).write_bytes(text + b"\n")


def read_yields(checkpoint: Path) -> tuple[RoundYield, ...]:
    """Reads a checkpoint's yields: none where there is no file, or none that can be read, which is logged."""
    path = checkpoint / YIELDS_FILE
    try:
        if not path.is_file():
            return ()
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        return _FILE.validate_json(path.read_bytes()).yields
    except (OSError, ValueError, ValidationError) as error:
        logger.warning("%s can't be read, so the policy starts from priors: %s", path, error)
        return ()
