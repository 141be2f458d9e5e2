"""How long the loop is held in one go."""

import asyncio
import time


class Stall:
    """The most CPU time that the loop's thread took in one go, whatever else the machine does."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    async def run(self) -> None:
        while True:
            before_s = time.thread_time()
            await asyncio.sleep(0)
            self.longest_s = max(self.longest_s, time.thread_time() - before_s)
