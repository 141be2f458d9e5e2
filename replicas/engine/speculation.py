"""How much to draft, and how much of a draft to verify, so that the replica makes the most tokens a ms.

A drafted position survives when it and all before it agree with AR; its chance is the running product
of calibrated confidences. Nothing here bears on which tokens come out, only on how soon.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from math import log
from operator import mul

from policies.cost import PRIOR_ACCEPTANCE, UNMEASURED, StepCost

BLOCK_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""What a draft may be cut to; 1 drafts nothing and is an AR step."""
MAX_OBSERVED = 400.0
"""Past so many observations in a bin the older ones count less."""
PRIOR_OBSERVED = 8.0
FORGET_SEQUENCE = 0.85
"""What a round leaves of a sequence's older rounds, in its estimate."""
FORGET_REPLICA = 0.995
SEQUENCE_PRIOR = 6.0
"""Drafted tokens that a sequence's own estimate starts with, at the replica's."""
REPLICA_PRIOR = 20.0
TEXT_PRIOR = 50.0
"""Tokens without an end that the estimate of texts' ends starts with."""
VERIFIED = 1.25
"""Of a draft, about so many times the tokens that it is expected to bring are verified, and one."""
NUM_TRIED = 24
"""Of the numbers of slots to verify, how many are compared."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a step has to do: sequences that speculate, query tokens of all others, and for both together
    how many sequences they are and how many cached tokens they read.
    """

    num_speculating: int
    num_other_tokens: int
    num_sequences: int
    num_cached: int


@dataclass(slots=True)
class Acceptance:
    """How drafts fared lately: the maximum-likelihood chance of one more token, if each had the same.

    accepted and refused count tokens, older ones less. A draft accepted whole was refused nowhere.
    """

    accepted: float = 0.0
    refused: float = 0.0

    def add(self, num_accepted: int, was_refused: bool, forget: float) -> None:
        self.accepted = forget * self.accepted + num_accepted
        self.refused = forget * self.refused + was_refused

    def chance(self, prior: float, weight: float) -> float:
        return (self.accepted + weight * prior) / (self.accepted + self.refused + weight)


class Calibration:
    """From a draft's confidence to the chance that it agrees, by counts in bins of its log-odds.

    What counts is agreement given that all before it agreed, which is what is observed.
    """

    LEAST, MOST = -4, 11

    def __init__(self) -> None:
        num_bins = self.MOST - self.LEAST + 1
        self._chance = [0.0] * num_bins
        self._observed = [PRIOR_OBSERVED] * num_bins
        for index in range(num_bins):
            odds = 2.0 ** (self.LEAST + index + 0.5)
            self._chance[index] = odds / (1.0 + odds)

    def chance(self, confidence: float) -> float:
        return self._chance[self._bin(confidence)]

    def observe(self, confidence: float, agreed: bool) -> None:
        index = self._bin(confidence)
        self._observed[index] = min(self._observed[index] + 1.0, MAX_OBSERVED)
        self._chance[index] += (agreed - self._chance[index]) / self._observed[index]

    def _bin(self, confidence: float) -> int:
        if confidence <= 0.0:
            return 0
        if confidence >= 1.0:
            return self.MOST - self.LEAST
        log_odds = log(confidence / (1.0 - confidence), 2)
        return min(max(int(log_odds - self.LEAST), 0), self.MOST - self.LEAST)


