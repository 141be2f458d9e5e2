"""How many characters of a text one token can stand for, from a tokenizer.json.

So that a prompt which can't fit is refused by its length, before anything reads it. None where the file
allows no bound: a tokenizer that drops characters, or makes one token of any number of them.
"""

from collections.abc import Mapping
from typing import Any

MAX_COMPOSED = 4
"""Characters that Unicode composes into one, at most (UAX #15: the longest canonical decomposition)."""

_NORMALIZERS = {"Prepend": 1, "Lowercase": 1, "NFD": 1, "NFKD": 1, "NFC": MAX_COMPOSED, "NFKC": MAX_COMPOSED}
"""By how much each shortens a text at most."""
_PRE_TOKENIZERS = frozenset({"ByteLevel", "Metaspace", "Digits", "Split", "Punctuation"})
"""Those that keep all of a text, but for what `behavior` says."""


def max_chars_per_token(tokenizer: Mapping[str, Any]) -> int | None:
    """tokenizer: the JSON of a Hugging Face tokenizer."""
    parts = _flat(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if tokenizer.get("truncation") is not None or not all(map(_keeps_all, parts)):
        return None
    added = tokenizer.get("added_tokens") or []
    if any(token.get("lstrip") or token.get("rstrip") for token in added):
        return None
    shrink = 1
    for part in _flat(tokenizer.get("normalizer"), "normalizers"):
        factor = _shrink_of(part)
        if factor is None:
            return None
        shrink *= factor
    model = tokenizer["model"]
    vocabulary = model["vocab"] if model.get("type") == "BPE" else {}
    if not _knows_all(model, vocabulary, is_byte_level=any(part["type"] == "ByteLevel" for part in parts)):
        return None
    return shrink * max(map(len, [*vocabulary, *(token["content"] for token in added)]))


def _flat(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [each for inner in part[name] for each in _flat(inner, name)]
    return [part]


def _keeps_all(pre_tokenizer: Mapping[str, Any]) -> bool:
    return pre_tokenizer["type"] in _PRE_TOKENIZERS and pre_tokenizer.get("behavior") != "Removed"


def _shrink_of(normalizer: Mapping[str, Any]) -> int | None:
    if normalizer["type"] == "Replace":
        found = normalizer["pattern"].get("String")
        return 1 if found is not None and len(normalizer["content"]) >= len(found) else None
    return _NORMALIZERS.get(normalizer["type"])


def _knows_all(model: Mapping[str, Any], vocabulary: Mapping[str, int], is_byte_level: bool) -> bool:
    """Whether there is a token for whatever comes; what a model does not know it may drop, or fuse."""
    if is_byte_level:
        return sum(len(piece) == 1 for piece in vocabulary) >= 256
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    return bool(vocabulary) and model.get("unk_token") is not None and not model.get("fuse_unk")
