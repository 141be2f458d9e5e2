"""The native forward as a model: packs weights for it once, and lays out each step's rows."""

import ctypes
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from replicas.engine.batch import Segment
from replicas.model.adapter import LowRank
from replicas.model.checkpoint import LayerWeights, ModelWeights
from replicas.model.config import ModelConfig
from replicas.model.kv_cache import zeroed_when_touched
from replicas.model.native import structures as c
from replicas.model.native.build import CHOOSE_ARGUMENTS, NativeUnavailable, load_library
from replicas.model.native.penalties import NativePenalties
from replicas.model.rotary import RotaryTable
from replicas.model.sampler import probabilities

BLOCK = 32
"""Rows of a weight matrix that are packed, and summed, together."""
LANES = 16
MAX_QUERIES_PER_KV = 32
MAX_HEAD_DIM = 256
_SOON_DONE = 1 << 17
"""The logits of which the most probable are chosen sooner than the interpreter's lock may come back."""


def require_native(config: ModelConfig) -> None:
    """Raises NativeUnavailable where this machine or this model can't have the native forward."""
    load_library()
    if config.queries_per_kv > MAX_QUERIES_PER_KV or config.head_dim > MAX_HEAD_DIM or config.hidden_size % 2:
        raise NativeUnavailable(
            f"the native forward takes up to {MAX_QUERIES_PER_KV} queries a key head, a head_dim of up to "
            f"{MAX_HEAD_DIM} and an even hidden_size; the model has {config.queries_per_kv}, "
            f"{config.head_dim} and {config.hidden_size}"
        )


