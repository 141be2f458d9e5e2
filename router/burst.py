"""A short burst of load, bounded in number and time, which lets one see a plan shift."""

import asyncio
import json
import random
import time
import uuid
from typing import Annotated

from pydantic import Field

from policies.control.loop import Clock
from replicas.errors import TriadError
from replicas.messages import GenerateRequest, SamplingParams
from router.auth import ApiKey
from router.console_files import FOLDER
from router.dispatch import Dispatcher
from router.errors import ApiError
from router.fields import INTEGRAL, Strict
from router.generation import Generation
from router.metrics import Metrics
from router.request_log import RequestLog

MAX_TOKENS = 128
REQUEST_TIMEOUT_S = 20.0
"""The time after the burst's own by which its last requests have ended."""
RETRY_S = 0.25
"""The wait after a refusal."""


class BurstBody(Strict):
    """The size of a burst."""

    num_requests: Annotated[int, Field(ge=1, le=64), INTEGRAL] = 32
    """Requests in flight at once."""
    duration_s: Annotated[float, Field(ge=1.0, le=30.0)] = 15.0


class Burst:
    """Bursts of `auto` requests, one at a time; they take the way and the limits of all other requests.

    model: the name for metrics
    """

    def __init__(
        self, dispatcher: Dispatcher, model: str, metrics: Metrics | None, clock: Clock = time.monotonic
    ):
        self._dispatcher = dispatcher
        self._model = model
        self._metrics = metrics
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    @property
    def is_running(self) -> bool:
        return self._task is not None and not self._task.done()

    def start(self, size: BurstBody, key: ApiKey | None) -> None:
        """Starts a burst. Raises ApiError (409) while one runs."""
        if self.is_running:
            raise ApiError(409, "burst_running", "A burst is running; wait until it has ended.")
        self._task = asyncio.create_task(self._run(size, key), name="a burst")

    async def close(self) -> None:
        """Cancels what runs."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, size: BurstBody, key: ApiKey | None) -> None:
        prompts = [example["prompt"] for example in json.loads((FOLDER / "examples.json").read_text())]
        until_s = self._clock() + size.duration_s
        async with asyncio.TaskGroup() as group:
            for number in range(size.num_requests):
                group.create_task(self._client(random.Random(number), prompts, until_s, key))

    async def _client(
        self, rng: random.Random, prompts: list[str], until_s: float, key: ApiKey | None
    ) -> None:
        while self._clock() < until_s:
            try:
                self._dispatcher.check_room()
                await self._ask(rng.choice(prompts), rng.randrange(2**31), key)
            except TriadError:
                await asyncio.sleep(RETRY_S)

    async def _ask(self, prompt: str, seed: int, key: ApiKey | None) -> None:
        request = GenerateRequest(
            request_id=f"burst-{uuid.uuid4().hex}",
            channel_id="",
            prompts=(({"role": "user", "content": prompt},),),
            sampling=SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, seed=seed),
            timeout_s=REQUEST_TIMEOUT_S,
            cache_salt="" if key is None else key.name,
        )
        generation = Generation(self._dispatcher, request)
        record = RequestLog({}, "chat", self._model, key, None, self._metrics, None).of(generation)
        with record:
            async with generation:
                record.first_token()
                await generation.whole()
