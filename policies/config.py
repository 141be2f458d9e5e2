"""The settings that replicas and ingresses share, and the base of all records of settings.

A setting is declared once, with its type, default, bounds and description: here, in replicas/config.py, in
router/config.py or in cluster/config.py, whose ClusterConfig has them all.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from policies.registry import DEFAULT_POLICY

EMBEDDED_MODEL = "triad-5m"


class Settings(BaseModel):
    """A record of settings, which does not change; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @classmethod
    def of(cls, config: "Settings") -> Self:
        """This record's settings out of those of a record that has them and more."""
        return cls(**{name: getattr(config, name) for name in cls.model_fields})


class Capacity(Settings):
    """The requests that one replica takes."""

    max_running: int = Field(default=64, ge=1, description="Requests in one forward.")
    max_waiting: int = Field(
        default=256, ge=0, description="Requests queued a replica, beyond those running."
    )


def _mapping(value: Any) -> Any:
    """The mapping that a JSON object on the command line stands for."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f'write it as a JSON object, such as {{"low": 4}} ({error})') from error


def listed(value: Any) -> Any:
    """Returns the list that comma-separated text on the command line stands for; all else as it is."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


ServedName = Annotated[str, Field(min_length=1, max_length=256)]


class SharedConfig(Capacity):
    """The settings of both replicas and ingresses."""

    model: str = Field(
        default=EMBEDDED_MODEL, description="A folder, a hub name, triad-5m, triad-5m-tools or smollm2."
    )
    served_model_name: Annotated[tuple[ServedName, ...], Field(max_length=16), BeforeValidator(listed)] = (
        Field(
            default=(),
            description="What clients ask for, or several, the first in answers; the model's last part.",
        )
    )
    app: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = Field(
        default="triad", description="Keeps several apps apart in one Redis."
    )
    policy: str = Field(
        default=DEFAULT_POLICY, description="A policy's name, a mode's, or a dotted class name."
    )
    policy_params: Annotated[dict[str, Any], BeforeValidator(_mapping)] = Field(
        default_factory=dict, description="The policy's parameters; 'stabilise' has those of the hysteresis."
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="json: a line a request, with its request id and trace id."
    )

    @property
    def model_name(self) -> str:
        """The name by which clients ask for the model."""
        return next(iter(self.served_model_name), Path(self.model).name)

    @property
    def model_aliases(self) -> tuple[str, ...]:
        """Further names by which they may."""
        return self.served_model_name[1:]
