"""The live state of the cluster in Redis, through the connections that policies.control.connection opens.

Keys, with the braces as they stand: they put all of an app in one slot of a Redis Cluster, so that
a script may touch several of its keys.

    triad:{app}:load:<replica>   hash: body (JSON), at
    triad:{app}:plan:<replica>   hash: body (JSON), at (last confirmed), since (last changed)
    triad:{app}:replicas         sorted set of replica ids by their last publication
    triad:{app}:leader           the lease, "<owner>:<fencing>"
    triad:{app}:decisions        stream, capped
    triad:{app}:policy           hash: body (JSON), version (policies/control/policy_setting.py)
    triad:{app}:learned:<kind>   string: what replicas of a kind have learned, for 30 days
    triad:{app}:limit:<...>      what an API key has used (router/limits.py)

Every time is the server's own `TIME`, in microseconds; clients' clocks are never compared. Each
method is one script and so one round trip, atomic at the server.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, TypeAlias, TypeVar

from redis.asyncio import RedisCluster
from redis.exceptions import ReadOnlyError, RedisError

from policies.control.codec import DECISIONS, LOADS, PLANS, Codec, MalformedEntry
from policies.control.connection import connect
from policies.control.plan import DecisionRecord, ObservedPlan, ReplicaPlan
from policies.replica_load import LOST_S, ClusterLoad, ObservedLoad, ReplicaLoad

LOAD_EXPIRY_S = LOST_S + 1.0
"""The time after which a load is deleted: past LOST_S, so that a reader sees it through all its ages."""
PLAN_EXPIRY_S = 60.0
"""The time after which a plan that nobody confirms goes; its replica or every leader has left."""
LEASE_S = 1.2
"""The time after which a silent leader is taken to be dead; with a try every 0.2 s it is replaced in 2 s."""
LEARNED_EXPIRY_S = 30 * 86400.0
"""The time after which what replicas of one kind have learned goes, where none of them runs any more."""
MAX_DECISIONS = 1000
"""The number of decisions that the stream keeps."""
POLICY_KEY = "policy"

PolicyEntry: TypeAlias = tuple[str | None, str | None]
"""The body and the version of a policy setting as the store holds them, each None where there is none."""

_CLOCK = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local function text(us) return string.format('%.0f', us) end
"""

# The write proves that the server is no replica: one would show what it was last told, and a client whose
# server has become one would go on reading it.
_PRIMARY = """
local function forget_lost(replicas, expiry_ms)
  redis.call('ZREMRANGEBYSCORE', replicas, '-inf', text(now - expiry_ms * 1000))
end
"""

# pcall where a key may hold anything: an entry of the wrong type is one more malformed entry.
_READ_HASH = """
local function read(key, ...)
  local values = redis.pcall('HMGET', key, ...)
  return values.err and {'wrong type', '', ''} or values
end
"""

_PUBLISH = f"""{_CLOCK}{_PRIMARY}{_READ_HASH}
local load, plan, replicas, policy = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local id, body, expiry_ms = ARGV[1], ARGV[2], ARGV[3]
redis.call('DEL', load)
redis.call('HSET', load, 'body', body, 'at', text(now))
redis.call('PEXPIRE', load, expiry_ms)
redis.call('ZADD', replicas, text(now), id)
forget_lost(replicas, expiry_ms)
return {{now, read(plan, 'body', 'at', 'since'), read(policy, 'body', 'version')}}
"""

_READ = f"""{_CLOCK}{_PRIMARY}{_READ_HASH}
local replicas, leader = KEYS[1], KEYS[2]
local prefix, expiry_ms, with_plans = ARGV[1], ARGV[2], ARGV[3] == '1'
forget_lost(replicas, expiry_ms)
local entries = {{}}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', replicas, text(now - expiry_ms * 1000), '+inf')) do
  local load = read(prefix .. 'load:' .. id, 'body', 'at')
  local plan = with_plans and read(prefix .. 'plan:' .. id, 'body', 'at', 'since') or {{}}
  entries[#entries + 1] = {{id, load, plan}}
end
return {{now, redis.call('GET', leader), entries}}
"""

