"""API keys, which say who may ask, and how much. Only their SHA-256 is kept anywhere.

A key has 256 random bits (`python -m cluster.new_key`), so one round of a fast hash is as good as a
slow one: there is no dictionary to try.
"""

import asyncio
import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

logger = logging.getLogger(__name__)

ENVIRONMENT = "TRIAD_API_KEYS"
KEY_PREFIX = "triad-"
RELOAD_PERIOD_S = 5.0
STATE_KEY = "triad_api_key"
"""The place of the caller's key in a request's state."""

Rate = Annotated[int, Field(ge=1)]


class KeysError(ValueError):
    """The key file can't be used; the message says what to change, and has nothing of the keys."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A caller's key and its rights. A rate of None is unlimited."""

    name: str
    """The name for logs and metrics."""
    digest: bytes = field(repr=False)
    admin: bool = False
    """True if it may change the policy."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    admin: bool = False
    requests_per_minute: Rate | None = None
    tokens_per_minute: Rate | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    keys: Annotated[list[_Entry], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for of in ("name", "sha256"):
            if len({getattr(entry, of) for entry in self.keys}) < len(self.keys):
                raise ValueError(f"two keys have the same {of}")
        return self


def new_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def parse_keys(text: str) -> tuple[ApiKey, ...]:
    """The keys in a key file's text. Raises KeysError.

    text: {"keys": [{"name", "sha256", "admin", "requests_per_minute", "tokens_per_minute"}, ...]}
    """
    try:
        file = _File.model_validate_json(text)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'keys'}: {e['msg']}" for e in error.errors()]
        raise KeysError("; ".join(problems)) from None  # what pydantic says more may have parts of a key
    return tuple(
        ApiKey(e.name, bytes.fromhex(e.sha256), e.admin, e.requests_per_minute, e.tokens_per_minute)
        for e in file.keys
    )


class KeyRing:
    """The keys that are let in; without any, everybody is, and nobody as an admin.

    They are from a file, read again when it changes, or else from the environment.
    """

    def __init__(self, keys: Sequence[ApiKey] = (), path: Path | None = None):
        self._keys = tuple(keys)
        self._path = path
        self._stamp = None if path is None else _stamp(path)

    @classmethod
    def load(cls, path: str | None) -> "KeyRing":
        """Reads the keys of the file, or with None the environment's. Raises KeysError."""
        if path is not None:
            return cls(_read(Path(path)), Path(path))
        text = os.environ.get(ENVIRONMENT, "")
        if not text:
            return cls()
        try:
            return cls(parse_keys(text))
        except KeysError as error:
            raise KeysError(f"{ENVIRONMENT}: {error}") from None

    @property
    def is_open(self) -> bool:
        """True if no key is asked for."""
        return not self._keys

    def find(self, presented: str) -> ApiKey | None:
        """The key presented, found by comparing with all, in a time that tells not which or how near."""
        digest = digest_of(presented)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    async def run(self) -> None:
        """Keeps up with the file, until cancelled."""
        while True:
            await asyncio.sleep(RELOAD_PERIOD_S)
            self.reload_if_changed()

    def reload_if_changed(self) -> None:
        """Reads a changed file again; one that has become unreadable leaves the keys as they were."""
        if self._path is None or (stamp := _stamp(self._path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = _read(self._path)
        except KeysError as error:
            logger.error("the keys stay as they were: %s", error)
        else:
            logger.info("%d API keys read again", len(self._keys))


def _read(path: Path) -> tuple[ApiKey, ...]:
    try:
        return parse_keys(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(f"api_keys_file {path} can't be read: {type(error).__name__}") from error
    except KeysError as error:
        raise KeysError(f"api_keys_file {path}: {error}") from None


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    # A Kubernetes secret changes by a new link to another file, so the inode counts.
    return status.st_mtime_ns, status.st_size, status.st_ino


def key_of(request: Request) -> ApiKey | None:
    """The caller's key, as the middleware has found it."""
    key: ApiKey | None = getattr(request.state, STATE_KEY, None)
    return key
