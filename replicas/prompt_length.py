"""A lower bound of a text's tokens by its length alone, before a tokenizer spends time on it."""

import json
import math
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

_KEEPING = frozenset({"Prepend", "NFD", "NFKD", "Lowercase", "ByteLevel"})
"""Normalizers after which a text is as long as before, or longer."""
_COMPOSING = frozenset({"NFC", "NFKC"})
"""Normalizers that make one character of up to MAX_COMPOSED."""
MAX_COMPOSED = 4
_SPLITTING = frozenset({"ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "Split", "Punctuation"})
"""Pre-tokenizers that lose no character, but where their behavior is to remove some."""


def chars_per_token(backend: Tokenizer) -> int | None:
    """The most characters of a text that one token can stand for.

    None for a tokenizer that may make nothing of characters, or one token of any number of them: such as
    drop blanks or controls, or have an unknown token.
    """
    told = json.loads(backend.to_str())
    normalizers, pre_tokenizers = tuple(_parts(told["normalizer"])), tuple(_parts(told["pre_tokenizer"]))
    if not all(map(_keeps_length, normalizers)) or not all(map(_loses_nothing, pre_tokenizers)):
        return None
    if any(token["lstrip"] or token["rstrip"] for token in told["added_tokens"]):
        return None  # they take the blanks around them along
    model = told["model"]
    vocab = model.get("vocab", ())
    pieces = list(vocab) if isinstance(vocab, dict) else [piece for piece, _ in vocab]
    kinds = {part["type"] for part in normalizers + pre_tokenizers}
    if not _covers_bytes(set(pieces), "ByteLevel" in kinds, bool(model.get("byte_fallback"))):
        return None
    longest = max(map(len, pieces + [token["content"] for token in told["added_tokens"]]))
    return longest * (MAX_COMPOSED if kinds & _COMPOSING else 1)


def fewest_tokens(num_chars: int, per_token: int | None) -> int:
    return 0 if per_token is None else math.ceil(num_chars / per_token)


def _parts(told: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if told is None:
        return
    for key in ("normalizers", "pretokenizers"):
        if key in told:
            for part in told[key]:
                yield from _parts(part)
            return
    yield told


def _keeps_length(normalizer: dict[str, Any]) -> bool:
    if normalizer["type"] == "Replace":
        text = normalizer["pattern"].get("String")
        return text is not None and len(normalizer["content"]) >= len(text)
    return normalizer["type"] in _KEEPING | _COMPOSING


def _loses_nothing(pre_tokenizer: dict[str, Any]) -> bool:
    return pre_tokenizer["type"] in _SPLITTING and pre_tokenizer.get("behavior") != "Removed"


def _covers_bytes(pieces: set[str], is_byte_level: bool, has_fallback: bool) -> bool:
    """True if there is a token for each byte, so that no character is unknown."""
    if is_byte_level:
        return pieces.issuperset(bytes_to_unicode().values())  # type: ignore[no-untyped-call]
    return has_fallback and pieces.issuperset(f"<0x{byte:02X}>" for byte in range(256))
