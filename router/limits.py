"""The limits of an API key: requests and tokens a minute, counted in Redis for all ingresses together.

GCRA (the leaky bucket as a meter, ITU-T I.371): of each limit Redis keeps one time, when the bucket
would be full again, and when that was written: where the server's clock has been set back since, both
move with it, and nobody is locked out until it has caught up. A bucket holds one minute's worth. Tokens
are charged before a request by an estimate and settled by the true number after it, so that a crowd of
requests at once can't each see a full bucket.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from policies.control.store import LoadStore, StoreUnavailable
from replicas.messages import GenerateRequest, Prompt
from router.auth import ApiKey
from router.errors import ApiError, rate_limited

logger = logging.getLogger(__name__)

CHARS_PER_TOKEN = 4
DEFAULT_COMPLETION = 256
"""Tokens charged beforehand for a choice whose request names no max_tokens."""
BLIND_S = 1.0
"""The time for which Redis is not asked after it failed, so that requests don't each wait for it."""

MAX_CALLS = 32
"""The most calls to Redis at once; more queue here, since the client refuses what its pool can't hold."""

_MINUTE_US = 60_000_000

_BUCKET = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local function full_at(key)
  local stored = redis.pcall('GET', key)
  local at, written = string.match(type(stored) == 'string' and stored or '', '^(%d+):(%d+)$')
  if not at then return now end
  local set_back = math.max(0, tonumber(written) - now)
  return math.max(tonumber(at) - set_back, now)
end
local function set(key, at)
  local text = string.format('%.0f:%.0f', at, now)
  return redis.call('SET', key, text, 'PX', math.ceil((at - now) / 1000) + 1000)
end
"""

# Both buckets are charged, or, where one has too little left, neither is. A request of more than a
# whole bucket's tokens goes when the bucket is full, and leaves it in debt.
_CHARGE = f"""{_BUCKET}
local window = tonumber(ARGV[1])
local requests, tokens = tonumber(ARGV[2]), tonumber(ARGV[3])
local after_requests, after_tokens = full_at(KEYS[1]) + requests, full_at(KEYS[2]) + tokens
local wait_requests = requests > 0 and after_requests - now - window or 0
local wait_tokens = tokens > 0 and after_tokens - math.max(tokens - window, 0) - now - window or 0
if wait_requests > 0 or wait_tokens > 0 then
  return {{math.max(wait_requests, wait_tokens), wait_requests > wait_tokens and 'requests' or 'tokens'}}
end
if requests > 0 then set(KEYS[1], after_requests) end
if tokens > 0 then set(KEYS[2], after_tokens) end
return {{0, ''}}
"""

_SETTLE = f"""{_BUCKET}
local at = full_at(KEYS[1]) + tonumber(ARGV[1])
if at <= now then return redis.call('DEL', KEYS[1]) end
return set(KEYS[1], at)
"""


@dataclass(frozen=True, slots=True)
class Charge:
    """Tokens charged to a key before its request."""

    key: ApiKey
    num_tokens: int
    """All tokens, the prompt's included."""
    num_prompt: int


class KeyLimiter:
    """Charges API keys for their requests, and turns away those over their limits.

    store: one with a short timeout, since requests of a limited key wait for it, and nothing else does
    when_lost: the fate of a limited key without Redis: let in ("open") or turned away ("closed")
    """

    def __init__(
        self,
        store: LoadStore,
        when_lost: Literal["open", "closed"] = "open",
        clock: Callable[[], float] = time.monotonic,
    ):
        self._store = store
        self._when_lost = when_lost
        self._clock = clock
        self._blind_until_s = clock()
        self._calls = asyncio.Semaphore(MAX_CALLS)
        self._settling: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        await asyncio.gather(*self._settling, return_exceptions=True)
        await self._store.close()

    async def charge(self, key: ApiKey | None, request: GenerateRequest) -> Charge | None:
        """Charges for a request; None where nothing is counted.

        Raises ApiError: 429 over a limit, 503 closed without Redis.
        """
        if key is None or (key.requests_per_minute is None and key.tokens_per_minute is None):
            return None
        num_prompt = estimated_prompt_tokens(request)
        num_tokens = num_prompt + request.num_indices * _num_wanted(request)
        names = (f"limit:{key.name}:requests", f"limit:{key.name}:tokens")
        requests_us = _per_minute_us(key.requests_per_minute, 1)
        tokens_us = _per_minute_us(key.tokens_per_minute, num_tokens)
        try:
            async with self._calls:
                if self._clock() < self._blind_until_s:
                    self._check_without_redis()
                    return None
                wait_us, which = await self._store.run(_CHARGE, names, _MINUTE_US, requests_us, tokens_us)
        except StoreUnavailable as error:
            if self._blind_until_s <= self._clock():
                logger.warning("limits are not counted (%s): %s", self._when_lost, error)
            self._blind_until_s = self._clock() + BLIND_S
            self._check_without_redis()
            return None
        if wait_us > 0:
            limit = key.requests_per_minute if which == "requests" else key.tokens_per_minute
            raise rate_limited(f"The limit of {limit} {which} a minute is used up", wait_us / 1e6)
        return None if key.tokens_per_minute is None else Charge(key, num_tokens, num_prompt)

    def settle(self, charge: Charge | None, num_tokens: int) -> None:
        """Corrects a charge to what the request used; nobody waits for it."""
        if charge is None or num_tokens == charge.num_tokens:
            return
        task = asyncio.create_task(self._settle(charge.key, num_tokens - charge.num_tokens))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _settle(self, key: ApiKey, num_more: int) -> None:
        amount_us = _per_minute_us(key.tokens_per_minute, num_more)
        try:
            async with self._calls:
                await self._store.run(_SETTLE, (f"limit:{key.name}:tokens",), amount_us)
        except StoreUnavailable as error:
            logger.debug("a charge of %s stays an estimate: %s", key.name, error)

    def _check_without_redis(self) -> None:
        if self._when_lost == "closed":
            message = "The server can't count this key's requests at the moment; try again."
            raise ApiError(
                503, "limits_unavailable", message, type_="service_unavailable_error", retry_after_s=1
            )


def _num_wanted(request: GenerateRequest) -> int:
    """The tokens that a choice is charged beforehand."""
    wanted = request.sampling.max_tokens
    return DEFAULT_COMPLETION if wanted is None else wanted


def estimated_prompt_tokens(request: GenerateRequest) -> int:
    """The tokens of all prompts, each counted once as in usage; see _estimated."""
    return sum(map(_estimated, request.prompts))


def _estimated(prompt: Prompt) -> int:
    """A prompt's tokens: exact for ids, for text as is common of tokenizers, which only replicas have."""
    if isinstance(prompt, str):
        return 1 + len(prompt) // CHARS_PER_TOKEN
    return sum(1 if isinstance(part, int) else 4 + len(part["content"]) // CHARS_PER_TOKEN for part in prompt)


def _per_minute_us(per_minute: int | None, amount: int) -> int:
    """The microseconds by which an amount moves a bucket of this rate; 0 without a limit."""
    return 0 if per_minute is None else round(amount * _MINUTE_US / per_minute)
