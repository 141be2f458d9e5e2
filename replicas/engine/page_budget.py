"""Tells which sequences may begin to run, by the pages that they and those before them will want next."""

from collections.abc import Sequence as Seq

from replicas.engine.batch import ModelSpec
from replicas.engine.blocks import PagePool
from replicas.engine.decoders.choose import plan_for
from replicas.engine.sequence import ActivePlan, Sequence


class PageBudget:
    """The room in the pool for sequences that are to run from this step on, asked for in their order of rank.

    A sequence has room where the pool has the pages of a round for it and for each that comes before it. With
    its prompt's pages alone it would lose them to another's next block, come back as soon as its prompt fits
    again, and lose them again. Those behind it don't count: it takes their pages, and not they its own.
    """

    def __init__(self, pool: PagePool, spec: ModelSpec, active: ActivePlan, running: Seq[Sequence]):
        """running: by rank."""
        self._pool = pool
        self._spec = spec
        self._active = active
        self._uncounted = list(reversed(running))
        self._num_promised = 0  # pages still to be taken by those that come before

    def has_room(self, sequence: Sequence) -> bool:
        while self._uncounted and self._uncounted[-1].rank < sequence.rank:
            self.promise(self._uncounted.pop())
        return self._num_promised + self._num_missing(sequence) <= self._pool.num_free

    def promise(self, sequence: Sequence) -> None:
        """Keeps the pages of a sequence's next round for it."""
        self._num_promised += self._num_missing(sequence)

    def _num_missing(self, sequence: Sequence) -> int:
        """Pages that the sequence lacks up to the end of its round in progress, or of its next."""
        plan = sequence.round_plan if sequence.round is not None else None
        if plan is None:
            plan = plan_for(sequence, self._active, self._spec).decode
        end = min(sequence.prefill_end + plan.block_length, self._spec.max_context)
        return max(0, self._pool.pages_for(end) - len(sequence.pages))
