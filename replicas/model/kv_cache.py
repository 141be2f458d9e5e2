"""Paged keys and values."""

from math import prod

import numpy as np
import torch

from replicas.model.config import ModelConfig

_ALIGNMENT = 64


def zeroed_when_touched(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A CPU tensor of zeros whose memory is not resident before it is first touched, as torch.zeros's is; it
    begins at a cache line."""
    num_bytes = prod(shape) * dtype.itemsize
    memory = np.zeros(num_bytes + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return torch.from_numpy(memory[first : first + num_bytes]).view(dtype).view(shape)


class KvCache:
    """Keys and values of all layers, in pages.

    `layers` holds one tensor a layer, [num_pages, 2, num_kv_heads, page_size, head_dim]; index 0 of the
    second axis is keys, 1 values. A head's keys of one page are contiguous, so a gather of whole pages gives
    attention contiguous [length, head_dim] blocks. Memory of pages never written is not resident.
    """

    def __init__(self, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype):
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        shape = (num_pages, 2, config.num_kv_heads, page_size, config.head_dim)
        self.layers = [zeroed_when_touched(shape, dtype) for _ in range(config.num_layers)]
        self._rows = [layer.view(-1, self.head_dim) for layer in self.layers]
        self._block = page_size * self.head_dim
        self._pages = [layer.view(-1, self._block) for layer in self.layers]
        # Reused, because fresh pages of a large buffer cost more than the copy into them.
        self._gathered = torch.empty(0, dtype=dtype)

    @staticmethod
    def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page in all layers."""
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * page_size * dtype.itemsize

    def store(self, layer: int, keys_values: torch.Tensor, rows: torch.Tensor) -> None:
        """Writes keys_values [T, 2 * num_kv_heads, head_dim] at rows [T * 2 * num_kv_heads] of
        `store_rows`."""
        self._rows[layer].index_copy_(0, rows, keys_values.reshape(-1, self.head_dim))

    def gather(self, layer: int, blocks: torch.Tensor, num_sequences: int) -> torch.Tensor:
        """Reads blocks (`gather_blocks`, P pages a sequence) -> [2, S, num_kv_heads, P * page_size,
        head_dim].

        The result is valid until the next gather.
        """
        length = len(blocks) * self._block
        if length > len(self._gathered):
            self._gathered = self._gathered.new_empty(2 * length)
        pages = self._gathered[:length].view(-1, self._block)
        torch.index_select(self._pages[layer], 0, blocks, out=pages)
        return pages.view(2, num_sequences, self.num_kv_heads, -1, self.head_dim)

    def store_rows(self, pages: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """The rows at which `store` writes tokens, given their pages [T] and their offsets [T] in them."""
        heads = torch.arange(2 * self.num_kv_heads)
        return (
            (pages[:, None] * (2 * self.num_kv_heads) + heads) * self.page_size + offsets[:, None]
        ).flatten()

    def gather_blocks(self, page_table: torch.Tensor) -> torch.Tensor:
        """The blocks that `gather` reads for page_table [S, P]; past a sequence's end any page will do."""
        heads = torch.arange(2 * self.num_kv_heads).view(2, 1, self.num_kv_heads, 1)
        return (page_table[None, :, None, :] * (2 * self.num_kv_heads) + heads).flatten()
