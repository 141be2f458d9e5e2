"""The policy an operator has set while the cluster runs: kept in the store, followed by all.

Every process that decides has a PolicyWatch. A replica's applies the setting that comes with each
publication of its load, an ingress's polls the store. A store that has lost its data is given the setting
back by any process that remembers it.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from policies.control.loop import run_every
from policies.control.store import POLICY_KEY, LoadStore, PolicyEntry, StoreUnavailable
from policies.failures import Failures
from policies.policy import Policy
from policies.registry import PolicyError, create_policy

logger = logging.getLogger(__name__)

WATCH_PERIOD_S = 0.5
"""The period at which PolicyWatch.run polls the store."""
MAX_SETTING_CHARS = 16_384
"""The longest setting that is kept, as JSON: every replica reads it five times a second."""

# The version is the server's time, and grows even when that is set back.
_WRITE = """
local time = redis.call('TIME')
local stored = tonumber((redis.pcall('HGET', KEYS[1], 'version'))) or 0
local version = string.format('%.0f', math.max(time[1] * 1000000 + time[2], stored + 1))
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'body', ARGV[1], 'version', version)
return version
"""

_READ = """
local values = redis.pcall('HMGET', KEYS[1], 'body', 'version')
return values.err and {'wrong type', '0'} or values
"""

_RESTORE = """
local stored = tonumber((redis.pcall('HGET', KEYS[1], 'version'))) or 0
if stored >= tonumber(ARGV[2]) then return 0 end
redis.call('DEL', KEYS[1])
return redis.call('HSET', KEYS[1], 'body', ARGV[1], 'version', ARGV[2])
"""


@dataclass(frozen=True, slots=True)
class PolicyChoice:
    """A policy by name and parameters, as create_policy takes them."""

    policy: str
    policy_params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PolicySetting:
    """A setting as the store holds it."""

    choice: PolicyChoice | None
    """The policy that is set; None for the configured one again."""
    version: int
    """The server's time of the setting in microseconds; grows with each."""


_BODY: TypeAdapter[PolicyChoice | None] = TypeAdapter(PolicyChoice | None)


async def read_setting(store: LoadStore) -> PolicySetting | None:
    """Reads the setting; None if there is none that this version can read. Raises StoreUnavailable."""
    try:
        return _decoded(await _read(store))
    except ValueError:
        return None


async def _read(store: LoadStore) -> PolicyEntry:
    body, version = await store.run(_READ, (POLICY_KEY,))
    return body, version


def _decoded(entry: PolicyEntry) -> PolicySetting | None:
    """Decodes an entry; None if it is empty. Raises ValueError for one that this version can't read."""
    body, version = entry
    if body is None or version is None:
        return None
    if not (version.isascii() and version.isdigit()):
        raise ValueError(f"the version is {version[:100]!r}, no number")
    return PolicySetting(_BODY.validate_json(body), int(version))


async def write_setting(store: LoadStore, choice: PolicyChoice | None) -> PolicySetting:
    """Writes a setting, of a choice that create_policy takes.

    Raises StoreUnavailable, and PolicyError for a setting that is too long.
    """
    body = _BODY.dump_json(choice).decode()
    if len(body) > MAX_SETTING_CHARS:
        raise PolicyError(
            f"the setting has {len(body)} characters as JSON; at most {MAX_SETTING_CHARS} are kept"
        )
    version = await store.run(_WRITE, (POLICY_KEY,), body)
    return PolicySetting(choice, int(version))


class PolicyWatch:
    """Calls on_change with the policy to decide by, each time it changes.

    A setting that can't be created here is logged, and the policy before it goes on.
    configured: the policy where nothing is set.
    """

    def __init__(
        self,
        store: LoadStore,
        configured: PolicyChoice,
        on_change: Callable[[Policy[Any]], None],
    ):
        self._store = store
        self._configured = configured
        self._on_change = on_change
        self._setting: PolicySetting | None = None
        self._in_force = configured
        self._unread: PolicyEntry | None = None  # what could not be read, and was warned of

    @property
    def configured(self) -> PolicyChoice:
        return self._configured

    @property
    def setting(self) -> PolicySetting | None:
        """The last setting seen, whether or not it can be used here."""
        return self._setting

    @property
    def in_force(self) -> PolicyChoice:
        """What is decided by here."""
        return self._in_force

    async def set(self, choice: PolicyChoice | None) -> PolicySetting:
        """Sets the policy for all, None the configured one. Raises StoreUnavailable or PolicyError."""
        if choice is not None:
            create_policy(choice.policy, choice.policy_params)
        setting = await write_setting(self._store, choice)
        self._take(setting)
        return setting

    async def run(self) -> None:
        """Polls the store until cancelled."""
        failures = Failures("reading the policy setting")
        await run_every(WATCH_PERIOD_S, self.step, asyncio.Event(), time.monotonic, asyncio.sleep, failures)

    async def step(self) -> None:
        """Reads the setting and applies it. Never raises StoreUnavailable: the setting then stays."""
        try:
            entry = await _read(self._store)
        except StoreUnavailable:
            return
        await self.apply(entry)

    async def apply(self, entry: PolicyEntry) -> None:
        """Takes over a setting that was read; writes only to a store that has lost the one known here."""
        stored, known = self._readable(entry), self._setting
        if known is not None and (stored is None or stored.version < known.version):
            body = _BODY.dump_json(known.choice).decode()
            with contextlib.suppress(StoreUnavailable):
                await self._store.run(_RESTORE, (POLICY_KEY,), body, str(known.version))
        elif stored is not None:
            self._take(stored)

    def _readable(self, entry: PolicyEntry) -> PolicySetting | None:
        """Decodes an entry; None if it is empty, or can't be read by this version, which is logged once."""
        try:
            return _decoded(entry)
        except ValueError as error:
            if entry != self._unread:
                logger.warning("the policy setting in the store can't be read: %s", error)
                self._unread = entry
            return None

    def _take(self, setting: PolicySetting) -> None:
        if self._setting is not None and setting.version <= self._setting.version:
            return
        self._setting = setting
        choice = setting.choice or self._configured
        if choice == self._in_force:
            return
        try:
            policy = create_policy(choice.policy, choice.policy_params)
        except Exception as error:  # a dotted name imports what may raise anything
            logger.error("the policy that was set can't be used here, the one before goes on: %s", error)
            return
        self._in_force = choice
        logger.info("policy now %s, set at run time", choice.policy)
        self._on_change(policy)
