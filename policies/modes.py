"""The three ways a tri-mode checkpoint decodes, and the plan that says which one to run."""

from dataclasses import dataclass
from enum import StrEnum


class Mode(StrEnum):
    """How a round of decoding works; every mode starts and ends a round at the same safe point."""

    AR = "ar"
    DIFFUSION = "diffusion"
    SELF_SPECULATION = "self_speculation"


LOSSLESS_MODES = frozenset({Mode.AR, Mode.SELF_SPECULATION})
"""Modes whose output is token for token that of autoregressive decoding."""

MAX_BLOCK_LENGTH = 64
DEFAULT_BLOCK_LENGTH = {Mode.AR: 1, Mode.DIFFUSION: 32, Mode.SELF_SPECULATION: 16}


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """A mode and its parameters.

    block_length: tokens a block, the seed included; 1 for `ar`, 2 to MAX_BLOCK_LENGTH otherwise.
    threshold: `diffusion` fixes every position whose top probability reaches it, in (0, 1].
    """

    mode: Mode
    block_length: int = 1
    threshold: float = 0.9

    @classmethod
    def default(cls, mode: Mode) -> "DecodePlan":
        """What a request that names only the mode gets."""
        return cls(mode, DEFAULT_BLOCK_LENGTH[mode])

    def __post_init__(self) -> None:
        low, high = (1, 1) if self.mode is Mode.AR else (2, MAX_BLOCK_LENGTH)
        if not low <= self.block_length <= high:
            raise ValueError(f"block_length for {self.mode} must be {low} to {high}, got {self.block_length}")
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")
