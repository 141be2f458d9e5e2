"""Tokens of a step's rows: plain ones by kernels without leaving the device, the rest by the sampler."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from replicas.engine.batch import Segment, SegmentOutput, TokenProb
from replicas.kernels.sample_rows import Drawn
from replicas.model.cuda.staging import Fetch, Staging
from replicas.model.logit_rules import Row
from replicas.model.runner import outputs_of, rows_of
from replicas.model.sampler import bounded_temperature, sample, uniforms


def is_plain(segment: Segment) -> bool:
    """True if the segment's tokens are argmaxes, or draws from the softmax at a temperature, with nothing
    else done."""
    sampling = segment.sampling
    if segment.allowed:
        return False
    if sampling.temperature > 0 and (sampling.top_k or sampling.top_p < 1 or sampling.min_p):
        return False
    forbids_end = bool(sampling.min_tokens) and segment.start < segment.prompt_len + sampling.min_tokens
    return sampling.logprobs is None and not (sampling.has_penalties or sampling.logit_bias or forbids_end)


@dataclass(frozen=True, slots=True)
class Special:
    """Rows whose tokens the sampler chooses, by the host's rules."""

    indices: list[int]
    rows: list[Row]
    logits: torch.Tensor
    """[n, vocab], on the device"""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens chosen for the rows of `segments`, in their order; on their way to the host."""

    segments: Sequence[Segment]
    drawn: Drawn
    """Those of plain segments, on the device, with rows of padding behind."""
    fetched: Fetch
    """Drawn.pairs"""
    special: Special | None

    def outputs(
        self,
        segments: Sequence[Segment],
        stream: torch.cuda.Stream | None,
        mask_token_id: int | None,
        eos_token_ids: frozenset[int],
    ) -> list[SegmentOutput]:
        """Waits for the choice; the outputs of `segments`, which are some of its own as they have come to be.

        stream: where rows with rules of the host's are chosen for, beside the step that is under way
        """
        num_rows = sum(len(segment.wanted) for segment in self.segments)
        ids, probs = self.fetched.wait()[:, :num_rows].tolist()
        top: dict[int, tuple[TokenProb, ...]] = {}
        if self.special is not None:
            special = self.special
            with torch.cuda.stream(stream):
                chosen, values, tops = sample(special.logits, special.rows, mask_token_id, eos_token_ids)
            for row, index in enumerate(special.indices):
                ids[index], probs[index] = chosen[row], values[row]
            top = {special.indices[row]: most_probable for row, most_probable in tops.items()}
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


def draws_of(segments: Sequence[Segment]) -> np.ndarray | None:
    """The temperatures and random numbers of the wanted rows in order, [2, W] float32: 0 where a row is
    greedy, or its segment not plain. None if all are 0."""
    if not any(segment.sampling.temperature > 0 and is_plain(segment) for segment in segments):
        return None
    seeds: list[int] = []
    positions: list[int] = []
    temperatures: list[float] = []
    for segment in segments:
        count = len(segment.wanted)
        temperature = bounded_temperature(segment.sampling.temperature) if is_plain(segment) else 0.0
        seeds.extend([segment.sampling.seed] * count)
        positions.extend(segment.sampled_positions)
        temperatures.extend([temperature] * count)
    return np.stack([temperatures, uniforms(seeds, positions)]).astype(np.float32)


def choose(segments: Sequence[Segment], logits: torch.Tensor, drawn: Drawn, staging: Staging) -> Sampled:
    """Sends the tokens of the segments' wanted rows, W in order, to the host; those of segments that are not
    plain are chosen once they are asked for.

    logits: [W, vocab]; the vocabulary ends with the last id that may be sampled
    drawn: the tokens of plain segments' rows, with rows of padding behind the W
    """
    indices: list[int] = []
    rows: list[Row] = []
    first = 0
    for segment in segments:
        if not is_plain(segment):
            indices.extend(range(first, first + len(segment.wanted)))
            rows.extend(rows_of(segment))
        first += len(segment.wanted)
    special = None
    if indices:
        index = staging.send(np.array(indices, dtype=np.int32))
        special = Special(indices, rows, logits.index_select(0, index))
    return Sampled(segments, drawn, Fetch(drawn.pairs), special)
