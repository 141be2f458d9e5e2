"""The replicas that have the beginning of a prompt in their prefix cache, as far as a router can tell.

A router can't see the caches. It remembers where it sent what, by hashes of the text, forgets the
oldest, and trusts a memory the less the older it is. Local to the router: nothing on a request's
path asks anybody.
"""

from collections import OrderedDict
from collections.abc import Sequence

CHUNK_CHARS = 256
"""The characters that one hash covers; about 64 tokens, a few pages."""
MAX_CHUNKS = 64
"""The most chunks of a prompt that count: by then the best replica is known."""
MAX_ENTRIES = 65_536
MAX_HOLDERS = 4
"""Replicas remembered for one beginning."""
HALF_LIFE_S = 60.0


def prefix_keys(prompt: str | Sequence[int], salt: str = "") -> tuple[int, ...]:
    """One key for each full chunk of the prompt, each standing for all the text up to its end.

    salt: prompts of different ones share nothing, as in the replicas' caches

    Token ids count as four characters each. Keys are Python's own hash and mean something in one process
    only.
    """
    length = CHUNK_CHARS if isinstance(prompt, str) else CHUNK_CHARS // 4
    keys = []
    key = hash(salt)
    for end in range(length, min(len(prompt), length * MAX_CHUNKS) + 1, length):
        chunk = prompt[end - length : end]
        key = hash((key, chunk if isinstance(chunk, str) else tuple(chunk)))
        keys.append(key)
    return tuple(keys)


class PrefixMap:
    """The replicas that prompts went to, by key; bounded. `now_s` is any clock that only moves forward."""

    def __init__(self, max_entries: int = MAX_ENTRIES, half_life_s: float = HALF_LIFE_S):
        self._max_entries = max_entries
        self._half_life_s = half_life_s
        self._holders: OrderedDict[int, dict[str, float]] = OrderedDict()  # key -> replica -> when

    def __len__(self) -> int:
        return len(self._holders)

    def sent(self, keys: Sequence[int], replica_id: str, now_s: float) -> None:
        """Remembers that a prompt with these keys has gone to the replica."""
        for key in keys:
            holders = self._holders.setdefault(key, {})
            self._holders.move_to_end(key)
            holders.pop(replica_id, None)  # so that the dict stays in order of time
            holders[replica_id] = now_s
            if len(holders) > MAX_HOLDERS:
                del holders[next(iter(holders))]
        while len(self._holders) > self._max_entries:
            self._holders.popitem(last=False)

    def held(self, keys: Sequence[int], now_s: float) -> dict[str, float]:
        """The share of the prompt that a replica probably has, by id: above 0 up to 1, others left out."""
        shares: dict[str, float] = {}
        for count, key in enumerate(keys, start=1):
            holders = self._holders.get(key)
            if not holders:
                break  # a cache has no chunk whose beginning it lacks
            for replica_id, at_s in holders.items():
                trust = 0.5 ** ((now_s - at_s) / self._half_life_s)
                shares[replica_id] = max(shares.get(replica_id, 0.0), trust * count / len(keys))
        return shares

    def forget(self, replica_id: str) -> None:
        """Forgets a replica that is gone, and its cache with it."""
        for key in [key for key, holders in self._holders.items() if replica_id in holders]:
            del self._holders[key][replica_id]
            if not self._holders[key]:
                del self._holders[key]
