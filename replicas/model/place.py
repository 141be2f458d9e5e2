"""Where a checkpoint is, told without torch."""

import re
from pathlib import Path

from replicas.model.fields import CheckpointError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def local_folder(checkpoint: str) -> Path | None:
    """The folder of a checkpoint; None where there is none of that name, and the hub may have it.

    Raises CheckpointError where it can be neither.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_NAME.fullmatch(checkpoint):
        raise CheckpointError(f"{checkpoint} is neither a folder nor a hub name like 'owner/model'")
    return None
