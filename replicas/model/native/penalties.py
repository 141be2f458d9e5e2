"""Penalties in the native library, several times faster than replicas.model.penalties does them in torch."""

import ctypes
from collections.abc import Sequence

import torch

from replicas.model.native import structures as c
from replicas.model.penalties import Overwritten, Penalty, as_line


class NativePenalties:
    """The library's penalties, on the threads of a context. Not thread-safe."""

    def __init__(self, library: ctypes.CDLL, context: ctypes.c_void_p):
        self._library, self._context = library, context
        self._was = torch.empty(0)

    def penalise(self, logits: torch.Tensor, penalties: Sequence[Penalty]) -> list[Overwritten]:
        """As replicas.model.penalties.penalise; what it gives back is valid until the next call."""
        sizes = [size for p in penalties for size in (p.num_rows * len(p.shared.ids), len(p.own_ids))]
        was = iter(torch.split(self._floats(sum(sizes)), sizes))
        parts = [(penalty, next(was).view(penalty.num_rows, -1), next(was)) for penalty in penalties]
        given = (c.Penalty * len(parts))(*(_given(*part) for part in parts))
        self._library.triad_penalise(
            self._context,
            ctypes.c_void_p(logits.data_ptr()),
            ctypes.c_int64(logits.stride(0)),
            given,
            ctypes.c_int64(len(parts)),
        )
        overwritten = []
        for penalty, shared_was, own_was in parts:
            if len(penalty.shared.ids):
                ids = torch.from_numpy(penalty.shared.ids)
                overwritten.append(Overwritten(logits[penalty.rows], ids, shared_was, penalty.rows))
            if len(penalty.own_ids):
                rows, own_ids = penalty.own_places
                places = torch.from_numpy(rows * logits.stride(0) + own_ids)
                overwritten.append(Overwritten(as_line(logits), places, own_was[None], None))
        return overwritten

    def _floats(self, count: int) -> torch.Tensor:
        """So many floats, kept between steps: fresh memory of this size costs more than writing it."""
        if count > len(self._was):
            self._was = torch.empty(2 * count)
        return self._was[:count]


def _given(penalty: Penalty, shared_was: torch.Tensor, own_was: torch.Tensor) -> c.Penalty:
    return c.Penalty(
        first_row=penalty.rows.start,
        num_rows=penalty.num_rows,
        num_shared=len(penalty.shared.ids),
        shared_ids=penalty.shared.ids.ctypes.data,
        shared_times=penalty.shared.times.ctypes.data,
        own_starts=penalty.own_starts.ctypes.data,
        own_ids=penalty.own_ids.ctypes.data,
        own_times=penalty.own_times.ctypes.data,
        taken_off=penalty.taken_off.ctypes.data,
        scale=penalty.scale,
        shared_was=shared_was.data_ptr(),
        own_was=own_was.data_ptr(),
    )