@dataclass(slots=True)
class Speculation:
    """A replica's estimates, shared by its sequences.

    is_adaptive: otherwise blocks have the plan's length and are verified whole. cost: of a forward.
    Drafts that were sampled and greedy ones are calibrated apart.
    """

    is_adaptive: bool = True
    cost: StepCost = UNMEASURED
    acceptance: Acceptance = field(default_factory=Acceptance)
    texts: Acceptance = field(default_factory=Acceptance)
    """How texts go on: a token taken is one accepted, an end of text a refusal."""
    _greedy: Calibration = field(default_factory=Calibration)
    _sampled: Calibration = field(default_factory=Calibration)

    def survivals(self, confidences: Sequence[float], temperature: float) -> tuple[float, ...]:
        """Of drafted tokens in order: the chance of each that it and all before it agree."""
        chance = self._calibration(temperature).chance
        return tuple(accumulate(map(chance, confidences), mul))

    def learn(
        self,
        own: Acceptance,
        confidences: Sequence[float],
        num_accepted: int,
        num_verified: int,
        temperature: float,
    ) -> None:
        """A round's outcome. own: its sequence's estimate; num_verified: of the drafted tokens."""
        was_refused = num_accepted < num_verified
        own.add(num_accepted, was_refused, FORGET_SEQUENCE)
        self.acceptance.add(num_accepted, was_refused, FORGET_REPLICA)
        observe = self._calibration(temperature).observe
        for confidence in confidences[:num_accepted]:
            observe(confidence, True)
        if was_refused:
            observe(confidences[num_accepted], False)

    def note_text(self, num_tokens: int, has_ended: bool) -> None:
        """A step's tokens of one sequence, and whether its text ended with them."""
        self.texts.add(num_tokens, has_ended, FORGET_REPLICA)

    def block_length(self, own: Acceptance, most: int, traffic: Traffic) -> int:
        """Of a sequence's next draft, the seed included: the length of most tokens a ms.

        A round costs a forward that drafts and one that verifies, both shared with all others, who are
        taken to do alike. It brings y tokens: the sum of the chances that j in a row are accepted, and the
        text has not ended before.
        """
        if not self.is_adaptive:
            return most
        replica = self.acceptance.chance(PRIOR_ACCEPTANCE, REPLICA_PRIOR)
        # Rounded, so that the many sequences of a step share their answers.
        chance = round(own.chance(replica, SEQUENCE_PRIOR) * self.texts.chance(1.0, TEXT_PRIOR), 2)
        best = _best_length(chance, most, traffic, self.cost)
        if best == 1:  # nothing will be learned of it, so what is known fades, and it is tried again
            own.add(0, False, FORGET_SEQUENCE)
            self.acceptance.add(0, False, FORGET_REPLICA)
        return best

    def num_slots(self, drafts: Sequence[Sequence[float]], most: int, traffic: Traffic) -> list[int]:
        """How many drafted tokens of each sequence to verify in this step, at most `most` in all.

        drafts: the survivals of each. Takes the slots that are likeliest to survive, as many as make the
        most expected tokens a ms, the drafting included: what is left out of a draft has been paid for,
        and will be again in the next one.
        """
        if not self.is_adaptive:
            return [len(draft) for draft in drafts]
        ranked = sorted(
            ((chance, index) for index, draft in enumerate(drafts) for chance in draft), reverse=True
        )
        most = min(most, len(ranked))
        beside = traffic.num_speculating + traffic.num_other_tokens
        drafting_ms = self._of_tokens(traffic, beside + len(ranked))
        best, best_rate, expected, taken = 0, 0.0, float(len(drafts)), 0
        for count in sorted({most * step // NUM_TRIED for step in range(NUM_TRIED + 1)}):
            expected += sum(chance for chance, _ in ranked[taken:count])
            taken = count
            rate = expected / (drafting_ms + self._of_tokens(traffic, beside + count))
            if rate > best_rate:
                best, best_rate = count, rate
        kept = [0] * len(drafts)
        for _, index in ranked[:best]:
            kept[index] += 1
        return kept

    def _of_tokens(self, traffic: Traffic, num_tokens: float) -> float:
        return self.cost.ms(num_tokens, traffic.num_sequences, traffic.num_cached)

    def _calibration(self, temperature: float) -> Calibration:
        return self._sampled if temperature > 0 else self._greedy


@lru_cache(maxsize=256)
def _best_length(chance: float, most: int, traffic: Traffic, cost: StepCost) -> int:
    """Of all who speculate in a step, if each had this chance: the length of most tokens a ms."""

    def ms(each: float) -> float:
        num_tokens = traffic.num_speculating * each + traffic.num_other_tokens
        return cost.ms(num_tokens, traffic.num_sequences, traffic.num_cached)

    best, best_rate = 1, 1.0 / ms(1.0)
    for length in sorted({min(length, most) for length in BLOCK_LENGTHS[1:]}):
        tokens = (1.0 - chance**length) / (1.0 - chance) if chance < 1.0 else float(length)
        verified = min(length, 1.0 + VERIFIED * tokens)
        rate = tokens / (ms(length) + ms(verified))
        if rate > best_rate:
            best, best_rate = length, rate
    return best
