"""The settings of one ingress."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from policies.config import Capacity, Settings, SharedConfig, listed

MAX_HEADERS = 100
MAX_JSON_DEPTH = 200
"""The most that max_json_depth may be, and the bound on JSON that stands in a string of a body."""


class AdmissionConfig(Capacity):
    """The limits of each replica that can be reached: what runs, and what may wait for it.

    max_waiting_tokens does not keep out a request where no other waits, however long it is.
    """

    max_waiting_tokens: int | None = Field(
        default=131_072, ge=1, description="Prompt tokens queued a replica; past them 429. None: no limit."
    )
    max_queue_s: float | None = Field(
        default=None, gt=0.0, description="Longest expected wait for a place to run; past it 429. None: any."
    )


class Bounds(Settings):
    """Bounds on a request's headers, body and prompts, and on the time a body may take."""

    max_body_bytes: int = Field(default=8 * 2**20, ge=1024, description="Longest HTTP body taken.")
    body_timeout_s: float = Field(
        default=60.0, gt=0, le=3600, description="From a request's head to its whole body."
    )
    max_header_bytes: int = Field(
        default=32 * 2**10, ge=1024, description="Of all of a request's headers together."
    )
    max_json_depth: int = Field(
        default=32, ge=8, le=MAX_JSON_DEPTH, description="How deep a body's JSON may be nested."
    )
    max_prompt_chars: int = Field(
        default=1_000_000,
        ge=1,
        description="Longest prompt taken, in characters; several of a request together.",
    )


class IngressConfig(AdmissionConfig, Bounds, SharedConfig):
    """The settings of one ingress."""

    shared_prefix_cache: bool = Field(
        default=False,
        description="Prompts of different API keys share the prefix cache: faster where they begin alike, "
        "but cached_tokens then tells one key what another has asked.",
    )
    stream_interval_ms: float | None = Field(
        default=None,
        ge=0.0,
        le=1000.0,
        description="Least time between two chunks of a stream; its first and last come at once. Longer "
        "costs the front door less: what has come meanwhile goes out as one. None: none for a few streams, "
        "up to 40 ms for many.",
    )
    api_keys_file: str | None = Field(
        default=None,
        description="A file of API keys (python -m cluster.new_key), read again when it changes; None: "
        "those in the environment's TRIAD_API_KEYS, and without any everybody is let in.",
    )
    limits_without_redis: Literal["open", "closed"] = Field(
        default="open",
        description="While Redis is lost, requests of limited keys are let in, or turned away by 503.",
    )
    limits_timeout_s: float = Field(
        default=0.1, gt=0.0, le=5.0, description="How long a request of a limited key waits for Redis."
    )
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(
        default=(),
        description="Sites whose pages may call, such as https://chat.example.com; none by default.",
    )
