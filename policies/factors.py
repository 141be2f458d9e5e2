"""Logarithms of factors that drift, learned by a Kalman filter from observations of their sums.

An observation is the sum of one term that all observations share and of others, weighted. What changes for
all at once is booked on the shared term, and the others are learned from observations close in time that
differ in them. Every term goes back to 0, and its uncertainty to its prior's, with the time in which nothing
tells of it.
"""

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Term = TypeVar("Term", bound=Hashable)
Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Prior:
    """The spread of a term that nothing is known of, and the time in which what is known fades to 1/e."""

    spread: float
    """The standard deviation of the logarithm: 0.3 is a factor of 1.35 either way."""
    lasting_s: float


class DriftingFactors(Generic[Term]):
    """Estimates terms that each drift as an Ornstein-Uhlenbeck process about 0.

    shared: the term in every observation, its prior. now_s: any clock that moves forward, the same one for
    all calls.
    """

    def __init__(self, shared: Term, prior: Prior, now_s: float) -> None:
        self._shared = shared
        self._now_s = now_s
        self._index: dict[Term, int] = {}
        self._mean = np.zeros(0)
        self._covariance = np.zeros((0, 0))
        self._spreads = np.zeros(0)
        self._lasting_s = np.zeros(0)
        self._surprised: float | None = None  # the sign of the last error, 0 where it was no surprise
        self.add(shared, prior)

    def __contains__(self, term: Term) -> bool:
        return term in self._index

    def __len__(self) -> int:
        return len(self._index)

    @property
    def shared(self) -> float:
        """The term that all observations share."""
        return float(self._mean[self._index[self._shared]])

    def add(self, term: Term, prior: Prior) -> None:
        """Adds a term unless it is there, known as well as its prior."""
        if term in self._index:
            return
        size = len(self._mean)
        self._index[term] = size
        self._mean = np.append(self._mean, 0.0)
        self._spreads = np.append(self._spreads, prior.spread)
        self._lasting_s = np.append(self._lasting_s, prior.lasting_s)
        grown = np.zeros((size + 1, size + 1))
        grown[:size, :size] = self._covariance
        grown[size, size] = prior.spread**2
        self._covariance = grown

    def advance(self, now_s: float) -> None:
        """Lets the time pass since the last call: what is known fades."""
        kept = np.exp(-max(0.0, now_s - self._now_s) / self._lasting_s)
        self._now_s = max(now_s, self._now_s)
        self._mean *= kept
        self._covariance *= np.outer(kept, kept)
        self._covariance += np.diag(self._spreads**2 * (1.0 - kept**2))

    def observe(
        self, weights: Mapping[Term, float], value: float, noise: float, is_stray: bool = False
    ) -> None:
        """Learns that the shared term and the weighted sum of others, all added before, are `value` in all.

        noise: the standard deviation of the value. Where it surprises, and the one before did the same way,
        the shared term is taken to have jumped: what happens to the machine at the wrong moment is more
        common than a factor far from what was known. The first may be chance, and is not learned from.
        is_stray: tells of nothing that is common; where it surprises, it is taken to be noisier.
        """
        row = self._row({**weights, self._shared: 1.0})
        error = value - float(row @ self._mean)
        variance = float(row @ self._covariance @ row) + noise**2
        surprise = max(0.0, error**2 - variance)
        if is_stray:
            self._learn(row, value, math.sqrt(noise**2 + surprise))
            return
        way, before = math.copysign(1.0, error) if surprise else 0.0, self._surprised
        self._surprised = way
        if before is None or way in (0.0, before):
            self._covariance[self._index[self._shared], self._index[self._shared]] += surprise
            self._learn(row, value, noise)

    def recall(self, weights: Mapping[Term, float], value: float, spread: float) -> None:
        """Learns that a weighted sum, without the shared term, was once found to be `value`, give or take
        `spread`."""
        self._learn(self._row(weights), value, spread)

    def _learn(self, row: Vector, value: float, noise: float) -> None:
        spread = self._covariance @ row
        variance = float(row @ spread) + noise**2
        self._mean += spread * ((value - float(row @ self._mean)) / variance)
        self._covariance -= np.outer(spread, spread) / variance

    def estimates(
        self, sums: Iterable[Mapping[Term, float]], reference: Mapping[Term, float]
    ) -> tuple[Vector, Vector]:
        """Returns the weighted sums' values, and the standard deviations of their differences from another.

        Terms that were never added count as 0, known exactly.
        """
        return self.estimates_of(self.rows(sums), reference)

    def rows(self, sums: Iterable[Mapping[Term, float]]) -> Vector:
        """Returns weighted sums as estimates_of takes them, until a term is added."""
        return np.array([self._row(weights) for weights in sums])

    def estimates_of(self, rows: Vector, reference: Mapping[Term, float]) -> tuple[Vector, Vector]:
        """Does what `estimates` does, for sums that are asked for again and again."""
        apart = rows - self._row(reference)
        variances = ((apart @ self._covariance) * apart).sum(axis=1)
        return rows @ self._mean, np.sqrt(np.maximum(variances, 0.0))

    def _row(self, weights: Mapping[Term, float]) -> Vector:
        row = np.zeros(len(self._mean))
        for term, weight in weights.items():
            if term in self._index:
                row[self._index[term]] = weight
        return row