def native_page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page in all layers; pages are padded to tiles of 16 tokens."""
    return 2 * config.num_layers * _page_bytes(config, page_size, dtype)


def _page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    is_bfloat16 = int(dtype is torch.bfloat16)
    count: int = load_library().triad_page_bytes(
        *map(ctypes.c_int64, (is_bfloat16, page_size, config.num_kv_heads, config.head_dim))
    )
    return count


class NativeModel:
    """The weights, K/V pages and threads of the native forward. Not thread-safe.

    Takes the weights over: they are emptied layer by layer. A row's results do not depend on the other rows
    of a step, bit for bit, in either dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        *,
        num_pages: int,
        page_size: int,
        num_positions: int,
        num_threads: int,
        quantization: str | None = None,
    ):
        """quantization: 'int8' or None, as in TorchRunner.load."""
        self._quantizes = quantization == "int8"
        self._library = load_library()
        self._keeping_lock = ctypes.PyDLL(self._library._name)
        self._keeping_lock.triad_choose.argtypes = CHOOSE_ARGUMENTS
        self._vocab_size = config.vocab_size
        self._dtype = weights.embedding.dtype
        self._kept: list[torch.Tensor] = []
        page_bytes = _page_bytes(config, page_size, self._dtype)
        rotary = RotaryTable(config, num_positions)
        layers = (c.Layer * config.num_layers)()
        weights.layers.reverse()
        self.pages: list[torch.Tensor] = []
        for layer in layers:
            self._fill(layer, weights.layers.pop())
            pages = zeroed_when_touched((2, num_pages * page_bytes // 4), torch.int32)
            self.pages.append(pages)
            layer.keys, layer.values = pages[0].data_ptr(), pages[1].data_ptr()
        self._layers = layers
        self._model = c.Model(
            is_bfloat16=self._dtype is torch.bfloat16,
            num_layers=config.num_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            page_size=page_size,
            eps=config.rms_norm_eps,
            embedding=self._keep(weights.embedding.contiguous()),
            norm=self._floats(weights.norm),
            phases=self._keep(torch.view_as_real(rotary.phases).contiguous()),
            query_scale=self._floats(rotary.query_scale),
            head=self._linear(weights.head),
            layers=layers,
        )
        self._model_at = ctypes.addressof(self._model)
        self._context = self._library.triad_open(ctypes.c_int64(num_threads))
        self._logits = torch.empty(0, 0)
        self._logits_at = 0
        self._views: dict[int, torch.Tensor] = {}
        self._found = _Choice.room(0)
        self.penalise = NativePenalties(self._library, ctypes.c_void_p(self._context)).penalise

    def __del__(self) -> None:
        if hasattr(self, "_context"):
            self._library.triad_close(ctypes.c_void_p(self._context))

    def forward(self, segments: Sequence[Segment]) -> tuple[tuple[int, ...], torch.Tensor]:
        """Runs a step -> the segments' order, and in it their wanted rows' logits [W, vocab].

        The logits, float32, are valid until the next forward.
        """
        adapted, plain = _parts(segments)
        parts = adapted + plain
        lengths = [len(part.token_ids) for part in parts]
        firsts = list(accumulate(lengths, initial=0))
        num_pages = [len(part.pages) for part in parts]
        num_wanted = [len(part.wanted) for part in parts]
        numbers = (
            (len(parts), firsts[-1], sum(num_wanted)),
            (firsts[len(adapted)], sum(num_wanted[: len(adapted)])),
            [part.start for part in parts],
            lengths,
            [part.end for part in parts],
            [part.num_causal for part in parts],
            accumulate(num_pages[:-1], initial=0),
            *[part.token_ids for part in parts],
            *[[first + at for at in part.wanted] for first, part in zip(firsts, parts, strict=False)],
            *[range(part.place, part.place + count) for part, count in zip(parts, num_wanted, strict=True)],
        )
        count = 5 + 5 * len(parts) + firsts[-1] + 2 * sum(num_wanted)
        given = np.fromiter(chain.from_iterable(numbers), np.int64, count)
        pages = np.fromiter(chain.from_iterable([part.pages for part in parts]), np.int32, sum(num_pages))
        logits = self._logits_of(sum(num_wanted))
        self._run(given.ctypes.data, pages.ctypes.data, self._logits_at)
        return tuple(range(len(segments))), logits

    def _run(self, *arrays: int) -> None:
        """Calls the library. The arrays at these addresses must outlive the call."""
        self._library.triad_forward(self._context, self._model_at, *arrays)

    def choose(self, logits: torch.Tensor, forbidden: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The argmax [W] int64 and logsumexp [W] float32 of logits [W, vocab] float32.

        The forbidden token's logits become -inf.
        """
        num_rows, vocab_size = logits.shape
        found = _Choice.room(num_rows)
        self._choose(logits.data_ptr(), num_rows, vocab_size, logits.stride(0), forbidden, found)
        return torch.from_numpy(found.tokens), torch.from_numpy(found.normalisers)

    def most_probable(self, num_rows: int, forbidden: int | None) -> tuple[list[int], list[float]]:
        """The argmax [W] of the last forward's logits [W, vocab] and its probability.

        The forbidden token's logits become -inf. Without torch, each of whose operations gives the
        interpreter's lock away and may wait milliseconds for it.
        """
        found = self._found
        self._choose(self._logits_at, num_rows, self._vocab_size, self._logits.stride(0), forbidden, found)
        logs = found.largest[:num_rows] - found.normalisers[:num_rows]
        return found.tokens[:num_rows].tolist(), probabilities(logs.tolist())

    def _choose(
        self,
        address: int,
        num_rows: int,
        vocab_size: int,
        row_stride: int,
        forbidden: int | None,
        found: "_Choice",
    ) -> None:
        is_soon_done = num_rows * vocab_size < _SOON_DONE
        choose = (self._keeping_lock if is_soon_done else self._library).triad_choose
        choose(
            self._context,
            address,
            num_rows,
            row_stride,
            vocab_size,
            -1 if forbidden is None else forbidden,
            *found.addresses,
        )

    def _logits_of(self, num_rows: int) -> torch.Tensor:
        """Room for the logits [W, vocab] of so many rows, kept between steps, and for what is chosen by them:
        fresh memory of this size costs more than writing it, and a view as much as a choice."""
        if num_rows > len(self._found.tokens):
            self._logits = torch.empty(2 * num_rows, -(-self._vocab_size // BLOCK) * BLOCK)
            self._logits_at = self._logits.data_ptr()
            self._found = _Choice.room(2 * num_rows)
            self._views.clear()
        view = self._views.get(num_rows)
        if view is None:
            view = self._views[num_rows] = self._logits[:num_rows, : self._vocab_size]
        return view

    def _fill(self, layer: Any, weights: LayerWeights) -> None:
        layer.input_norm, layer.post_norm = self._floats(weights.input_norm), self._floats(weights.post_norm)
        layer.query_norm, layer.key_norm = self._floats(weights.query_norm), self._floats(weights.key_norm)
        layer.qkv_bias = self._floats(_pad_rows(weights.qkv_bias, BLOCK))
        layer.qkv, layer.o = self._linear(weights.qkv), self._linear(weights.o)
        layer.gate_up = self._linear(_interleave(weights.gate_up))
        layer.down = self._linear(_pad_columns(weights.down))
        for name, adapter in weights.adapters.items():
            setattr(layer, f"{name}_adapter", self._pack_adapter(name, adapter))

    def _pack_adapter(self, name: str, adapter: LowRank) -> Any:
        down, up = adapter.down.to(self._dtype), adapter.up.to(self._dtype)
        if name == "gate_up":
            up = _interleave(up)
        elif name == "down":
            down = _pad_columns(down)
        return c.LowRankMatrices(self._pack(down), self._pack(up))

    def _linear(self, weight: torch.Tensor) -> Any:
        if not self._quantizes:
            return self._pack(weight)
        codes, scales = quantize(weight)
        packed = pack_codes(codes, self._dtype)
        return c.Matrix(self._keep(packed), self._floats(_pad_rows(scales, BLOCK)), *weight.shape)

    def _pack(self, weight: torch.Tensor) -> Any:
        return c.Matrix(self._keep(pack(weight)), None, *weight.shape)

    def _floats(self, values: torch.Tensor | None) -> int | None:
        return None if values is None else self._keep(values.float().contiguous())

    def _keep(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


class _Choice(NamedTuple):
    """Room for what triad_choose finds of W rows."""

    tokens: np.ndarray
    """[W] int64"""
    largest: np.ndarray
    """[W] float32"""
    normalisers: np.ndarray
    """[W] float32"""
    addresses: tuple[int, int, int]

    @classmethod
    def room(cls, num_rows: int) -> "_Choice":
        tokens = np.empty(num_rows, np.int64)
        largest, normalisers = np.empty((2, num_rows), np.float32)
        addresses = tokens.ctypes.data, largest.ctypes.data, normalisers.ctypes.data
        return cls(tokens, largest, normalisers, addresses)


class _Part(NamedTuple):
    """Rows of a segment that all have the adapter, or none of which has."""

    start: int
    token_ids: Sequence[int]
    pages: Sequence[int]
    end: int
    """The position behind the segment."""
    num_causal: int
    wanted: Sequence[int]
    place: int
    """That of its first wanted row among those of all segments."""


def _parts(segments: Sequence[Segment]) -> tuple[list[_Part], list[_Part]]:
    """The parts with the adapter, and those without it: a segment of both kinds of rows is cut in two."""
    adapted, plain = [], []
    place = 0
    for segment in segments:
        start, token_ids, pages, wanted = segment.start, segment.token_ids, segment.pages, segment.wanted
        end, border = start + len(token_ids), segment.num_causal
        if not segment.num_adapted:
            plain.append(_Part(start, token_ids, pages, end, border, wanted, place))
        elif not border:
            adapted.append(_Part(start, token_ids, pages, end, 0, wanted, place))
        else:
            count = segment.num_checked
            behind = [at - border for at in wanted[count:]]
            plain.append(_Part(start, token_ids[:border], pages, end, border, wanted[:count], place))
            adapted.append(_Part(start + border, token_ids[border:], pages, end, 0, behind, place + count))
        place += len(wanted)
    return adapted, plain


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Packs [N, K] -> [N / 32, K / unit, 32, unit], padded with zeros; a unit is 4 bytes (linear.h)."""
    unit = 4 // weight.itemsize
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % unit, 0, -rows % BLOCK))
    return padded.view(-1, BLOCK, padded.shape[1] // unit, unit).transpose(1, 2).contiguous()


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [N, K] and scales float32 [N] of a matrix: a weight is about its code times its row's scale.

    Symmetric: a row's largest weight by magnitude has the code 127 or -127.
    """
    codes, scales = [], []
    for rows in torch.split(weight, 4096):  # a float32 copy of the whole head of a large model is gigabytes
        values = rows.float()
        scale = (values.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        codes.append((values / scale[:, None]).round_().to(torch.int8))
        scales.append(scale)
    return torch.cat(codes), torch.cat(scales)


def pack_codes(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Packs int8 [N, K] -> [N / 32, K / unit, 2, unit, 16], padded with zeros; units are the dtype's."""
    unit = 4 // dtype.itemsize
    rows, columns = codes.shape
    padded = F.pad(codes, (0, -columns % unit, 0, -rows % BLOCK))
    halves = padded.view(-1, BLOCK // LANES, LANES, padded.shape[1] // unit, unit)
    return halves.permute(0, 3, 1, 4, 2).contiguous()


def _interleave(gate_up: torch.Tensor) -> torch.Tensor:
    """Interleaves [2 * intermediate, ...], gate before up -> 16 rows of gate, 16 of up, and so on."""
    gate, up = (_pad_rows(half, LANES) for half in gate_up.chunk(2))
    shape = (-1, LANES, *gate.shape[1:])
    return torch.stack((gate.view(shape), up.view(shape)), 1).flatten(0, 2)


def _pad_rows(tensor: Any, multiple: int) -> Any:
    if tensor is None:
        return None
    missing = -len(tensor) % multiple
    return torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:])))


def _pad_columns(weight: torch.Tensor) -> torch.Tensor:
    return F.pad(weight, (0, -weight.shape[1] % LANES))
