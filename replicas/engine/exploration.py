"""Exploration: rounds of plans that are not in force, so that what they bring stays known."""

from collections.abc import Iterable

from policies.cost import RoundStats
from policies.modes import DecodePlan, Mode
from policies.policy import ExploredPlans
from replicas.engine.batch import ModelSpec
from replicas.engine.decoders.choose import ActivePlan, plan_for
from replicas.engine.sequence import Sequence

MAX_CREDIT = 4.0
"""Forwards that may have been saved up for exploration."""


class Exploration:
    """The plans to explore, whose turn it is, and the sequences whose round in progress explores it.

    All sequences that begin a round before the first exploring one has ended explore the same plan, so
    that it is seen as it would be in force: with all of them in it. Self-speculation without a draft yet
    takes two rounds, since the first verifies nothing.
    """

    def __init__(self, spec: ModelSpec, overlaps_blocks: bool):
        self.explored_plans: ExploredPlans | None = None
        """The plans of `auto` rounds to explore, whatever the active one; None for none."""
        self._spec = spec
        self._overlaps_blocks = overlaps_blocks
        self._credit = 0.0  # forwards that may go into it
        self._num_turns = 0  # that have ended
        self._has_turn = False  # whether a round may begin without credit, beside those of this turn
        self._sequences: set[Sequence] = set()
        self._opening: dict[Sequence, RoundStats | None] = {}  # those whose round has no draft, or had none

    def explores(self, sequence: Sequence) -> bool:
        """True if the sequence's round in progress explores a plan."""
        return sequence in self._sequences

    def plan_for(self, sequence: Sequence) -> DecodePlan | None:
        """The plan that the sequence's next round is to explore; None to run what is in force.

        It is None for a request that pins its mode, or may not run the plan as it is.
        """
        if sequence in self._opening:
            return sequence.round_plan
        explored = self.explored_plans
        if explored is None or (self._credit < 1.0 and not self._has_turn):
            return None
        plan = explored.plans[self._num_turns % len(explored.plans)]
        if sequence.decoding.mode is not None:
            return None
        return plan if plan_for(sequence, ActivePlan(plan, ""), self._spec).decode == plan else None

    def needs_safe_point(self, sequence: Sequence) -> bool:
        """True if the round in progress must be followed by no other: it explores, or the next one is to."""
        return sequence in self._sequences or self.plan_for(sequence) is not None

    def began(self, sequence: Sequence) -> None:
        """The sequence has begun a round of the plan that plan_for() gave."""
        is_speculation = sequence.round is not None and sequence.round.mode is Mode.SELF_SPECULATION
        if is_speculation and sequence not in self._sequences and not sequence.draft.token_ids:
            self._opening[sequence] = None
        self._sequences.add(sequence)
        self._has_turn = True

    def count_forward(self, sequences: Iterable[Sequence]) -> None:
        """Earns a forward's share of credit, and spends one where a sequence in it explores.

        Credit may fall below 0: a plan that takes more forwards delays the next.
        """
        if self.explored_plans is None:
            return
        self._credit = min(self._credit + self.explored_plans.share, MAX_CREDIT)
        if any(sequence in self._sequences for sequence in sequences):
            self._credit -= 1.0

    def ended(self, sequence: Sequence, made: RoundStats) -> RoundStats | None:
        """The stats of a round that has ended, as they would be in force; it may have explored or not.

        None where the next round completes it.
        """
        if sequence not in self._sequences:
            return made
        if sequence in self._opening and self._opening[sequence] is None:
            self._opening[sequence] = made
            return None
        opening = self._opening.pop(sequence, None)
        self._sequences.discard(sequence)
        if self._has_turn:
            self._has_turn = False
            self._num_turns += 1
        if made.plan.mode is Mode.DIFFUSION and self._overlaps_blocks:
            # In force it would have been begun in the commit before.
            return made._replace(forwards=max(1, made.forwards - 1))
        if opening is not None and not sequence.draft.token_ids:
            # In force a refused draft is followed by a round without one, as this one followed such a round.
            return made._replace(
                tokens=opening.tokens + made.tokens,
                forwards=opening.forwards + made.forwards,
                rows=opening.rows + made.rows,
            )
        return made

    def removed(self, sequence: Sequence) -> None:
        """The sequence has ended, perhaps amid a round. With the last one of it a turn is over too."""
        if sequence in self._sequences:
            self._sequences.discard(sequence)
            self._opening.pop(sequence, None)
            self._has_turn = self._has_turn and bool(self._sequences)