_WITHDRAW = """
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('ZREM', KEYS[3], ARGV[1])
"""

# The time of acquisition is the fencing number: it grows even over a restart that lost all data.
_ACQUIRE = f"""{_CLOCK}
if redis.call('SET', KEYS[1], ARGV[1] .. ':' .. text(now), 'NX', 'PX', ARGV[2]) then return now end
return false
"""

_RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""

_COMMIT = f"""{_CLOCK}
local leader, decisions = KEYS[1], KEYS[2]
local token, lease_ms, prefix, expiry_ms, max_decisions = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if redis.call('GET', leader) ~= token then return 0 end
redis.call('PEXPIRE', leader, lease_ms)
local at = 5
local function next_arg() at = at + 1; return ARGV[at] end
for _ = 1, tonumber(next_arg()) do
  local key, body, held_us = prefix .. 'plan:' .. next_arg(), next_arg(), next_arg()
  redis.call('DEL', key)
  redis.call('HSET', key, 'body', body, 'at', text(now), 'since', text(now - held_us))
  redis.call('PEXPIRE', key, expiry_ms)
end
for _ = 1, tonumber(next_arg()) do
  local key = prefix .. 'plan:' .. next_arg()
  if redis.pcall('HEXISTS', key, 'body') == 1 then
    redis.call('HSET', key, 'at', text(now))
    redis.call('PEXPIRE', key, expiry_ms)
  end
end
for _ = 1, tonumber(next_arg()) do
  redis.call('XADD', decisions, 'MAXLEN', max_decisions, '*', 'body', next_arg())
end
return 1
"""

Body = TypeVar("Body")


class StoreUnavailable(Exception):
    """Raised when Redis can't be reached, is too slow, still loading, or refuses the command."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write plans, until another controller's lease follows it."""

    owner: str
    fencing: int
    """A number that grows with every lease given; the store refuses writes under an older one."""

    @property
    def token(self) -> str:
        return f"{self.owner}:{self.fencing}"


@dataclass(frozen=True, slots=True)
class ClusterView:
    """All that the store knows at one moment."""

    loads: ClusterLoad
    plans: Mapping[str, ObservedPlan] = field(default_factory=dict)
    """The plans by replica id, of the replicas in `loads` only."""
    leader: str | None = None
    """The owner of the lease, None while nobody has it."""


@dataclass(frozen=True, slots=True)
class PlanWrite:
    """A plan to write."""

    plan: ReplicaPlan
    held_s: float = 0.0
    """The time for which the replica has already run as the plan says; 0 for a shift."""


