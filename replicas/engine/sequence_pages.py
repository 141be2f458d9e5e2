"""The pages of sequences: taken from the pool, found by content, made findable, and given back."""

from replicas.engine.blocks import PagePool
from replicas.engine.prefill import reusable_len
from replicas.engine.sequence import Sequence


class SequencePages:
    """The only writer of a sequence's `pages`, `num_kept` and `key_number`."""

    def __init__(self, pool: PagePool):
        self._pool = pool

    def reuse(self, sequence: Sequence) -> None:
        """Gives a sequence about to run the cached pages of its prefix; its first token needs a forward."""
        prefix = sequence.tokens[: reusable_len(sequence)]
        sequence.pages, sequence.key_number = self._pool.find(prefix, sequence.cache_salt)
        sequence.num_kept = len(sequence.pages)
        sequence.num_cached = sequence.num_kept * self._pool.page_size
        if sequence.began_s is None:  # what it finds later may be its own
            sequence.num_reused = sequence.num_cached

    def can_extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """True if it has pages for num_tokens in all, or enough are free."""
        return self._pool.pages_for(num_tokens) - len(sequence.pages) <= self._pool.num_free

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gives it pages for num_tokens in all; False, and nothing given, when too few are free."""
        num_missing = self._pool.pages_for(num_tokens) - len(sequence.pages)
        if num_missing > 0:
            pages = self._pool.allocate(num_missing)
            if pages is None:
                return False
            sequence.pages.extend(pages)
        return True

    def keep(self, sequence: Sequence) -> None:
        """Makes pages findable that have become full of committed K/V."""
        size = self._pool.page_size
        # A sequence that ends inside an accepted draft has K/V cached for tokens it did not take.
        num_tokens = min(sequence.num_cached, len(sequence.tokens))
        while (end := (sequence.num_kept + 1) * size) <= num_tokens:
            tokens = tuple(sequence.tokens[end - size : end])
            page = sequence.pages[sequence.num_kept]
            sequence.key_number = self._pool.keep(page, sequence.key_number, tokens)
            sequence.num_kept += 1

    def release(self, sequence: Sequence) -> None:
        """Takes all of its pages back; nothing of it is cached any more."""
        self._pool.release(sequence.pages)
        sequence.pages = []
        sequence.num_cached = sequence.num_kept = 0
        sequence.key_number = sequence.cache_salt
