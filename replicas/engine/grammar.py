"""Grammars as the engine sees them: masks of token ids, and whether a completion is complete."""

from collections.abc import Sequence
from typing import Protocol


class GrammarFailed(Exception):
    """The grammar can't go on, as when it has become too complex; its sequence ends with an error."""


def allows(mask: bytes | None, token_id: int) -> bool:
    """True if a mask of Grammar.masks lets the token come."""
    return mask is None or (token_id // 8 < len(mask) and bool(mask[token_id // 8] >> token_id % 8 & 1))


class Grammar(Protocol):
    """A grammar that follows one completion. Implementations: replicas.grammar, and around it
    replicas.tools.thinking_budget."""

    @property
    def is_complete(self) -> bool:
        """True if nothing but an end of text may follow what was accepted."""
        ...

    def masks(self, draft: Sequence[int]) -> tuple[bytes | None, ...]:
        """Masks of the tokens that may come next, then of those that may come after each token of the draft;
        None where any may.

        Ends before the first token of the draft that may not come, or where the rest would take too long, so
        there are 1 to len(draft) + 1.
        Bit k of a mask, in little-endian order, is token k; what it does not reach may not come. At
        least one token may. The state stays as it was. GrammarFailed when there is no telling.
        """
        ...

    def num_allowed(self, tokens: Sequence[int]) -> int:
        """The number of tokens, the first of these, that may come next, one after another.

        The state stays as it was. GrammarFailed when there is no telling.
        """
        ...

    def mask_behind(self, tokens: Sequence[int]) -> bytes | None:
        """The mask, as of masks(), of the token that may come after these, which may all come.

        The state stays as it was. GrammarFailed when there is no telling.
        """
        ...

    def forced(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Tokens that have to come after these, which may all come; no more than those that are told cheaply.

        The state stays as it was. GrammarFailed when there is no telling.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Takes one more token in, which the grammar allows."""
        ...
