"""What waits for a reader."""

import asyncio

from replicas.mailbox import Mailbox


async def test_the_reader_is_woken_once_for_all_that_wait() -> None:
    mailbox: Mailbox[int] = Mailbox()
    taken = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    mailbox.put((1, 2))
    mailbox.put((3,))
    assert await taken == [1, 2, 3]


async def test_an_empty_item_wakes_it_too_be_it_there_or_not() -> None:
    mailbox: Mailbox[int] = Mailbox()
    mailbox.put(())
    assert await mailbox.take() == []
    taken = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    assert not taken.done()
    mailbox.put(())
    assert await taken == []


async def test_the_end_comes_after_what_is_there_and_stays() -> None:
    mailbox: Mailbox[int] = Mailbox()
    mailbox.put((1,))
    mailbox.end()
    assert [await mailbox.take() for _ in range(3)] == [[1], None, None]
    waiting: Mailbox[int] = Mailbox()
    taken = asyncio.create_task(waiting.take())
    await asyncio.sleep(0)
    waiting.end()
    assert await taken is None


async def test_a_reader_that_is_cancelled_leaves_what_comes_to_the_next() -> None:
    mailbox: Mailbox[int] = Mailbox()
    gone = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    mailbox.put((1,))
    assert await mailbox.take() == [1]
