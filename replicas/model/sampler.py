"""From logits to tokens and their probabilities.

A sampled token depends on the row's logits and parameters, the request's seed and the sampled
position, and on nothing else of the batch: one uniform number a row from a stateless hash of (seed,
position) picks from the cumulative distribution in the order of token ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from replicas.messages import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class SampledRows:
    """The rows that are not greedy, R of W.

    rows: [R] int64; temperature, top_p: [R] float32; top_k: [R] int64, 0 for no limit
    uniforms: [R] float64 in [0, 1)
    """

    rows: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    uniforms: torch.Tensor

    @classmethod
    def build(cls, rows: Sequence[tuple[SamplingParams, int]]) -> "SampledRows | None":
        """rows: parameters and sampled position of each of the W rows; None if all are greedy."""
        picked = [(row, *entry) for row, entry in enumerate(rows) if entry[0].temperature > 0]
        if not picked:
            return None
        params = [entry[1] for entry in picked]
        return cls(
            rows=torch.tensor([entry[0] for entry in picked]),
            temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32),
            top_k=torch.tensor([p.top_k for p in params]),
            top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32),
            uniforms=torch.from_numpy(uniforms([p.seed for p in params], [entry[2] for entry in picked])),
        )


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """[R] float64 in [0, 1), each a function of its seed and position alone (SplitMix64, twice)."""
    seed = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    bits = _mix(_mix(seed) + position * _GOLDEN)
    numbers: np.ndarray = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def _mix(x: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    """SplitMix64's output function (Steele, Lea, Flood 2014), on [R] uint64."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@torch.inference_mode()
def sample(
    logits: torch.Tensor, sampled: SampledRows | None, mask_token_id: int | None
) -> tuple[list[int], list[float]]:
    """logits [W, vocab] -> W token ids and probabilities. Overwrites logits.

    The mask token is never chosen. A probability is that of the chosen token in the softmax of the
    raw logits without the mask token, before temperature and filters.
    """
    logits = logits.float()
    if mask_token_id is not None:
        logits[:, mask_token_id] = float("-inf")
    chosen_logits, tokens = logits.max(-1)
    normalisers = logits.logsumexp(-1)
    if sampled is not None:
        rows = sampled.rows
        picked = _pick(logits[rows], sampled)
        tokens[rows] = picked
        chosen_logits[rows] = logits[rows, picked]
    probs = (chosen_logits - normalisers).exp_()
    # float64 holds any token id exactly, so ids and probabilities leave the device in one copy.
    ids, values = torch.stack((tokens.double(), probs.double())).tolist()
    return [int(token) for token in ids], values


def _pick(logits: torch.Tensor, sampled: SampledRows) -> torch.Tensor:
    """logits [R, vocab] -> [R] token ids."""
    scaled = logits / sampled.temperature[:, None]
    weights = torch.softmax(scaled, -1)
    filtered = ((sampled.top_k > 0) | (sampled.top_p < 1)).nonzero().flatten()
    if len(filtered):
        weights[filtered] = _filter(weights[filtered], sampled.top_k[filtered], sampled.top_p[filtered])
    cumulative = weights.double().cumsum(-1)
    total = cumulative[:, -1:]
    # A target below the total always lands on a token of positive weight.
    target = torch.minimum(sampled.uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).flatten()


def _filter(probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """probs [R, vocab] with the tokens outside top_k, then outside top_p of what is left, set to 0.

    Of equal probabilities the lower token id ranks first. The token that crosses top_p is kept.
    """
    ordered, token_ids = probs.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(probs.shape[1], device=probs.device)
    limit = torch.where(top_k > 0, top_k, probs.shape[1])
    ordered = ordered.double().masked_fill_(ranks >= limit[:, None], 0.0)
    cumulative = ordered.cumsum(-1)
    before = cumulative - ordered
    keep = (ordered > 0) & (before < top_p[:, None] * cumulative[:, -1:])
    keep[:, 0] = True
    return probs * torch.zeros_like(keep).scatter_(1, token_ids, keep)
