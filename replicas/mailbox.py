"""Items on their way from callbacks to one task of the same event loop."""

import asyncio
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Items in their order; the one task that takes them is woken once for all that wait.

    An asyncio.Queue wakes it for each, and takes several times as long to do it.
    """

    def __init__(self) -> None:
        self._items: list[T] = []
        self._reader: asyncio.Future[None] | None = None
        self._has_news = False
        self._has_ended = False

    def put(self, items: Iterable[T]) -> None:
        """Adds items, of which there may be none: that wakes the reader, too."""
        self._items += items
        self._wake()

    def end(self) -> None:
        """Says that nothing comes after what is there."""
        self._has_ended = True
        self._wake()

    async def take(self) -> list[T] | None:
        """Waits until something is put and takes all that is there, maybe nothing; None at the end."""
        if not self._has_news and not self._has_ended:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        self._has_news = False
        if not self._items and self._has_ended:
            return None
        items, self._items = self._items, []
        return items

    def _wake(self) -> None:
        self._has_news = True
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
