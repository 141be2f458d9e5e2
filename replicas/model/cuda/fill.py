"""Fills in on the device what a step begun ahead of its turn could not know when it was packed."""

from collections.abc import Mapping
from itertools import chain

import numpy as np
import torch

from replicas.kernels.attention import SEGMENT_FIELDS
from replicas.kernels.verify import accept
from replicas.model.cuda.lookahead import Guess
from replicas.model.cuda.staging import Staging

_START, _FIRST_PAGE = 1, 4


def fill_in(
    guessed: Guess, tokens: torch.Tensor, parts: Mapping[str, torch.Tensor], staging: Staging, page_size: int
) -> None:
    """Completes the guessed step's token ids, positions and slots from the tokens of the step before it.

    tokens: [W] int64, the outputs of the step before
    parts: the guessed step's (sections_of), changed in place
    """
    # One copy for all of it: staging waits for a copy of its own that is queued behind a running step.
    sent = staging.send(_pack(guessed))
    num_rows, num_segments = len(guessed.sources), len(guessed.segments)
    sources, rest = sent[:num_rows], sent[num_rows:]
    made = tokens
    if len(rest):
        of_row, rest = rest[:num_rows], rest[num_rows:]
        verifies, first_drafts, num_drafts, first_rows = rest[: 4 * num_segments].view(4, -1)
        accepted = accept(rest[4 * num_segments :], first_drafts, num_drafts, tokens, first_rows)
        _move(parts, verifies * (accepted.counts.int() + 1), of_row, page_size)
        made = torch.cat((tokens, accepted.bonus))
    token_ids = parts["token_ids"][:num_rows]
    found = made.int().index_select(0, sources.clamp(min=0))
    token_ids.copy_(torch.where(sources >= 0, found, token_ids))


def _pack(guessed: Guess) -> np.ndarray:
    """The guess in numbers: sources; and if anything is verified, rows' segments and segments' drafts."""
    if all(draft is None for draft in guessed.drafts):
        return np.array(guessed.sources, dtype=np.int32)
    lengths = [len(segment.token_ids) for segment in guessed.segments]
    num_drafts = [0 if draft is None else len(draft) for draft in guessed.drafts]
    parts = [
        guessed.sources,
        np.repeat(np.arange(len(lengths)), lengths),
        [draft is not None for draft in guessed.drafts],
        np.cumsum([0, *num_drafts])[:-1],
        num_drafts,
        guessed.first_outputs,
        list(chain.from_iterable(draft or () for draft in guessed.drafts)),
    ]
    return np.concatenate([np.array(part, dtype=np.int32) for part in parts])


def _move(
    parts: Mapping[str, torch.Tensor], added: torch.Tensor, of_row: torch.Tensor, page_size: int
) -> None:
    """Moves each segment and its rows further on.

    added: [S] int32; of_row: [T] int32, the segment of each row
    """
    segments = parts["segments"].view(-1, int(SEGMENT_FIELDS.value))[: len(added)]
    segments[:, _START] += added
    positions = parts["positions"][: len(of_row)]
    positions += added.index_select(0, of_row)
    pages = segments[:, _FIRST_PAGE].index_select(0, of_row) + positions // page_size
    slots = parts["page_table"].index_select(0, pages) * page_size + positions % page_size
    parts["slots"][: len(of_row)].copy_(slots)
