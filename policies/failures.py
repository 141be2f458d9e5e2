"""A log of repeated failures that does not grow with their number."""

import logging
import traceback

logger = logging.getLogger(__name__)


class Failures:
    """Logs repeated failures once a kind: by the exception's type and the line that raised it.

    what: the name, in the log, of the action that fails.
    """

    def __init__(self, what: str):
        self._what = what
        self._known: set[tuple[str, str, int]] = set()

    def note(self, error: Exception) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        where = (frames[-1].filename, frames[-1].lineno or 0) if frames else ("", 0)
        kind = (type(error).__name__, *where)
        if kind not in self._known:
            self._known.add(kind)
            logger.error("%s failed; more of this kind is not logged", self._what, exc_info=error)
