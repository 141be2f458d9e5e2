"""The facts in a checkpoint's tokenizer files that its model must agree with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replicas.model.fields import CheckpointError, read_json

_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The token ids that a checkpoint's tokenizer knows."""

    size: int
    """One more than the largest token id."""
    named: Mapping[str, int]
    """Ids of the tokens that tokenizer_config.json names."""

    @classmethod
    def from_folder(cls, folder: Path) -> "Vocabulary | None":
        """Reads a checkpoint's vocabulary; None where there is no tokenizer.json. Raises CheckpointError."""
        path = folder / _FILE
        if not path.is_file():
            return None
        raw = read_json(path)
        ids = _pieces(raw)
        for token in raw.get("added_tokens") or ():
            if not isinstance(token, dict) or not isinstance(token.get("content"), str):
                raise CheckpointError(
                    f"{path}: added_tokens must be objects with id and content, got {token!r}"
                )
            ids[token["content"]] = token.get("id")
        for piece, token_id in ids.items():
            if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
                raise CheckpointError(
                    f"{path}: the id of token {piece!r} must be an integer, got {token_id!r}"
                )
        if not ids:
            raise CheckpointError(f"{path}: model.vocab is empty")
        return cls(max(ids.values()) + 1, _named(folder / _CONFIG, ids))


def _pieces(raw: Mapping[str, Any]) -> dict[str, Any]:
    model = raw.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        return dict(vocab)
    if isinstance(vocab, list):  # Unigram: pieces with their scores, in the order of ids
        return {str(entry[0]): index for index, entry in enumerate(vocab)}
    raise CheckpointError(f"{_FILE}: model.vocab must be an object or a list of pieces")


def _named(path: Path, ids: Mapping[str, int]) -> dict[str, int]:
    """Reads the named tokens' ids. Raises CheckpointError for an end of text or a mask that is not among
    ids."""
    if not path.is_file():
        return {}
    raw = read_json(path)
    named = {}
    for key in ("eos_token", "mask_token"):
        value = raw.get(key)
        name = value.get("content") if isinstance(value, dict) else value
        if name is None:
            continue
        if not isinstance(name, str) or name not in ids:
            raise CheckpointError(f"{path.name}: {key} {value!r} is not in the vocabulary of {_FILE}")
        named[key] = ids[name]
    return named
