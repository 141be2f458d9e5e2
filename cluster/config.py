"""The settings of an operator, checked once at the start."""

import difflib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

import replicas
from policies.control.connection import check_url
from policies.modes import MAX_BLOCK_LENGTH
from policies.registry import DEFAULT_POLICY, PolicyError, create_policy

EMBEDDED_MODEL = "triad-5m"
CHECKPOINTS = {EMBEDDED_MODEL: "triad-5m", "smollm2": "smollm2-135m"}
"""Models with a name of their own, and their folders under replicas/checkpoints."""

SCALING_KEYS = ("min_replicas", "target_ttft_s", "target_tpot_s", "upscale_delay_s", "downscale_delay_s")
"""Keys that say nothing without max_replicas."""

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def _mapping(value: Any) -> Any:
    """The mapping that a JSON object on the command line stands for."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f'write it as a JSON object, such as {{"low": 4}} ({error})') from error


def _from_environment(variable: re.Match[str]) -> str:
    """The value of `${NAME}` in a URL, so that a Serve file may name a password without having it."""
    name = variable[1]
    if name not in os.environ:
        raise ValueError(f"the environment variable {name} is not set")
    return quote(os.environ[name], safe="")


def _listed(value: Any) -> Any:
    """The list that comma-separated text on the command line stands for."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class ClusterConfig(BaseModel):
    """`serve run cluster.app:deploy key=value ...`, or `args:` in a Serve YAML file.

    An empty value, as an unset variable leaves it, is the same as the key left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field(EMBEDDED_MODEL, description="A folder, a hub name, triad-5m or smollm2.")
    served_model_name: str | None = Field(None, description="What clients ask for; the model's last part.")
    app: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = Field(
        "triad", description="Keeps several apps apart in one Redis."
    )
    num_replicas: int = Field(1, ge=1, description="Model servers; with max_replicas, at the start.")
    min_replicas: int | None = Field(
        None, ge=1, description="With max_replicas: never fewer. None: num_replicas."
    )
    max_replicas: int | None = Field(
        None, ge=1, description="Their number follows the demand, up to so many; None: it stays as it is."
    )
    target_ttft_s: float = Field(
        1.0, gt=0.0, description="With max_replicas: seconds to the first token that are to be kept."
    )
    target_tpot_s: float = Field(
        0.05, gt=0.0, description="With max_replicas: seconds a token after it that are to be kept."
    )
    upscale_delay_s: float = Field(
        5.0, ge=0.0, description="With max_replicas: more are started after so long a demand for them."
    )
    downscale_delay_s: float = Field(
        300.0, ge=0.0, description="With max_replicas: some are stopped after so long without need of them."
    )
    num_ingresses: int = Field(1, ge=1, description="HTTP servers; one also controls, the others stand by.")
    redis_url: str | None = Field(
        None,
        repr=False,
        description="None: a server of Triad's own, on loopback, so for one machine only. "
        "${NAME} in it is the environment's, such as redis://:${REDIS_PASSWORD}@redis:6379/0.",
    )
    policy: str = Field(DEFAULT_POLICY, description="A policy's name, a mode's, or a dotted class name.")
    policy_params: Annotated[dict[str, Any], BeforeValidator(_mapping)] = Field(
        default_factory=dict, description="The policy's parameters; 'stabilise' has those of the hysteresis."
    )

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of weights and K/V; auto: float32 on CPUs, bfloat16 on GPUs."
    )
    quantization: Literal["int8"] | None = Field(
        None, description="On CPUs, native forward: linear layers' weights in 8 bits; None: all in dtype."
    )
    forward: Literal["auto", "native", "torch"] = Field(
        "auto", description="On CPUs: compiled C++, or torch alone; auto: native where there is a compiler."
    )
    num_threads: int | None = Field(
        None, ge=1, description="CPU threads a replica; None: its share of the cores it may use."
    )
    page_size: int = Field(16, ge=1, description="Tokens a K/V page.")
    kv_cache_mb: int = Field(
        256, ge=1, description="Memory for K/V pages, in MiB, of each of a replica's processes."
    )
    kv_dtype: Literal["auto", "bfloat16", "fp8"] = Field(
        "auto", description="Of K/V on GPUs: auto is dtype's; fp8 holds twice as many tokens."
    )
    max_running: int = Field(64, ge=1, description="Requests in one forward.")
    max_step_tokens: int = Field(512, ge=3 * MAX_BLOCK_LENGTH, description="Query tokens in one forward.")
    max_prefill_tokens: int = Field(
        256, ge=1, description="Prompt tokens in a forward that decodes too: bounds the delay of its streams."
    )
    max_step_ms: float | None = Field(
        None,
        gt=0.0,
        description="Longest forward, by its measured cost, that prompts may join when it decodes too: "
        "bounds the delay between its streams' tokens. None: max_prefill_tokens alone.",
    )
    overlap_blocks: bool = Field(
        True,
        description="Begin a block of diffusion in the forward that commits the one before: fewer forwards, "
        "and tokens that may differ. false: one block after the other, as Nemotron's authors decode.",
    )
    max_waiting: int = Field(256, ge=0, description="Requests queued a replica, beyond those running.")
    max_waiting_tokens: int | None = Field(
        131_072, ge=1, description="Prompt tokens queued a replica; past them 429. None: no limit."
    )
    max_queue_s: float | None = Field(
        None, gt=0.0, description="Longest expected wait for a place to run; past it 429. None: any."
    )
    tool_parser: Literal["auto", "hermes", "mistral", "llama3_json", "pythonic", "none"] = Field(
        "auto", description="The format in which the model calls tools; auto: by its chat template."
    )
    reasoning_parser: Literal["auto", "think", "mistral", "none"] = Field(
        "auto", description="The marks of its reasoning, <think> or [THINK]; auto: by its chat template."
    )
    shared_prefix_cache: bool = Field(
        False,
        description="Prompts of different API keys share the prefix cache: faster where they begin alike, "
        "but cached_tokens then tells one key what another has asked.",
    )
    stream_interval_ms: float = Field(
        0.0,
        ge=0.0,
        le=1000.0,
        description="Least time between two chunks of a stream; its first and last come at once. Longer "
        "costs the front door less: what has come meanwhile goes out as one.",
    )
    calibration_s: float = Field(
        1.5, ge=0.0, le=60.0, description="Seconds a replica measures its forwards before it serves."
    )
    max_body_bytes: int = Field(8 * 2**20, ge=1024, description="Longest HTTP body taken.")
    body_timeout_s: float = Field(60.0, gt=0, le=3600, description="From a request's head to its whole body.")
    max_header_bytes: int = Field(32 * 2**10, ge=1024, description="Of all of a request's headers together.")
    max_json_depth: int = Field(32, ge=8, le=200, description="How deep a body's JSON may be nested.")
    max_prompt_chars: int = Field(
        1_000_000, ge=1, description="Longest prompt taken, in characters; several of a request together."
    )

    api_keys_file: str | None = Field(
        None,
        description="A file of API keys (python -m cluster.new_key), read again when it changes; None: "
        "those in the environment's TRIAD_API_KEYS, and without any everybody is let in.",
    )
    limits_without_redis: Literal["open", "closed"] = Field(
        "open", description="While Redis is lost, requests of limited keys are let in, or turned away by 503."
    )
    limits_timeout_s: float = Field(
        0.1, gt=0.0, le=5.0, description="How long a request of a limited key waits for Redis."
    )
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        (), description="Sites whose pages may call, such as https://chat.example.com; none by default."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="json: a line a request, with its request id and trace id."
    )

    replica_cpus: float = Field(0.1, ge=0.0, description="CPUs reserved with Ray for a replica's actor.")
    ingress_cpus: float = Field(0.1, ge=0.0, description="CPUs reserved with Ray for an ingress's actor.")
    num_gpus: float = Field(0.0, ge=0.0, description="GPUs of each of a replica's processes, one at most.")
    tensor_parallel: int = Field(
        1, ge=1, description="Processes, on one machine, among which each replica's model is split."
    )
    drain_timeout_s: float = Field(600.0, gt=0.0, description="How long a stopping actor may finish streams.")

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
        if self.quantization and self.num_gpus:
            raise ValueError(
                f"quantization {self.quantization!r} is for CPUs: leave it out, or set num_gpus=0"
            )
        if self.quantization and (self.forward == "torch" or self.tensor_parallel > 1):
            raise ValueError(
                f"quantization {self.quantization!r} is of the native forward, which runs in one process: "
                f"leave out forward and tensor_parallel"
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
        if not self.least_replicas <= self.first_replicas <= self.max_replicas:
            raise ValueError(
                f"min_replicas {self.least_replicas} <= num_replicas {self.first_replicas} <= "
                f"max_replicas {self.max_replicas} does not hold: change one, or leave num_replicas out"
            )
        return self

    @model_validator(mode="after")
    def _weights_are_there(self) -> Self:
        if self.model in CHECKPOINTS and not Path(self.checkpoint, "model.safetensors").is_file():
            raise ValueError(f"model {self.model} has no weights here yet; `make model` fetches them")
        return self

    @property
    def least_replicas(self) -> int:
        return self.num_replicas if self.min_replicas is None else self.min_replicas

    @property
    def first_replicas(self) -> int:
        """The number of replicas at the start: num_replicas where it is given, else min_replicas."""
        return self.num_replicas if "num_replicas" in self.model_fields_set else self.least_replicas

    @property
    def most_replicas(self) -> int:
        return self.max_replicas or self.num_replicas

    @property
    def checkpoint(self) -> str:
        """The folder or the hub name of the weights."""
        if self.model not in CHECKPOINTS:
            return self.model
        return str(Path(replicas.__path__[0]) / "checkpoints" / CHECKPOINTS[self.model])

    @property
    def weights_dtype(self) -> str:
        """The dtype of weights; on a CPU float32, in which greedy decoding is the same in any batch."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if self.num_gpus else "float32"

    @property
    def model_name(self) -> str:
        """The name by which clients ask for the model."""
        return self.served_model_name or Path(self.model).name
