"""The bytes of single tokens in a text, by the kind of decoder that a tokenizer.json has."""

import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from replicas.model.config import CheckpointError

_BYTES: dict[str, int] = {char: byte for byte, char in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
"""The byte that each character stands for in byte-level tokenizers."""
_CHARS = {byte: char for char, byte in _BYTES.items()}
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A single byte in a tokenizer of the SentencePiece kind, whose other pieces are text with ▁ for a space."""
_DECODERS = frozenset({"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"})
"""Decoders by which a token's text does not depend on the tokens after it, and on those before it only in
whether there are any."""


class TokenBytes:
    """A token's bytes, which may be part of a character, at the beginning of a text or further on.

    A text is its tokens' bytes, one after the other, as UTF-8. Where these are valid UTF-8 that is what the
    tokenizer's own decoder says. Where they are not the decoders differ, some take valid characters beside
    the invalid bytes with them, and so none of them can be followed token by token.

    decoder: of the tokenizer.json. Raises CheckpointError for one that is not of this kind.
    """

    def __init__(self, backend: Tokenizer, decoder: Mapping[str, Any] | None):
        kinds = {part["type"] for part in _parts(decoder)}
        if unknown := sorted(kinds - _DECODERS):
            raise CheckpointError(
                f"tokenizer.json: decoder: type {unknown[0]!r} is not supported, only "
                f"{', '.join(sorted(_DECODERS))}"
            )
        self._backend = backend
        self._is_byte_level = "ByteLevel" in kinds
        self._has_byte_pieces = "ByteFallback" in kinds
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        """Tokens that are no part of a text."""
        self._further: dict[int, bytes] = {}
        self._first: dict[int, bytes] = {}
        self._anchor = self._find_anchor()

    def further(self, token_id: int) -> bytes:
        """The bytes of a token with text before it: of a special one its name, of an unknown one nothing."""
        known = self._further.get(token_id)
        if known is None:
            known = self._further[token_id] = self._find(token_id, self._anchor)
        return known

    def first(self, token_id: int) -> bytes:
        """The bytes of a text's first token, without the space that SentencePiece puts before a text."""
        known = self._first.get(token_id)
        if known is None:
            known = self._first[token_id] = self._find(token_id, ())
        return known

    def of_byte(self, byte: int) -> int | None:
        """The token that is this one byte, above the ASCII; None where there is none."""
        piece = f"<0x{byte:02X}>" if not self._is_byte_level else _CHARS[byte]
        return self._backend.token_to_id(piece)

    def _find(self, token_id: int, before: tuple[int, ...]) -> bytes:
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self.special_ids:
            return piece.encode()
        if self._is_byte_level:
            if all(char in _BYTES for char in piece):
                return bytes(_BYTES[char] for char in piece)
            return piece.encode()  # a token added as text
        byte = _BYTE_PIECE.fullmatch(piece) if self._has_byte_pieces else None
        if byte is not None and (value := int(byte[1], 16)) >= 0x80:
            return bytes((value,))
        return self._decode((*before, token_id))[len(self._decode(before)) :].encode()

    def _decode(self, token_ids: tuple[int, ...]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=False) if token_ids else ""

    def _find_anchor(self) -> tuple[int, ...]:
        """A token of ordinary text, to stand before others; none where the vocabulary has none."""
        for token_id in range(self._backend.get_vocab_size()):
            piece = self._backend.id_to_token(token_id)
            if piece and piece.isalpha() and token_id not in self.special_ids:
                return (token_id,)
        return ()


def _parts(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [inner for part in decoder["decoders"] for inner in _parts(part)]
