"""Values of a checkpoint's JSON files, each of which is checked before anything uses it."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


class CheckpointError(Exception):
    """The checkpoint can't be served; the message names what is wrong and what to change."""


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises CheckpointError unless the file is there and holds one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: not a checkpoint folder") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


class Fields:
    """The fields of one JSON object. Each method raises CheckpointError, which names file and key.

    A field that is null counts as one that is not there.
    """

    def __init__(self, raw: Mapping[str, Any], file: str, prefix: str = ""):
        self._raw = raw
        self._file = file
        self._prefix = prefix

    def error(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: {self._prefix}{key} {what}")

    def get(self, key: str) -> Any:
        return self._raw.get(key)

    def positive(self, key: str, default: int | None = None) -> int:
        value = self._raw.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(key, f"must be a positive integer, got {value!r}")
        return value

    def number(self, key: str, default: float | None, min_value: float, max_value: float = math.inf) -> float:
        """The number of a field.

        min_value, max_value: inclusive. default None: there must be a number.
        """
        value = self._raw.get(key)
        if value is None:
            value = default
        number = math.nan
        if isinstance(value, int | float) and not isinstance(value, bool):
            with suppress(OverflowError):  # JSON's integers have no end
                number = float(value)
        if not math.isfinite(number) or not min_value <= number <= max_value:
            bound = f"of at least {min_value:g}" + (
                "" if math.isinf(max_value) else f" and at most {max_value:g}"
            )
            raise self.error(key, f"must be a number {bound}, got {value!r}")
        return number

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, got {value!r}")
        return value

    def object(self, key: str) -> dict[str, Any]:
        value = self._raw.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(key, f"must be an object, got {value!r}")
        return value

    def token_id(self, key: str, bound: "TokenBound") -> int | None:
        value = self._raw.get(key)
        return None if value is None else self._checked(key, value, bound)

    def token_ids(self, key: str, bound: "TokenBound") -> frozenset[int]:
        """The ids of a field that has one id or a list of them; none where it is missing."""
        value = self._raw.get(key)
        if value is None:
            return frozenset()
        ids = value if isinstance(value, list) else [value]
        return frozenset(self._checked(key, token_id, bound) for token_id in ids)

    def _checked(self, key: str, value: Any, bound: "TokenBound") -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < bound.size:
            raise self.error(key, f"must be in [0, {bound.name} {bound.size}), got {value!r}")
        return value


class TokenBound:
    """The bound below which token ids are.

    name: of what that is the number
    """

    def __init__(self, size: int, name: str):
        self.size = size
        self.name = name
