"""Tokens of a step's rows, on their way from the device, with the most probable ones where they are asked
for."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from replicas.engine.batch import Segment, SegmentOutput, TokenProb
from replicas.kernels.rank_rows import rank_rows
from replicas.kernels.sample_rows import Drawn
from replicas.model.cuda.staging import Fetch, Staging
from replicas.model.runner import outputs_of


@dataclass(frozen=True, slots=True)
class _Ranked:
    """The most probable tokens of some rows, on their way to the host."""

    num_ranked: dict[int, int]
    """By row how many are asked for, in the order of `fetched`."""
    fetched: Fetch | None
    """Token ids and logits, as of rank_rows; None where none is asked for."""

    def wait(self, log_sums: Sequence[float]) -> dict[int, tuple[TokenProb, ...]]:
        """By row its most probable tokens with their log-probabilities. log_sums: of all rows."""
        if self.fetched is None:
            return dict.fromkeys(self.num_ranked, ())
        ids, values = self.fetched.wait().numpy()
        found = {}
        for (row, count), row_ids, row_values in zip(self.num_ranked.items(), ids, values, strict=True):
            with np.errstate(invalid="ignore"):  # of rows that are not finite, which have no token
                logprobs = row_values[:count].astype(np.float32) - np.float32(log_sums[row])
            found[row] = tuple(zip(row_ids[:count].astype(int).tolist(), logprobs.tolist(), strict=True))
        return found


@dataclass(frozen=True, slots=True)
class Sampled:
    """A step that is queued, the implementation of replicas.engine.batch.Begun: the tokens chosen for the
    rows of `segments`, in their order, on their way to the host."""

    segments: Sequence[Segment]
    drawn: Drawn
    """On the device, with rows of padding behind."""
    fetched: Fetch
    """Drawn.report"""
    ranked: _Ranked

    @classmethod
    def of(
        cls,
        segments: Sequence[Segment],
        logits: torch.Tensor,
        drawn: Drawn,
        mask_token_id: int | None,
        staging: Staging,
    ) -> "Sampled":
        """Queues the way to the host of the tokens of the segments' W wanted rows.

        logits: [W, vocab] of these rows; drawn: their tokens, with rows of padding behind the W
        """
        num_ranked: dict[int, int] = {}
        first = 0
        for segment in segments:
            last = first + len(segment.wanted)
            if segment.sampling.logprobs is not None:
                num_ranked |= dict.fromkeys(range(first, last), segment.sampling.logprobs)
            first = last
        fetched = None
        if most := max(num_ranked.values(), default=0):
            rows = staging.send(np.array(list(num_ranked), np.int32))
            fetched = Fetch(rank_rows(logits, rows, most, mask_token_id))
        return cls(segments, drawn, Fetch(drawn.report), _Ranked(num_ranked, fetched))

    def outputs(self, segments: Sequence[Segment]) -> list[SegmentOutput]:
        """Waits for the choice; the outputs of `segments`, which are some of its own as they have come to
        be."""
        num_rows = sum(len(segment.wanted) for segment in self.segments)
        ids, probs, log_sums = self.fetched.wait()[:, :num_rows].tolist()
        top = self.ranked.wait(log_sums)
        firsts = first_rows(self.segments)
        rows = [
            row
            for segment in segments
            for row in range(firsts[segment.seq_id], firsts[segment.seq_id] + len(segment.wanted))
        ]
        return outputs_of(
            segments,
            [int(ids[row]) for row in rows],
            [probs[row] for row in rows],
            {at: top[row] for at, row in enumerate(rows) if row in top},
        )


def first_rows(segments: Sequence[Segment]) -> dict[int, int]:
    """The first of each segment's rows among those sampled, by sequence."""
    firsts = accumulate((len(segment.wanted) for segment in segments), initial=0)
    return {segment.seq_id: first for segment, first in zip(segments, firsts, strict=False)}