class LoadStore:
    """One app's state in Redis. Every method raises StoreUnavailable, and works again once Redis does.

    An object belongs to one event loop, with any number of tasks in it.
    url: of one server, the master of some Sentinels, or a Cluster, in the forms of
    policies.control.connection; ValueError if it is none of them.
    """

    def __init__(
        self, url: str, app: str = "triad", *, connect_timeout_s: float = 0.5, command_timeout_s: float = 0.5
    ):
        self._redis = connect(url, connect_timeout_s=connect_timeout_s, command_timeout_s=command_timeout_s)
        # The client's own limits are by step (look-up, connection, greeting, command).
        self._deadline_s = connect_timeout_s + command_timeout_s
        self._prefix = f"triad:{{{app}}}:"
        self.policy_entry: PolicyEntry = (None, None)
        """The setting as the last publication found it; policies/control/policy_setting.py decodes it."""
        self.num_malformed = 0
        """The number of entries skipped so far because they could not be read."""

    async def close(self) -> None:
        await self._redis.aclose()

    async def publish_and_read(self, load: ReplicaLoad) -> ObservedPlan | None:
        """Publishes a replica's load and reads its plan, None if it has none, in one round trip.

        The policy set at run time comes with the plan: `policy_entry`.
        """
        keys = (
            self._load_key(load.replica_id),
            self._plan_key(load.replica_id),
            self._key("replicas"),
            self._key(POLICY_KEY),
        )
        now_us, plan, policy = await self._eval(
            _PUBLISH, keys, load.replica_id, LOADS.encode(load), _ms(LOAD_EXPIRY_S)
        )
        self.policy_entry = (policy[0], policy[1])
        return self._plan(plan, now_us)

    async def withdraw(self, replica_id: str) -> None:
        """Takes a replica that leaves out of everybody's sight at once."""
        keys = (self._load_key(replica_id), self._plan_key(replica_id), self._key("replicas"))
        await self._eval(_WITHDRAW, keys, replica_id)

    async def read_loads(self) -> ClusterLoad:
        return (await self._read(with_plans=False)).loads

    async def read_view(self) -> ClusterView:
        return await self._read(with_plans=True)

    async def acquire_lease(self, owner: str) -> Lease | None:
        """Takes the lease for LEASE_S seconds if nobody has it. owner: unique to this controller."""
        fencing = await self._eval(_ACQUIRE, (self._key("leader"),), owner, _ms(LEASE_S))
        return None if fencing is None else Lease(owner, fencing)

    async def release_lease(self, lease: Lease) -> None:
        await self._eval(_RELEASE, (self._key("leader"),), lease.token)

    async def commit(
        self,
        lease: Lease,
        plans: Mapping[str, PlanWrite],
        confirmed: Iterable[str] = (),
        decisions: Sequence[DecisionRecord] = (),
    ) -> bool:
        """Writes plans, confirms standing ones, logs decisions, and extends the lease to LEASE_S seconds from
        now: all, or, if the lease is lost, nothing.

        Returns False if the lease was lost. confirmed: ids of replicas whose plans stay as they are; a
        replica whose plan is gone from the store is passed over.
        """
        args: list[str | int] = [lease.token, _ms(LEASE_S), self._prefix, _ms(PLAN_EXPIRY_S), MAX_DECISIONS]
        args.append(len(plans))
        for replica_id, write in plans.items():
            args += (replica_id, PLANS.encode(write.plan), round(write.held_s * 1e6))
        confirmed = list(confirmed)
        args += (len(confirmed), *confirmed)
        args += (len(decisions), *(DECISIONS.encode(record) for record in decisions))
        return bool(await self._eval(_COMMIT, (self._key("leader"), self._key("decisions")), *args))

    async def read_learned(self, kind: str) -> str | None:
        """Returns what replicas of a kind (replicas.cost_cache) have learned of their costs, if any has."""
        text = await self._call(self._redis.get(self._key(f"learned:{kind}")))
        return None if text is None else str(text)

    async def write_learned(self, kind: str, text: str) -> None:
        await self._call(self._redis.set(self._key(f"learned:{kind}"), text, px=_ms(LEARNED_EXPIRY_S)))

    async def run(self, script: str, names: Sequence[str], *args: str | int) -> Any:
        """Runs a script that is kept elsewhere, on this app's keys of these names."""
        return await self._eval(script, [self._key(name) for name in names], *args)

    async def recent_decisions(self, num: int = MAX_DECISIONS) -> tuple[DecisionRecord, ...]:
        """Returns the last `num` decisions, newest first."""
        entries = await self._call(self._redis.xrevrange(self._key("decisions"), count=num))
        records = []
        for entry_id, fields in entries:
            record = self._decoded(DECISIONS, fields.get("body", ""))
            if record is not None:
                records.append(replace(record, at_s=int(entry_id.partition("-")[0]) / 1000))
        return tuple(records)

    async def _read(self, with_plans: bool) -> ClusterView:
        now_us, lease, entries = await self._eval(
            _READ,
            (self._key("replicas"), self._key("leader")),
            self._prefix,
            _ms(LOAD_EXPIRY_S),
            int(with_plans),
        )
        loads: list[ObservedLoad] = []
        plans: dict[str, ObservedPlan] = {}
        for replica_id, load_entry, plan_entry in sorted(entries, key=itemgetter(0)):
            load = self._load(replica_id, load_entry, now_us)
            if load is None:
                continue
            loads.append(load)
            plan = self._plan(plan_entry, now_us) if with_plans else None
            if plan is not None:
                plans[replica_id] = plan
        owner = lease.rpartition(":")[0] if lease is not None else None
        return ClusterView(ClusterLoad(tuple(loads)), plans, owner)

    def _load(self, replica_id: str, entry: Sequence[str | None], now_us: int) -> ObservedLoad | None:
        body, at_us = entry[:2]
        load = self._decoded(LOADS, body, at_us)
        if load is None or at_us is None:
            return None
        if load.replica_id != replica_id:
            self.num_malformed += 1
            return None
        return ObservedLoad(load, _age_s(at_us, now_us) + max(0.0, load.silent_s))

    def _plan(self, entry: Sequence[str | None], now_us: int) -> ObservedPlan | None:
        body, at_us, since_us = entry
        plan = self._decoded(PLANS, body, at_us, since_us)
        if plan is None or at_us is None or since_us is None:
            return None
        return ObservedPlan(plan, _age_s(at_us, now_us), _age_s(since_us, now_us))

    def _decoded(self, codec: Codec[Body], body: str | None, *stamps_us: str | None) -> Body | None:
        """Decodes an entry; None if there is none, or if it makes no sense, which is counted."""
        if body is None:
            return None
        try:
            if not all(stamp is not None and stamp.isascii() and stamp.isdigit() for stamp in stamps_us):
                raise MalformedEntry("no time stamp")
            return codec.decode(body)
        except MalformedEntry:
            self.num_malformed += 1
            return None

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _load_key(self, replica_id: str) -> str:
        return self._key(f"load:{replica_id}")

    def _plan_key(self, replica_id: str) -> str:
        return self._key(f"plan:{replica_id}")

    async def _eval(self, script: str, keys: Sequence[str], *args: str | int) -> Any:
        # EVAL and not EVALSHA: a server that has just restarted knows no script, and a second round
        # trip in every such case costs more than these few hundred bytes in each.
        return await self._call(self._redis.eval(script, len(keys), *keys, *args))

    async def _call(self, command: Awaitable[Any]) -> Any:
        task = asyncio.current_task()
        num_cancels = 0 if task is None else task.cancelling()
        try:
            return await self._answer(command)
        finally:
            # The client writes under asyncio.wait_for, which up to Python 3.11 loses a cancellation that
            # comes as the write ends; the loop that called would go on for ever.
            if task is not None and task.cancelling() > num_cancels:
                raise asyncio.CancelledError

    async def _answer(self, command: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(self._deadline_s):
                return await command
        except TimeoutError as error:
            raise StoreUnavailable(f"no answer from Redis within {self._deadline_s:g} s") from error
        except (RedisError, OSError) as error:
            # Old servers wrap what a script's command says in an error of the script's own.
            if isinstance(error, ReadOnlyError) or "READONLY" in str(error):
                await self._leave_server()
            raise StoreUnavailable(f"Redis: {error}") from error

    async def _leave_server(self) -> None:
        """Disconnects from a server that is a replica now, so that the next call looks for the master."""
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            async with asyncio.timeout(self._deadline_s):
                if isinstance(self._redis, RedisCluster):
                    await self._redis.aclose()  # it asks anew who has which slot
                else:
                    # Those in use come back here, and find out for themselves.
                    await self._redis.connection_pool.disconnect(inuse_connections=False)


def _age_s(at_us: str, now_us: int) -> float:
    """Returns an entry's age in seconds.

    An entry from the future, after the server's clock has been set back, counts as old as it is ahead, so
    that one which nobody writes anew does not look fresh until the clock has caught up.
    """
    return abs(now_us - int(at_us)) / 1e6


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
