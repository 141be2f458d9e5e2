"""The estimator of modes' factors by octaves of a size, over what all modes have in common."""

from collections import defaultdict
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

from policies.cost import ModeFactors, octave_weights
from policies.factors import DriftingFactors, Prior, Vector
from policies.modes import Mode

Term: TypeAlias = tuple[Mode | None, int | None]
"""(None, None) for what is common, (mode, None) for a mode's own, (mode, octave) for a mode's at an octave of
the size, (None, corner) for all modes' at each SPACING octaves, in straight lines between."""

REFERENCE_SHARE = 0.2
"""The share that one observation has in what counts as running, against which spreads are told."""
SPACING = 4
"""The octaves between two corners of what sizes have in common. Were it one, a size between two octaves would
leave each of them in doubt, and what is near it with them."""
LEAST_RECALLED = 0.05
"""The least spread of a factor learned before: the spreads that are kept are against what ran then."""

_COMMON: Term = (None, None)


class ModeFactorsEstimator:
    """Estimates the logarithms of factors: a common one, a mode's own, a mode's at each octave of a size, and
    all modes' over the size.

    of_size: all modes' at a corner; None where modes have nothing in common there but what is common anyway.
    known: factors learned before, as `factors` had them.
    """

    def __init__(
        self,
        common: Prior,
        of_mode: Prior,
        of_octave: Prior,
        of_size: Prior | None,
        num_octaves: int,
        now_s: float,
        known: Mapping[Mode, ModeFactors] | None = None,
    ):
        self._of_mode, self._of_octave, self._of_size = of_mode, of_octave, of_size
        self._num_octaves = num_octaves
        self._factors: DriftingFactors[Term] = DriftingFactors(_COMMON, common, now_s)
        self._reference: dict[Term, float] = {}
        self._num_terms, self._sums = 0, np.zeros((0, 0))  # those of `factors`, and of how many terms
        for mode, factors in (known or {}).items():
            self._remember(mode, factors)

    @property
    def common(self) -> float:
        """The logarithm of the common factor."""
        return self._factors.shared

    @property
    def factors(self) -> dict[Mode, ModeFactors]:
        """The factors of each mode that was observed, with their spreads against what runs now."""
        modes = [mode for mode in Mode if (mode, None) in self._factors]
        if not modes:
            return {}
        if len(self._factors) != self._num_terms:
            self._num_terms = len(self._factors)
            self._sums = self._factors.rows(
                _terms(mode, {octave: 1.0}) for mode in modes for octave in range(self._num_octaves)
            )
        logs, spreads = self._factors.estimates_of(self._sums, self._reference)
        found = {}
        for number, mode in enumerate(modes):
            own = slice(number * self._num_octaves, (number + 1) * self._num_octaves)
            found[mode] = ModeFactors(_rounded(logs[own]), _rounded(spreads[own]))
        return found

    def advance(self, now_s: float) -> None:
        """Lets the time pass since the last call."""
        self._factors.advance(now_s)

    def observe(self, mode: Mode, size: float, log: float, noise: float, is_stray: bool = False) -> None:
        """Learns the logarithm of the common factor times a mode's at a size, give or take `noise`.

        is_stray: as in DriftingFactors.observe.
        """
        self._add(mode)
        weights = _terms(mode, octave_weights(size, self._num_octaves))
        self._factors.observe(weights, log, noise, is_stray)
        for term in {*self._reference, *weights}:
            before = self._reference.get(term, 0.0)
            self._reference[term] = before + REFERENCE_SHARE * (weights.get(term, 0.0) - before)

    def _add(self, mode: Mode) -> None:
        self._factors.add((mode, None), self._of_mode)
        for octave in range(self._num_octaves):
            self._factors.add((mode, octave), self._of_octave)
            for corner in _corners(octave):
                if self._of_size is not None:
                    self._factors.add((None, corner), self._of_size)

    def _remember(self, mode: Mode, factors: ModeFactors) -> None:
        self._add(mode)
        for octave, (log, spread) in enumerate(zip(factors.logs, factors.spreads, strict=True)):
            if octave < self._num_octaves:
                self._factors.recall(_terms(mode, {octave: 1.0}), log, max(spread, LEAST_RECALLED))


def _terms(mode: Mode, octaves: Mapping[int, float]) -> dict[Term, float]:
    """Returns the weights of the terms of a mode's factor between octaves; a term never added counts as 0."""
    weights: defaultdict[Term, float] = defaultdict(float, {(mode, None): 1.0})
    for octave, weight in octaves.items():
        weights[mode, octave] += weight
        for corner, share in _corners(octave).items():
            weights[None, corner] += weight * share
    return weights


def _corners(octave: int) -> dict[int, float]:
    """Returns the corners next to an octave, with weights that sum to 1."""
    left, beyond = divmod(octave, SPACING)
    share = beyond / SPACING
    return {left: 1.0 - share, left + 1: share} if beyond else {left: 1.0}


def _rounded(values: Vector) -> tuple[float, ...]:
    """Returns the values as they are published five times a second."""
    return tuple(round(value, 4) for value in values.tolist())
