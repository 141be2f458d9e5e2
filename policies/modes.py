"""The three ways a tri-mode checkpoint decodes, and the plan that says which one to run."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Mode(StrEnum):
    """A way to decode by rounds; every mode starts and ends a round at the same safe point."""

    AR = "ar"
    DIFFUSION = "diffusion"
    SELF_SPECULATION = "self_speculation"


LOSSLESS_MODES = frozenset({Mode.AR, Mode.SELF_SPECULATION})
"""Modes whose output is token for token that of autoregressive decoding."""

CONSERVATIVE_ORDER = (Mode.DIFFUSION, Mode.SELF_SPECULATION, Mode.AR)
"""The modes from the one that spends most on a request to the one that spends least; all models have that."""

MAX_BLOCK_LENGTH = 64
"""The most tokens in a block, the seed included."""

MAX_FACTOR = float(MAX_BLOCK_LENGTH + 1)
"""The largest factor: it fixes any block at once."""

MAX_RISK = float(MAX_BLOCK_LENGTH)
"""The largest risk: it fixes any block at once."""

DEFAULT_FACTOR = 0.1
"""The factor of diffusion wherever nothing else says how it chooses: the largest of those measured with which
triad-5m has `ar`'s right answers within 1 point at every block (docs/experiments/diffusion.md)."""

DEFAULT_BLOCK_LENGTHS: Mapping[Mode, int] = MappingProxyType(
    {Mode.AR: 1, Mode.DIFFUSION: 32, Mode.SELF_SPECULATION: 16}
)
"""The block length of a request, or a policy, that names only the mode."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """A mode and its parameters. Raises ValueError for parameters out of their range.

    Plans that decode alike are equal: `diffusion` has a threshold, a factor or a risk, other modes none.
    """

    mode: Mode
    block_length: int = 1
    """Tokens a block, the seed included; 1 for `ar`, 2 to MAX_BLOCK_LENGTH otherwise."""
    threshold: float | None = None
    """The top probability, in (0, 1], from which `diffusion` fixes a position; None where it has another
    bound."""
    factor: float | None = None
    """A denoising fixes the most positions n, the surest first, for which (n + 1)(1 - p_n) < factor, p_n
    being the probability of the n-th (Fast-dLLM, arXiv 2505.22618). It takes the place of a threshold;
    without any bound it is DEFAULT_FACTOR."""
    risk: float | None = None
    """A denoising fixes as many as leave the wrong ones to expect of it within this, by the checkpoint's own
    sampler (replicas.engine.decoders.learned_sampler). It takes the place of both."""

    def __post_init__(self) -> None:
        low, high = (1, 1) if self.mode is Mode.AR else (2, MAX_BLOCK_LENGTH)
        if not low <= self.block_length <= high:
            raise ValueError(f"block_length for {self.mode} must be {low} to {high}, got {self.block_length}")
        if self.threshold is not None and not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")
        if self.factor is not None and not 0.0 < self.factor <= MAX_FACTOR:
            raise ValueError(f"factor must be above 0 and at most {MAX_FACTOR:g}, got {self.factor}")
        if self.risk is not None and not 0.0 < self.risk <= MAX_RISK:
            raise ValueError(f"risk must be above 0 and at most {MAX_RISK:g}, got {self.risk}")
        if self.mode is not Mode.DIFFUSION:
            self._set_bound()
        elif self.risk is not None:
            self._set_bound(risk=self.risk)
        elif self.factor is not None:
            self._set_bound(factor=self.factor)
        elif self.threshold is None:
            self._set_bound(factor=DEFAULT_FACTOR)

    def _set_bound(self, factor: float | None = None, risk: float | None = None) -> None:
        object.__setattr__(self, "threshold", None)
        object.__setattr__(self, "factor", factor)
        object.__setattr__(self, "risk", risk)


def default_plan(mode: Mode, risk: float | None = None) -> DecodePlan:
    """Returns the plan of a request that names the mode alone.

    risk: of the checkpoint's sampler, which diffusion then goes by; None where it has none.
    """
    return DecodePlan(mode, DEFAULT_BLOCK_LENGTHS[mode], risk=risk)


def available_plan(plan: DecodePlan, modes: Collection[Mode]) -> DecodePlan:
    """Returns the plan itself if a model with these modes can run it, else the next more conservative one."""
    if plan.mode in modes:
        return plan
    for mode in CONSERVATIVE_ORDER[CONSERVATIVE_ORDER.index(plan.mode) + 1 :]:
        if mode in modes:
            return default_plan(mode)
    return default_plan(Mode.AR)


def lossless_plan(plan: DecodePlan, modes: Collection[Mode]) -> DecodePlan:
    """Returns the plan that a `lossless` request runs while the replica's plan is `plan`."""
    return available_plan(plan, LOSSLESS_MODES.intersection(modes))
