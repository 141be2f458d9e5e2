"""The periodic loop outlives its steps; whoever started it can tell that it has ended."""

import asyncio

import pytest

from policies.control.loop import check_running


async def test_a_loop_that_has_ended_is_told_of_whatever_it_ended_by() -> None:
    async def fails() -> None:
        raise ValueError("a bad reading")

    async def returns() -> None:
        return

    running = asyncio.create_task(asyncio.Event().wait(), name="runs")
    check_running((running,))  # type: ignore[arg-type]
    cancelled = asyncio.create_task(asyncio.sleep(60), name="the cancelled one")
    ended = [
        asyncio.create_task(fails(), name="the failed one"),
        asyncio.create_task(returns(), name="the returned one"),
        cancelled,
    ]
    cancelled.cancel()
    await asyncio.wait(ended)
    for loop in ended:
        with pytest.raises(RuntimeError, match=f"{loop.get_name()} has ended"):
            check_running((running, loop))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="a bad reading"):
        check_running(ended)
    running.cancel()
