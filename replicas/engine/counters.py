"""Counts of what a scheduler's steps have made, for replicas.stats to learn from."""

from collections import Counter, deque

from policies.cost import RoundStats
from policies.modes import Mode

MAX_ROUNDS_KEPT = 1024


class Counters:
    """Totals since the start, and the last rounds as they went."""

    def __init__(self) -> None:
        self.made_by_mode: Counter[Mode] = Counter()
        """All tokens; a prefill's token counts for the mode that it goes on in."""
        self.tokens_by_mode: Counter[Mode] = Counter()
        """Tokens of rounds alone: a prefill's token is nobody's yield."""
        self.forwards_by_mode: Counter[Mode] = Counter()
        """Forwards of rounds, one for each sequence in them."""
        self.num_steps = self.num_ahead = 0
        """Steps, and those of them that were begun before the output of the one before was known."""
        self.num_segments = self.num_in_vain = 0
        """Segments, and those begun ahead that were of no use, as their sequences had ended."""
        self.num_prefilled = 0
        """Prompt tokens computed, those computed again after a preemption included."""
        self.rounds: deque[RoundStats] = deque(maxlen=MAX_ROUNDS_KEPT)
        """The last rounds' outcomes, but those of `ar`, for whoever learns from them to take; safe from
        another thread."""

    @property
    def num_tokens(self) -> int:
        """All tokens made so far."""
        return self.made_by_mode.total()

    def note_round(self, made: RoundStats) -> None:
        """Notes a round that has ended."""
        self.rounds.append(made)
