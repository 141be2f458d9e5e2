"""Where events wait for their reader, and when it is woken."""

import asyncio
import math

import pytest

from replicas.errors import ErrorCode
from replicas.messages import Delta, Failed
from router.inbox import Inbox
from router.responses import FEW_STREAMS, MAX_INTERVAL_S, chunk_interval_s
from tests.eventually import eventually

END = Failed("r", ErrorCode.CANCELLED, "gone")


def piece(text: str) -> Delta:
    return Delta("r", text, 1)


async def reading(inbox: Inbox, due_s: float) -> asyncio.Task:
    """A task that waits in take(due_s) by now."""
    task = asyncio.create_task(inbox.take(due_s))
    await eventually(lambda: inbox._reader is not None)
    return task


async def test_what_is_due_is_handed_out_as_it_comes():
    inbox = Inbox()
    for text in "ab":
        task = await reading(inbox, 0.0)
        inbox.put(piece(text))
        assert await task == [piece(text)]


async def test_what_comes_before_it_is_due_waits_and_comes_at_once_together():
    inbox = Inbox()
    due_s = asyncio.get_running_loop().time() + 0.05
    task = await reading(inbox, due_s)
    inbox.put(piece("a"))
    inbox.put(piece("b"))
    assert await task == [piece("a"), piece("b")]
    assert asyncio.get_running_loop().time() >= due_s - 1e-3


async def test_what_was_there_before_waits_until_it_is_due():
    inbox = Inbox()
    inbox.put(piece("a"))
    due_s = asyncio.get_running_loop().time() + 0.05
    assert await inbox.take(due_s) == [piece("a")]
    assert asyncio.get_running_loop().time() >= due_s - 1e-3


@pytest.mark.parametrize("due_s", [1e9, math.inf])
async def test_the_end_waits_for_nothing(due_s):
    inbox = Inbox()
    inbox.put(piece("a"))
    task = await reading(inbox, due_s)
    inbox.put(END)
    assert await task == [piece("a"), END]
    inbox.put(piece("a"))
    inbox.put(END)
    assert await inbox.take(due_s) == [piece("a"), END]


async def test_the_first_event_is_shown_and_not_taken():
    inbox = Inbox()
    task = asyncio.create_task(inbox.first())
    await eventually(lambda: inbox._reader is not None)
    inbox.put(piece("a"))
    assert await task == piece("a") == await inbox.first()
    assert inbox.take_now() == [piece("a")]
    assert inbox.take_now() == []


async def test_a_reader_that_is_cancelled_loses_no_event():
    inbox = Inbox()
    task = await reading(inbox, 0.0)
    inbox.put(piece("a"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await inbox.take() == [piece("a")]


def test_the_more_streams_the_longer_between_their_chunks_up_to_a_bound():
    intervals = [chunk_interval_s(num) for num in range(300)]
    assert intervals == sorted(intervals)
    assert set(intervals[: FEW_STREAMS + 1]) == {0.0}
    assert intervals[-1] == MAX_INTERVAL_S
