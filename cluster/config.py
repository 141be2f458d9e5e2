"""The settings of an operator, checked once at the start."""

import difflib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import quote

from pydantic import Field, field_validator, model_validator

from policies.control.connection import check_url
from policies.registry import PolicyError, create_policy
from replicas.config import CHECKPOINTS, ReplicaConfig
from router.config import IngressConfig

SCALING_KEYS = ("min_replicas", "target_ttft_s", "target_tpot_s", "upscale_delay_s", "downscale_delay_s")
"""Keys that say nothing without max_replicas."""

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def _from_environment(variable: re.Match[str]) -> str:
    """The value of `${NAME}` in a URL, so that a Serve file may name a password without having it."""
    name = variable[1]
    if name not in os.environ:
        raise ValueError(f"the environment variable {name} is not set")
    return quote(os.environ[name], safe="")


class ReplicaRange(NamedTuple):
    """The numbers of replicas between which Serve scales."""

    min_replicas: int
    initial_replicas: int
    max_replicas: int


class ClusterConfig(ReplicaConfig, IngressConfig):
    """`serve run cluster.app:deploy key=value ...`, or `args:` in a Serve YAML file.

    Its keys are those of the replicas and of the ingresses, and those by which they are deployed.

    An empty value, as an unset variable leaves it, is the same as the key left out.
    """

    min_replicas: int | None = Field(
        default=None, ge=1, description="With max_replicas: never fewer. None: num_replicas."
    )
    upscale_delay_s: float = Field(
        default=5.0,
        ge=0.0,
        description="With max_replicas: more are started after so long a demand for them.",
    )
    downscale_delay_s: float = Field(
        default=300.0,
        ge=0.0,
        description="With max_replicas: some are stopped after so long without need of them.",
    )
    num_ingresses: int = Field(
        default=1, ge=1, description="HTTP servers; one also controls, the others stand by."
    )
    redis_url: str | None = Field(
        default=None,
        repr=False,
        description="None: a server of Triad's own, on loopback, so for one machine only. "
        "${NAME} in it is the environment's, such as redis://:${REDIS_PASSWORD}@redis:6379/0.",
    )
    replica_cpus: float = Field(
        default=0.1, ge=0.0, description="CPUs reserved with Ray for a replica's actor."
    )
    ingress_cpus: float = Field(
        default=0.1, ge=0.0, description="CPUs reserved with Ray for an ingress's actor."
    )
    drain_timeout_s: float = Field(
        default=600.0, gt=0.0, description="How long a stopping actor may finish streams."
    )

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for key in given.keys() - cls.model_fields.keys():
            close = difflib.get_close_matches(str(key), cls.model_fields, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"the keys are: {', '.join(cls.model_fields)}"
            raise ValueError(f"unknown key '{key}': {hint}")
        return {key: value for key, value in given.items() if value != ""}

    @field_validator("redis_url")
    @classmethod
    def _is_redis_url(cls, url: str | None) -> str | None:
        url = None if url is None else _VARIABLE.sub(_from_environment, url)
        if url is not None:
            check_url(url)
        return url

    @model_validator(mode="after")
    def _policy_exists(self) -> Self:
        try:
            create_policy(self.policy, self.policy_params)
        except PolicyError as error:
            raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _devices_fit(self) -> Self:
        if self.num_gpus > 1:
            raise ValueError(
                f"num_gpus is of one process, which uses one GPU; for {self.num_gpus:g} GPUs a replica set "
                f"num_gpus=1 tensor_parallel={self.num_gpus:g}"
            )
        if not self.num_gpus and self.kv_dtype != "auto":
            raise ValueError(
                f"kv_dtype {self.kv_dtype!r} is for GPUs (num_gpus=1); on a CPU K/V has the weights' dtype: "
                f"leave it out"
            )
        if self.quantization == "fp8" and not self.num_gpus:
            raise ValueError("quantization 'fp8' is for GPUs (num_gpus=1): on CPUs set int8, or leave it out")
        on_native = self.forward != "torch" and self.tensor_parallel == 1
        if self.quantization == "int8" and not self.num_gpus and not on_native:
            raise ValueError(
                "quantization 'int8' on a CPU is of the native forward, which runs in one process: "
                "leave out forward and tensor_parallel"
            )
        if self.tensor_parallel > 1:
            if 0 < self.num_gpus < 1:
                raise ValueError("tensor_parallel takes a whole GPU for each process: set num_gpus=1, or 0")
            if self.forward == "native":
                raise ValueError("forward 'native' runs in one process; with tensor_parallel set 'torch'")
            if not self.num_gpus and not self.replica_cpus:
                raise ValueError("tensor_parallel needs replica_cpus above 0, to place its processes by")
        return self

    @model_validator(mode="after")
    def _numbers_of_replicas_fit(self) -> Self:
        if self.max_replicas is None:
            for key in SCALING_KEYS:
                if key in self.model_fields_set and getattr(self, key) is not None:
                    raise ValueError(f"{key} is for a number of replicas that changes: set max_replicas too")
            return self
        lowest, initial, highest = self.replica_range
        if not lowest <= initial <= highest:
            raise ValueError(
                f"min_replicas {lowest} <= num_replicas {initial} <= max_replicas {highest} does not hold: "
                f"change one, or leave num_replicas out"
            )
        return self

    @model_validator(mode="after")
    def _weights_are_there(self) -> Self:
        if self.model in CHECKPOINTS and not Path(self.checkpoint, "model.safetensors").is_file():
            raise ValueError(f"model {self.model} has no weights here yet; `make model` fetches them")
        return self

    @property
    def replica_range(self) -> ReplicaRange:
        """The numbers of replicas; at the start num_replicas where it is given, else min_replicas."""
        lowest = self.num_replicas if self.min_replicas is None else self.min_replicas
        initial = self.num_replicas if "num_replicas" in self.model_fields_set else lowest
        return ReplicaRange(lowest, initial, self.max_replicas or self.num_replicas)
