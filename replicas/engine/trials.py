"""Trials: short spans in which all `auto` sequences run a plan that is not in force, so that it is known."""

import math

from policies.cost import RoundStats
from policies.modes import Mode
from policies.policy import Trial
from replicas.engine.sequence import ActivePlan, Sequence

TRIAL_S = 0.3
"""The time that a trial lasts, so long that what else the machine does for its plan is seen too."""
TRIAL_STEPS = 12
"""The forwards that it lasts at the least: some rounds of every mode."""
PAUSE_S = 0.5
"""The least time between two trials: what one has shown bears on what is tried next."""
MAX_SAVED_S = 0.1
"""The most time that may be lost at once: after a change of load some trials follow each other, but few."""
SILENCE_S = 1.0
"""The longest time between two forwards that earns a trial anything, and the longest without any request that
it outlives."""


class Trials:
    """The trial under way, and the time that trials may lose.

    A trial costs the time in which sequences change to its plan and back, and the share of its own that its
    plan is expected to lose. Time that passes earns Trial.share of itself; so trials lose that share of all
    tokens, as far as the expectation is right.
    """

    def __init__(self, overlaps_blocks: bool):
        self.wanted: Trial | None = None
        """The trial to make next; None for none."""
        self.num_forwards = 0
        """Forwards in trials so far."""
        self._overlaps_blocks = overlaps_blocks
        self._running: Trial | None = None
        self._tried: ActivePlan | None = None
        self._num_steps = 0
        self._began_s = self._ended_s = self._now_s = -PAUSE_S
        self._silent_s = math.inf  # the time at which the last request ended
        self._saved_s = MAX_SAVED_S
        self._unlinked: set[Sequence] = set()  # in a round that the one before would have begun, in force

    def step(self, now_s: float) -> None:
        """Called before each forward; ends a trial that has lasted, and begins one that can be paid for."""
        if now_s - self._silent_s > SILENCE_S:
            self.stop()
        self._silent_s = math.inf
        elapsed_s = min(max(0.0, now_s - self._now_s), SILENCE_S)
        self._now_s = now_s
        if self.wanted is not None:
            self._saved_s = min(MAX_SAVED_S, self._saved_s + self.wanted.share * elapsed_s)
        if self._running is not None:
            self._saved_s -= self._running.loss * elapsed_s
            self._num_steps += 1
            self.num_forwards += 1
            if now_s - self._began_s >= TRIAL_S and self._num_steps >= TRIAL_STEPS:
                self.stop()
        elif self.wanted is not None and self._can_begin(self.wanted):
            self._running, self._num_steps, self._began_s = self.wanted, 0, now_s
            self._saved_s -= self.wanted.change_s

    def _can_begin(self, wanted: Trial) -> bool:
        cost_s = wanted.loss * TRIAL_S + wanted.change_s
        return self._now_s - self._ended_s >= PAUSE_S and self._saved_s >= min(cost_s, MAX_SAVED_S)

    def fell_silent(self, now_s: float) -> None:
        """Called where no request is left."""
        self._silent_s = now_s

    def stop(self) -> None:
        """Ends the trial under way: sequences leave its plan at their next safe points."""
        self._running, self._ended_s = None, self._now_s

    def plan(self, in_force: ActivePlan) -> ActivePlan:
        """The plan that `auto` sequences begin rounds of now; the same object as long as it is the same."""
        if self._running is None:
            return in_force
        tried = ActivePlan(self._running.plan, in_force.rule)
        if self._tried != tried:
            self._tried = tried
        return self._tried

    def is_tried_by(self, sequence: Sequence) -> bool:
        """True if what the sequence begins now is a trial's, and so no switch of its mode."""
        return self._running is not None and sequence.decoding.mode is None

    def begins(self, sequence: Sequence, mode: Mode) -> None:
        """The sequence is about to begin a round of the trial at a safe point."""
        last = None if sequence.round_plan is None else sequence.round_plan.mode
        has_no_draft = mode is Mode.SELF_SPECULATION and last is not mode and not sequence.draft.token_ids
        if has_no_draft or (mode is Mode.DIFFUSION and self._overlaps_blocks):
            self._unlinked.add(sequence)

    def ended(self, sequence: Sequence, made: RoundStats) -> RoundStats | None:
        """The stats of a round that has ended, as they are in force most of the time.

        None where that can't be told: self-speculation without a draft yet verifies nothing.
        """
        if sequence not in self._unlinked:
            return made
        self._unlinked.discard(sequence)
        if made.plan.mode is Mode.SELF_SPECULATION:
            return None
        return made._replace(forwards=max(1, made.forwards - 1))  # it took one of its own to begin

    def removed(self, sequence: Sequence) -> None:
        """The sequence has ended, perhaps amid a round."""
        self._unlinked.discard(sequence)
