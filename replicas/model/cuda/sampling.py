"""Tokens of a step's rows: plain ones by kernels without leaving the device, the rest by the sampler."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from replicas.engine.batch import Segment, SegmentOutput, TokenProb
from replicas.kernels.sample_rows import Drawn
from replicas.model.cuda.staging import Fetch
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
class Sampled:
    """The tokens chosen for the rows of `segments`, in their order; on their way to the host."""

    segments: Sequence[Segment]
    tokens: torch.Tensor
    """[W] int64, on the device"""
    fetched: Fetch
    """Drawn.pairs, with rows of padding behind the W."""
    top: dict[int, tuple[TokenProb, ...]]

    def first_rows(self) -> list[int]:
        """The index of each segment's first row."""
        return [0, *accumulate(len(segment.wanted) for segment in self.segments)][:-1]

    def outputs(self) -> tuple[list[int], list[SegmentOutput]]:
        """Waits for the choice; returns all the tokens, and the outputs by segment."""
        ids, probs = self.fetched.wait()[:, : len(self.tokens)].tolist()
        tokens = [int(token) for token in ids]
        return tokens, outputs_of(self.segments, tokens, probs, self.top)


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


def choose(
    segments: Sequence[Segment],
    logits: torch.Tensor,
    drawn: Drawn,
    mask_token_id: int | None,
    eos_token_ids: frozenset[int],
) -> Sampled:
    """Sends the tokens of the segments' wanted rows, W in order, to the host; those of segments that are not
    plain are chosen here, and the host waits for them.

    logits: [W, vocab], may be overwritten; the vocabulary ends with the last id that may be sampled
    drawn: the tokens of plain segments' rows; may be overwritten, and have rows of padding behind the W
    """
    tokens, pairs = drawn.tokens[: len(logits)], drawn.pairs
    top: dict[int, tuple[TokenProb, ...]] = {}
    special: list[int] = []
    rows: list[Row] = []
    first = 0
    for segment in segments:
        if not is_plain(segment):
            special.extend(range(first, first + len(segment.wanted)))
            rows.extend(rows_of(segment))
        first += len(segment.wanted)
    if special:
        index = torch.tensor(special, device=logits.device)
        ids, values, tops = sample(logits[index], rows, mask_token_id, eos_token_ids)
        pairs[:, index] = torch.tensor([ids, values], dtype=torch.float64, device=logits.device)
        tokens = pairs[0, : len(logits)].long()
        top = {special[row]: most_probable for row, most_probable in tops.items()}
    return Sampled(segments, tokens, Fetch(pairs), top)
