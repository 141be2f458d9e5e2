"""Triad's own field of a completion, `decoding`: the way to decode it."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from policies.modes import LOSSLESS_MODES, MAX_BLOCK_LENGTH, MAX_FACTOR, Mode
from replicas.messages import DecodingOptions
from router.fields import INTEGRAL, Strict, conflict


class Decoding(Strict):
    """The way to decode; `auto` leaves it to the cluster's policy."""

    mode: Literal["auto", "ar", "diffusion", "self_speculation"] = "auto"
    block_length: Annotated[int, Field(ge=2, le=MAX_BLOCK_LENGTH), INTEGRAL] | None = None
    threshold: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    factor: Annotated[float, Field(gt=0.0, le=MAX_FACTOR)] | None = None
    lossless: bool = False
    max_steps: Annotated[int, Field(ge=1, le=MAX_BLOCK_LENGTH), INTEGRAL] | None = None
    trace: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        mode = self.pinned_mode
        if self.lossless and mode is Mode.DIFFUSION:
            raise conflict("lossless", "diffusion is not lossless; choose another mode")
        if self.block_length is not None and mode is Mode.AR:
            raise conflict("block_length", "ar decodes one token at a time")
        if self.threshold is not None and self.factor is not None:
            raise conflict("factor", "it takes the place of threshold; give one of them")
        for field in ("threshold", "factor", "max_steps"):
            if getattr(self, field) is not None and (self.lossless or mode in LOSSLESS_MODES):
                raise conflict(field, "only diffusion has one")
        return self

    @property
    def pinned_mode(self) -> Mode | None:
        return None if self.mode == "auto" else Mode(self.mode)

    def options(self) -> DecodingOptions:
        return DecodingOptions(
            mode=self.pinned_mode,
            block_length=self.block_length,
            threshold=self.threshold,
            lossless=self.lossless,
            max_steps=self.max_steps,
            factor=self.factor,
            trace=self.trace,
        )
