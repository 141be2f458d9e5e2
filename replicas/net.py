"""A net for failures in work that no request waits for: none is to end for them, but ended loops are
noticed."""

import asyncio
import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import TracebackType

logger = logging.getLogger(__name__)


class Net(AbstractContextManager[None]):
    """Keeps an exception of what is done in it from whoever does it. Logs the first, with its traceback.

    what: the name of what is done in it, for the log
    has_caught: True once it has caught something
    """

    def __init__(self, what: str):
        self._what = what
        self.has_caught = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        if not self.has_caught:
            self.has_caught = True
            logger.error(
                "%s failed, and is gone on without; more of this is not logged",
                self._what,
                exc_info=error,
            )
        return True


def check_running(loops: Iterable["asyncio.Task[None]"]) -> None:
    """Raises RuntimeError where one of the loops has ended, whatever it ended by."""
    for loop in loops:
        if loop.done():
            error = None if loop.cancelled() else loop.exception()
            raise RuntimeError(f"{loop.get_name()} has ended: {error!r}") from error
