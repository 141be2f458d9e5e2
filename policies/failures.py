"""Failures that are gone on without, told of in a log that does not grow with their number."""

import logging
import traceback
from contextlib import AbstractContextManager
from types import TracebackType

logger = logging.getLogger(__name__)


class Failures(AbstractContextManager[None]):
    """A context that keeps an Exception raised in it from whoever does the work.

    what: the work's name, for the log

    Each kind, by its type and the line that raised it, is logged once, with its traceback. What is no
    Exception, as a cancellation, passes.
    """

    def __init__(self, what: str):
        self._what = what
        self._known: set[tuple[str, str, int]] = set()
        self.num_in_row = 0
        """Failures since it last went well."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, Exception):
            self._note(error)
            return True
        if error is None:
            self.num_in_row = 0
        return False

    def _note(self, error: Exception) -> None:
        self.num_in_row += 1
        frames = traceback.extract_tb(error.__traceback__)
        where = (frames[-1].filename, frames[-1].lineno or 0) if frames else ("", 0)
        kind = (type(error).__name__, *where)
        if kind not in self._known:
            self._known.add(kind)
            logger.error(
                "%s failed, and is gone on without; more of this kind is not logged",
                self._what,
                exc_info=error,
            )
