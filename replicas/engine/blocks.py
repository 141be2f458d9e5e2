"""The pool of K/V pages. Pure bookkeeping: which page is whose; the tensors live with the runner."""


class PagePool:
    """Hands out page numbers 0 to num_pages - 1, each to one owner at a time."""

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages and page_size must be at least 1, got {num_pages} and {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._used)

    def pages_for(self, num_tokens: int) -> int:
        """How many pages hold num_tokens tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """count pages, or None, and nothing taken, when fewer are free."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        self._used.update(pages)
        return pages

    def release(self, pages: list[int]) -> None:
        """Takes pages back. Releasing a page that is not in use is a bug of the caller: KeyError."""
        for page in pages:
            self._used.remove(page)
            self._free.append(page)

    def check_integrity(self, owned: list[int]) -> None:
        """owned: the pages of all sequences. Raises AssertionError on a leak or a double owner."""
        assert len(owned) == len(set(owned)), "a page has two owners"
        assert set(owned) == self._used, "pages in use and pages owned differ"
        assert len(self._free) == len(set(self._free)), "a page is free twice"
        assert self._used.isdisjoint(self._free), "a page is free and in use"
        assert len(self._used) + len(self._free) == self.num_pages, "a page was lost"
