"""Tokens of a step's rows: plain ones by kernels without leaving the device, the rest by the sampler."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from replicas.engine.batch import Segment, SegmentOutput, TokenProb
from replicas.kernels.confidence import Confidence
from replicas.kernels.sample_rows import sample_rows
from replicas.messages import SamplingParams
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
    top: dict[int, tuple[TokenProb, ...]]

    def first_rows(self) -> list[int]:
        """The index of each segment's first row."""
        return [0, *accumulate(len(segment.wanted) for segment in self.segments)][:-1]

    def outputs(self) -> tuple[list[int], list[SegmentOutput]]:
        """Waits for the choice; returns all the tokens, and the outputs by segment."""
        ids, probs = self.fetched.wait().tolist()
        tokens = [int(token) for token in ids]
        return tokens, outputs_of(self.segments, tokens, probs, self.top)


def choose(
    segments: Sequence[Segment],
    logits: torch.Tensor,
    best: Confidence,
    mask_token_id: int | None,
    eos_token_ids: frozenset[int],
) -> Sampled:
    """Chooses tokens from logits [W, vocab] and best, of the segments' wanted rows in order.

    The logits may be overwritten. The vocabulary ends with the last id that may be sampled.
    """
    tokens, probs = best.tokens, best.probs
    if any(segment.sampling.temperature > 0 and is_plain(segment) for segment in segments):
        tokens = _draw(segments, logits, best, mask_token_id)
        chosen = logits.gather(1, tokens[:, None]).squeeze(1).float()
        probs = torch.exp(chosen - best.log_sums)
    # float64 holds any token id exactly, so ids and probabilities leave the device in one copy.
    packed = torch.stack((tokens.double(), probs.double()))
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
        packed[:, index] = torch.tensor([ids, values], dtype=torch.float64, device=logits.device)
        tokens = packed[0].long()
        top = {special[row]: most_probable for row, most_probable in tops.items()}
    return Sampled(segments, tokens, Fetch(packed), top)


def _draw(
    segments: Sequence[Segment], logits: torch.Tensor, best: Confidence, mask_token_id: int | None
) -> torch.Tensor:
    """The tokens [W] int64: drawn where a plain segment has a temperature, else the argmax."""
    params: list[SamplingParams] = []
    positions: list[int] = []
    temperatures: list[float] = []
    for segment in segments:
        count = len(segment.wanted)
        temperature = bounded_temperature(segment.sampling.temperature) if is_plain(segment) else 0.0
        params.extend([segment.sampling] * count)
        positions.extend(segment.sampled_positions)
        temperatures.extend([temperature] * count)
    numbers = np.stack([temperatures, uniforms([p.seed for p in params], positions)]).astype(np.float32)
    on_device = torch.from_numpy(numbers).to(logits.device)
    return sample_rows(logits, best, on_device[0], on_device[1], mask_token_id)
