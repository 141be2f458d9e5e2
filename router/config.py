"""The bounds on what an ingress takes of a client, explained to operators in cluster.config."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds on a request's headers, body and prompts, and on the time a body may take."""

    max_body_bytes: int = 8 * 2**20
    body_timeout_s: float = 60.0
    max_header_bytes: int = 32 * 2**10
    max_headers: int = 100
    max_json_depth: int = 32
    max_prompt_chars: int = 1_000_000


@dataclass(frozen=True, slots=True)
class AccessConfig:
    """The rules on who may ask."""

    api_keys_file: str | None = None
    limits_without_redis: Literal["open", "closed"] = "open"
    """The fate of requests of limited keys without Redis: let in or turned away."""
    limits_timeout_s: float = 0.1
    cors_origins: tuple[str, ...] = ()
    """The sites whose pages may call; "*" is any."""
