"""How far long work has come, as lines in the log: what a server does before it serves has no terminal."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

EVERY_S = 2.0

T = TypeVar("T")


def logged(
    items: Iterable[T],
    total: int,
    what: str,
    logger: logging.Logger,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[T]:
    """Passes the items on and logs how many are dealt with, every EVERY_S seconds, of longer work the end.

    `cluster.welcome` reads these lines and shows them as a bar. what: such as 'warming up'
    """
    began_s = told_s = clock()
    for number, item in enumerate(items, 1):
        yield item
        now_s = clock()
        if now_s - told_s >= EVERY_S or (number == total and told_s > began_s):
            told_s = now_s
            logger.info("%s: %d of %d after %.0f s", what, number, total, now_s - began_s)
