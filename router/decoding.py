"""Triad's own field of a completion, `decoding`: the way to decode it."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from policies.modes import LOSSLESS_MODES, MAX_BLOCK_LENGTH, MAX_FACTOR, MAX_RISK, Mode
from policies.quality import QualityBound
from replicas.messages import DecodingOptions
from router.fields import INTEGRAL, Strict, conflict, nested

Quality = Literal["any", "lossless"] | QualityBound


def read_quality(value: Any) -> Any:
    """The quality that a body asks for."""
    if value == "any" or value == "lossless" or isinstance(value, QualityBound):
        return value
    if not isinstance(value, dict):
        forms = "'any', 'lossless' or an object such as {'max_differing': 0.01}"
        raise PydanticCustomError("unsupported_value", "It is {forms}", {"forms": forms})
    try:
        return QualityBound.model_validate(value)
    except ValidationError as error:
        raise nested(error) from None


class Decoding(Strict):
    """The way to decode; `auto` leaves it to the cluster's policy."""

    mode: Literal["auto", "ar", "diffusion", "self_speculation"] | None = None
    """None is auto."""
    block_length: Annotated[int, Field(ge=2, le=MAX_BLOCK_LENGTH), INTEGRAL] | None = None
    threshold: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    factor: Annotated[float, Field(gt=0.0, le=MAX_FACTOR)] | None = None
    risk: Annotated[float, Field(gt=0.0, le=MAX_RISK)] | None = None
    lossless: bool | None = None
    quality: Annotated[Quality, PlainValidator(read_quality, json_schema_input_type=Quality)] | None = None
    max_steps: Annotated[int, Field(ge=1, le=MAX_BLOCK_LENGTH), INTEGRAL] | None = None
    trace: bool | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        mode = self.pinned_mode
        if self.lossless and self.quality not in (None, "lossless"):
            raise conflict("quality", "lossless says another one; give one of them")
        if self.lossless and mode is Mode.DIFFUSION:
            raise conflict("lossless", "diffusion is not lossless; choose another mode")
        if self.quality not in (None, "any") and mode is Mode.DIFFUSION:
            raise conflict("quality", "it chooses the mode and its parameters; leave the mode to auto")
        if self.block_length is not None and mode is Mode.AR:
            raise conflict("block_length", "ar decodes one token at a time")
        bounds = [field for field in ("threshold", "factor", "risk") if getattr(self, field) is not None]
        if len(bounds) > 1:
            raise conflict(bounds[1], f"it takes the place of {bounds[0]}; give one of them")
        for field in (*bounds, "max_steps"):
            if getattr(self, field) is not None and (self.is_lossless or mode in LOSSLESS_MODES):
                raise conflict(field, "only diffusion has one")
        for field in ("block_length", *bounds, "max_steps"):
            if getattr(self, field) is not None and mode is None and self.max_differing is not None:
                raise conflict(field, "a bound on quality chooses it; leave it out")
        return self

    @property
    def pinned_mode(self) -> Mode | None:
        return None if self.mode in (None, "auto") else Mode(self.mode)

    @property
    def is_lossless(self) -> bool:
        return bool(self.lossless) or self.quality == "lossless"

    @property
    def max_differing(self) -> float | None:
        return self.quality.max_differing if isinstance(self.quality, QualityBound) else None

    def options(self) -> DecodingOptions:
        return DecodingOptions(
            mode=self.pinned_mode,
            block_length=self.block_length,
            threshold=self.threshold,
            lossless=self.is_lossless,
            max_steps=self.max_steps,
            factor=self.factor,
            risk=self.risk,
            max_differing=self.max_differing,
            trace=bool(self.trace),
        )
