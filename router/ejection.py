"""Ejection of replicas that fail what they are sent, so that requests go elsewhere for a while.

A replica that fails each request at once is the emptiest there is, and would draw all of them. One that
fails MAX_FAILURES requests in a row, with no answer between, is left out for EJECTED_S, and after that by
each further failure for twice as long, up to MAX_EJECTED_S, until an answer ends well: outlier
ejection by consecutive errors, as in Envoy (envoyproxy.io, "Outlier detection").
"""

from collections.abc import Sequence
from dataclasses import dataclass

MAX_FAILURES = 3
EJECTED_S = 5.0
MAX_EJECTED_S = 60.0


@dataclass(slots=True)
class _Record:
    num_failures: int = 0
    ejected_until_s: float = 0.0


class FailureWatch:
    """One router's count of replicas' failures: internal errors, lost channels, but no rightful refusals.

    `now_s` is any clock that only moves forward. Not for use by several threads at once.
    """

    def __init__(self) -> None:
        self._failing: dict[str, _Record] = {}

    def failed(self, replica_id: str, now_s: float) -> None:
        """Counts a failed request, unless the replica is left out: one sent before says nothing new."""
        record = self._failing.setdefault(replica_id, _Record())
        if now_s < record.ejected_until_s:
            return
        record.num_failures += 1
        num_more = record.num_failures - MAX_FAILURES
        if num_more >= 0:
            record.ejected_until_s = now_s + min(EJECTED_S * 2.0 ** min(num_more, 10), MAX_EJECTED_S)

    def succeeded(self, replica_id: str) -> None:
        """Clears the replica's failures, since it has answered a request to its end."""
        self._failing.pop(replica_id, None)

    def forget(self, replica_id: str) -> None:
        self._failing.pop(replica_id, None)

    def is_ejected(self, replica_id: str, now_s: float) -> bool:
        record = self._failing.get(replica_id)
        return record is not None and now_s < record.ejected_until_s

    def trusted(self, replica_ids: Sequence[str], now_s: float) -> Sequence[str]:
        """The replicas that are not left out; all where that would leave none, for a bad one may recover."""
        if not self._failing:
            return replica_ids
        trusted = [replica_id for replica_id in replica_ids if not self.is_ejected(replica_id, now_s)]
        return trusted or replica_ids
