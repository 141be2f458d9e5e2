"""The pool of K/V pages. It only keeps the books of who owns which page; the tensors live with the runner.

Full pages of committed K/V are kept findable after their sequences end, by content: a page's key is
its tokens and the key of the page before it, so equal keys mean equal whole prefixes, compared token
for token and not by a hash that could collide. Committed K/V is the same in all modes, and so is the
cache. Pages that nobody uses are evicted, the longest unused first, when others are needed.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

Key = int | str
"""The pool's name of a prefix: the number of its last page, or a salt where it is empty."""
ROOT: Key = ""
"""The empty prefix without a salt."""


class PagePool:
    """Hands out page numbers 0 to num_pages - 1. A page has one owner, or several that only read it."""

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages and page_size must be at least 1, got {num_pages} and {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))  # of unknown content
        self._idle: OrderedDict[int, None] = OrderedDict()  # findable and unused, the longest unused first
        self._num_owners: dict[int, int] = {}
        self._page_of: dict[tuple[Key, tuple[int, ...]], int] = {}
        self._key_of: dict[int, tuple[Key, tuple[int, ...]]] = {}
        self._number_of: dict[int, int] = {}
        self._last_number = 0

    @property
    def num_free(self) -> int:
        """Pages that allocate() could give."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return len(self._num_owners)

    def pages_for(self, num_tokens: int) -> int:
        """The number of pages that hold num_tokens tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """Takes count pages of unknown content; None, and nothing taken, when fewer are free."""
        if count > self.num_free:
            return None
        pages = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._num_owners[page] = 1
            pages.append(page)
        return pages

    def find(self, tokens: Sequence[int], salt: Key = ROOT) -> tuple[list[int], Key]:
        """Takes the cached pages of the longest prefix of tokens; whole pages only.

        Returns them, to be released like allocated ones, and the key of what they hold.
        """
        pages: list[int] = []
        number = salt
        for start in range(0, len(tokens) - self.page_size + 1, self.page_size):
            page = self._page_of.get((number, tuple(tokens[start : start + self.page_size])))
            if page is None:
                break
            self._num_owners[page] = self._num_owners.get(page, 0) + 1
            self._idle.pop(page, None)
            pages.append(page)
            number = self._number_of[page]
        return pages, number

    def keep(self, page: int, parent: Key, tokens: tuple[int, ...]) -> int:
        """Makes a full page findable, whose owner has committed its K/V and will not write it again.

        parent: the key of the prefix before it. Returns its own. Where another page holds the
        same already, that one stays the one to be found.
        """
        key = (parent, tokens)
        known = self._page_of.get(key)
        if known is not None:
            return self._number_of[known]
        self._last_number += 1
        self._page_of[key] = page
        self._key_of[page] = key
        self._number_of[page] = self._last_number
        return self._last_number

    def release(self, pages: Sequence[int]) -> None:
        """Takes pages back, in their order in the sequence. KeyError for a page that is not in use."""
        for page in reversed(pages):  # a prefix outlives what follows it, without which it is still of use
            self._num_owners[page] -= 1
            if self._num_owners[page] == 0:
                del self._num_owners[page]
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def forget(self, pages: Iterable[int]) -> None:
        """Makes pages in use unfindable whose content is not to be trusted, and so all that follows them."""
        for page in pages:
            key = self._key_of.pop(page, None)
            if key is not None:
                del self._page_of[key]
                del self._number_of[page]

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        del self._number_of[page]
        return page

    def check_integrity(self, owned: Iterable[int]) -> None:
        """Raises AssertionError where the books disagree.

        owned: the pages of all sequences, once an owner
        """
        assert Counter(owned) == Counter(self._num_owners), "pages in use and pages owned differ"
        sets = (set(self._free), set(self._idle), set(self._num_owners))
        assert sum(map(len, sets)) == self.num_pages == len(set().union(*sets)), "a page was lost or is twice"
        assert len(self._free) == len(sets[0]), "a page is free twice"
        assert set(self._idle) <= set(self._key_of), "an idle page can't be found"
        assert set(self._free).isdisjoint(self._key_of), "a free page can be found"
        assert {page: key for key, page in self._page_of.items()} == self._key_of, "keys and pages differ"
        assert self._number_of.keys() == self._key_of.keys(), "a kept page has no number"
