"""A step's segments as one buffer of int32, and its views on the device.

A CUDA graph reads fixed addresses in fixed sizes, so a step is padded up to one of few (sizes.py):
padded rows are token 0 at position 0 that is stored nowhere and attends to nothing, padded work has no
segment, padded rows of the adapter are -1. Their results are garbage that no other row reads. The page table
comes last, with the words of rules behind it, and only its used part is copied.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from replicas.engine.batch import Segment
from replicas.kernels.attention import SEGMENT_FIELDS, TILE_SHAPES, WORK_FIELDS, Work
from replicas.kernels.rules import ROW_FIELDS
from replicas.kernels.sample_rows import Draws
from replicas.kernels.tiling import work_of
from replicas.model.config import ModelConfig
from replicas.model.cuda.choices import Choices

_FIELDS = int(SEGMENT_FIELDS.value)
_ALIGNED_INTS = 4
_NONE_IS_PADDING = frozenset(("slots", "adapter", "wanted_adapter", "slots_ruled", "ruled"))
"""Sections whose padding is -1."""


@dataclass(frozen=True, slots=True)
class StepSize:
    """The lengths of a step's arrays, which a graph fixes."""

    num_rows: int
    num_wanted: int
    num_ruled: int
    """The number of wanted rows whose logits rules change (replicas.kernels.rules)."""
    num_segments: int
    num_items: tuple[int, ...]
    """The number of items of attention's work of each of its tile shapes."""
    has_adapter: bool
    """True if the draft adapter runs at all."""

    def sections(self) -> Iterator[tuple[str, int]]:
        """The names and lengths of the arrays that the buffer holds before the page table, in order."""
        yield "token_ids", self.num_rows
        yield "positions", self.num_rows
        yield "slots", self.num_rows
        yield "wanted", self.num_wanted
        yield "adapter", self.num_rows if self.has_adapter else 0
        yield "wanted_adapter", self.num_wanted if self.has_adapter else 0
        for name in Draws._fields:
            yield name, self.num_wanted
        yield "slots_ruled", self.num_wanted
        yield "ruled", self.num_ruled * ROW_FIELDS.value
        yield "segments", self.num_segments * _FIELDS
        for shape, count in enumerate(self.num_items):
            yield f"work{shape}", WORK_FIELDS.value * count

    @property
    def num_ints(self) -> int:
        """The count of numbers before the page table."""
        return list(self.places())[-1][1]

    def places(self) -> Iterator[tuple[str, int, int]]:
        """The sections with where each begins and ends, and last "page_table" with where it begins, twice.

        All begin at 16 bytes: a kernel is compiled anew for a pointer that is not aligned to them.
        """
        at = 0
        for name, length in self.sections():
            yield name, at, at + length
            at += -(-length // _ALIGNED_INTS) * _ALIGNED_INTS
        yield "page_table", at, at


@dataclass(frozen=True, slots=True)
class HostStep:
    """A step on the host, not padded; rows in the order of the segments."""

    size: StepSize
    sections: dict[str, np.ndarray]
    """Arrays by the names of StepSize.sections: int32, or the bits of float32."""
    page_table: np.ndarray
    """[P] int32; behind the segments' pages are the words of rules (replicas.model.cuda.choices)."""

    @classmethod
    def pack(
        cls,
        segments: Sequence[Segment],
        config: ModelConfig,
        page_size: int,
        num_places: Sequence[int],
        choices: Choices | None = None,
    ) -> "HostStep":
        """Lays out the segments; one that follows another as long as it may come to be, with all its pages.

        num_places: what attention's work is split for, as of replicas.kernels.attention
        choices: of their wanted rows; None: all are greedy, without rules
        """
        lengths = np.array([len(segment.token_ids) for segment in segments])
        starts = np.array([segment.start for segment in segments])
        ends = lengths.cumsum()
        num_rows = int(ends[-1])
        first_rows = ends - lengths
        segment_of_row = np.repeat(np.arange(len(segments)), lengths)
        positions = np.arange(num_rows) - (first_rows - starts)[segment_of_row]

        num_pages = -(-(starts + lengths) // page_size)
        for index, segment in enumerate(segments):
            if segment.follows is not None:
                num_pages[index] = len(segment.pages)
        first_pages = num_pages.cumsum() - num_pages
        page_table = np.fromiter(
            chain.from_iterable(
                segment.pages[:count] for segment, count in zip(segments, num_pages.tolist(), strict=True)
            ),
            dtype=np.int32,
            count=int(num_pages.sum()),
        )
        pages = page_table[first_pages[segment_of_row] + positions // page_size]
        num_causal = [segment.num_causal for segment in segments]
        wanted = np.concatenate(
            [
                np.array(segment.wanted, dtype=np.int64) + first
                for segment, first in zip(segments, first_rows.tolist(), strict=True)
            ]
        )
        first_adapted = ends - np.array([segment.num_adapted for segment in segments])
        adapted = np.arange(num_rows) >= first_adapted[segment_of_row]
        has_adapter = bool(adapted.any())
        rows = np.arange(num_rows)
        wanted_rows = np.arange(len(wanted))
        if choices is None:
            choices = Choices.greedy(len(wanted))
        work = work_of(
            starts.tolist(), lengths.tolist(), num_causal, config.queries_per_kv, num_places, int(has_adapter)
        )
        sections = {
            "token_ids": np.fromiter(
                chain.from_iterable(segment.token_ids for segment in segments), np.int32, count=num_rows
            ),
            "positions": positions,
            "slots": pages.astype(np.int64) * page_size + positions % page_size,
            "wanted": wanted,
            "adapter": np.where(adapted, rows, -1) if has_adapter else rows[:0],
            "wanted_adapter": np.where(adapted[wanted], wanted_rows, -1) if has_adapter else rows[:0],
            "slots_ruled": choices.slots,
            "ruled": choices.ruled_behind(len(page_table)).ravel(),
            "segments": np.stack([first_rows, starts, lengths, num_causal, first_pages], 1).ravel(),
        }
        sections |= dict(zip(Draws._fields, choices.draws, strict=True))
        for shape in range(len(TILE_SHAPES)):
            sections[f"work{shape}"] = work[shape].ravel() if shape in work else rows[:0]
        size = StepSize(
            num_rows=num_rows,
            num_wanted=len(wanted),
            num_ruled=len(choices.ruled),
            num_segments=len(segments),
            num_items=tuple(len(work.get(shape, ())) for shape in range(len(TILE_SHAPES))),
            has_adapter=has_adapter,
        )
        return cls(size, sections, np.concatenate((page_table, choices.words)))

    def num_ints(self, size: StepSize) -> int:
        """The count of numbers that `write` writes."""
        return size.num_ints + len(self.page_table)

    def write(self, buffer: np.ndarray, size: StepSize) -> int:
        """Writes the step into an int32 buffer, padded to size; returns how many of its numbers are used."""
        *places, (_, at, _) = size.places()
        for name, first, end in places:
            values = self.sections[name]
            padding = -1 if name in _NONE_IS_PADDING or name.startswith("work") else 0
            buffer[first : first + len(values)] = values
            buffer[first + len(values) : end] = padding
        buffer[at : at + len(self.page_table)] = self.page_table
        return at + len(self.page_table)


def sections_of(buffer: torch.Tensor, size: StepSize) -> dict[str, torch.Tensor]:
    """Views of the buffer by the names of StepSize.sections; the rest of it is "page_table"."""
    *places, (last, at, _) = size.places()
    return {name: buffer[first:end] for name, first, end in places} | {last: buffer[at:]}


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step's inputs: views of the buffer on the device, int32 where nothing else is said."""

    token_ids: torch.Tensor
    """[T]"""
    positions: torch.Tensor
    """[T]"""
    slots: torch.Tensor
    """[T]"""
    wanted: torch.Tensor
    """[W]"""
    adapter: torch.Tensor | None
    """[T], the rows of the draft adapter, padded with -1; None where it is off."""
    wanted_adapter: torch.Tensor | None
    """[W], the same among the wanted rows."""
    draws: Draws
    """[W] each"""
    slots_ruled: torch.Tensor
    """[W], as replicas.kernels.sample_rows.Ruled has them"""
    ruled: torch.Tensor
    """[R, 6], as replicas.kernels.rules has them, with places in page_table"""
    segments: torch.Tensor
    """[S, 5]"""
    page_table: torch.Tensor
    """[P], the rest of the buffer: the words of rules too."""
    work: tuple[Work, ...]
    """Attention's."""

    @classmethod
    def view(cls, buffer: torch.Tensor, size: StepSize) -> "StepInputs":
        """Views of buffer [N] int32 as HostStep.write leaves it."""
        parts = sections_of(buffer, size)
        return cls(
            token_ids=parts["token_ids"],
            positions=parts["positions"],
            slots=parts["slots"],
            wanted=parts["wanted"],
            adapter=parts["adapter"] if size.has_adapter else None,
            wanted_adapter=parts["wanted_adapter"] if size.has_adapter else None,
            draws=Draws(*(_typed(name, parts[name]) for name in Draws._fields)),
            slots_ruled=parts["slots_ruled"],
            ruled=parts["ruled"].view(-1, ROW_FIELDS.value),
            segments=parts["segments"].view(-1, _FIELDS),
            page_table=parts["page_table"],
            work=tuple(
                Work(shape, parts[f"work{index}"].view(-1, WORK_FIELDS.value))
                for index, shape in enumerate(TILE_SHAPES)
            ),
        )


def _typed(name: str, bits: torch.Tensor) -> torch.Tensor:
    """The numbers of Draws, of which top_ks alone are whole."""
    return bits if name == "top_ks" else bits.view(torch.float32)
