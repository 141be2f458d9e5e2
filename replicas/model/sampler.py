"""Chooses tokens from logits, with their probabilities.

A sampled token depends on the row's logits and parameters, the request's seed and the sampled position, and
on nothing else of the batch: one uniform number a row from a stateless hash of (seed, position) picks from
the cumulative distribution in the order of token ids.
"""

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch

from replicas.engine.batch import TokenProb
from replicas.messages import SamplingParams
from replicas.model.logit_rules import Row, apply_rules, runs_of
from replicas.model.penalties import Penalise, penalise

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-5, 1e30
"""The bounds of any temperature above 0, so that all of float32's arithmetic with it is finite."""
_MAX_TOP_K = 2**31 - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a request asks of a draw, brought into range."""

    temperature: float
    """0 for the most probable token."""
    top_k: int
    """0 for no limit."""
    top_p: float
    min_p: float

    @classmethod
    def of(cls, sampling: SamplingParams) -> "Parameters":
        return cls(
            temperature=bounded_temperature(sampling.temperature),
            top_k=min(max(sampling.top_k, 0), _MAX_TOP_K),
            top_p=_share(sampling.top_p, 1.0),
            min_p=_share(sampling.min_p, 0.0),
        )


@dataclass(frozen=True, slots=True)
class SampledRows:
    """The rows that are not greedy, R of W."""

    rows: torch.Tensor
    """[R] int64"""
    temperature: torch.Tensor
    """[R] float32"""
    top_k: torch.Tensor
    """[R] int64, 0 for no limit"""
    top_p: torch.Tensor
    """[R] float32"""
    min_p: torch.Tensor
    """[R] float32"""
    uniforms: torch.Tensor
    """[R] float64 in [0, 1)"""

    @classmethod
    def build(cls, rows: Sequence[Row], device: torch.device) -> "SampledRows | None":
        """Picks the rows that are not greedy; None if all of the W are. Parameters are brought into range."""
        picked = [index for index, row in enumerate(rows) if row.sampling.temperature > 0]
        if not picked:
            return None
        params = [Parameters.of(rows[index].sampling) for index in picked]
        seeds = [rows[index].sampling.seed for index in picked]
        positions = [rows[index].position for index in picked]
        numbers = [(each.temperature, each.top_p, each.min_p) for each in params]
        temperature, top_p, min_p = torch.tensor(numbers, dtype=torch.float32, device=device).unbind(1)
        return cls(
            rows=torch.tensor(picked, device=device),
            temperature=temperature,
            top_k=torch.tensor([each.top_k for each in params], device=device),
            top_p=top_p,
            min_p=min_p,
            uniforms=torch.from_numpy(uniforms(seeds, positions)).to(device),
        )


def bounded_temperature(temperature: float) -> float:
    """The temperature within the bounds; 0 for a greedy choice."""
    return min(max(temperature, MIN_TEMPERATURE), MAX_TEMPERATURE) if temperature > 0 else 0.0


def _share(number: float, neutral: float) -> float:
    """The number brought into [0, 1]; the neutral one for NaN."""
    return neutral if math.isnan(number) else min(max(number, 0.0), 1.0)


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """Random numbers [R] float64 in [0, 1), each a function of its seed and position alone (SplitMix64,
    twice)."""
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


Choose = Callable[[torch.Tensor, int | None], tuple[torch.Tensor, torch.Tensor]]


def choose(logits: torch.Tensor, forbidden: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [W, vocab] float32 -> argmax [W] int64 and logsumexp [W]; the forbidden token's becomes -inf.

    Of equal logits the lowest id is chosen. A row with a NaN or +inf, or of nothing but -inf, has a logsumexp
    that is not finite.
    """
    if forbidden is not None:
        logits[:, forbidden] = float("-inf")
    return _argmax(logits), logits.logsumexp(-1)


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """The argmax [W] int64, of equal logits the lowest id; in a row with a NaN that of a NaN."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))  # a tenth of the time of torch's
    return logits.argmax(-1)


Sampled = tuple[list[int], list[float], dict[int, tuple[TokenProb, ...]]]
"""Token ids, probabilities, and by row the most probable tokens."""


@torch.inference_mode()
def sample(
    logits: torch.Tensor,
    rows: Sequence[Row],
    mask_token_id: int | None,
    eos_token_ids: Set[int] = frozenset(),
    choose: Choose = choose,
    penalise: Penalise = penalise,
) -> Sampled:
    """logits [W, vocab] -> W token ids, W probabilities, and by row the most probable tokens asked for.

    The mask token is never chosen. Probabilities are those of the softmax of the raw logits without it:
    before penalties, bias, grammar, temperature and filters. A row whose logits are not finite, be it by its
    own parameters, or all impossible, has no token: its probability is NaN and its id means nothing; other
    rows are as without it. Overwrites logits.
    """
    logits = logits.float()
    tokens, normalisers = choose(logits, mask_token_id)
    most_probable = _most_probable(logits, normalisers, rows)
    ruled = [index for index, row in enumerate(rows) if row.has_rules]
    overwritten = apply_rules(logits, rows, ruled, eos_token_ids, penalise) if ruled else []
    greedy = [index for index in ruled if not rows[index].sampling.temperature > 0]
    if greedy:
        changed = lines_of(logits, greedy)
        found = _argmax(changed)
        at = torch.tensor(greedy, device=logits.device)
        tokens[at] = found
        normalisers[at] = _nan_unless_finite(normalisers[at], changed.gather(1, found[:, None]))
    sampled = SampledRows.build(rows, logits.device)
    if sampled is not None:
        tokens[sampled.rows], largest = _pick(lines_of(logits, sampled.rows.tolist()), sampled)
        normalisers[sampled.rows] = _nan_unless_finite(normalisers[sampled.rows], largest)
    for part in overwritten:
        part.restore(tokens)
    logs = logits.gather(1, tokens[:, None]).squeeze(1) - normalisers
    if logits.device.type == "cpu":
        return tokens.tolist(), probabilities(logs.tolist()), most_probable
    probs = logs.double().exp_()
    # float64 holds any token id exactly, so ids and probabilities leave the device in one copy.
    ids, values = torch.stack((tokens.double(), probs)).tolist()
    return [int(token) for token in ids], values, most_probable


def probabilities(logs: Sequence[float]) -> list[float]:
    """The probabilities of logarithms that are at most 0, or NaN.

    In float64, as improbable tokens have a probability too, and its logarithm is the one listed.
    """
    return list(map(math.exp, logs))


def _nan_unless_finite(normalisers: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """The normalisers [R], NaN where the largest logit that rules left, [R, 1], is not finite: there is no
    probability."""
    return normalisers.masked_fill(~largest.squeeze(1).isfinite(), math.nan)


def lines_of(logits: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
    """The rows at ascending indices: a view where they are neighbours, else a copy."""
    runs = runs_of(indices)
    return logits[runs[0]] if len(runs) == 1 else torch.cat([logits[run] for run in runs])


def _most_probable(
    logits: torch.Tensor, normalisers: torch.Tensor, rows: Sequence[Row]
) -> dict[int, tuple[TokenProb, ...]]:
    """The most probable tokens of each row that asks for log-probabilities, as many as it asks for.

    The most probable first, and of equal logits the lowest id, so that the first is the argmax.
    """
    asking = [index for index, row in enumerate(rows) if row.sampling.logprobs is not None]
    if not asking:
        return {}
    lines = lines_of(logits, asking)
    num_ranked = min(max(rows[index].sampling.logprobs or 0 for index in asking), logits.shape[1])
    # One more than asked for shows whether others equal the last, of which topk may have taken any.
    values, ids = lines.topk(min(num_ranked + 1, logits.shape[1]))
    logprobs = (values - normalisers[asking, None]).tolist()
    found = {}
    for line, index, row_ids, row_values, row_logprobs in zip(
        lines, asking, ids.tolist(), values.tolist(), logprobs, strict=True
    ):
        ranked = sorted(
            zip(row_values, row_ids, row_logprobs, strict=True), key=lambda item: (-item[0], item[1])
        )
        if 0 < num_ranked < len(ranked) and ranked[num_ranked][0] == ranked[num_ranked - 1][0]:
            equal = (line == ranked[num_ranked][0]).nonzero().flatten()[:num_ranked].tolist()
            greater = [item for item in ranked if item[0] > ranked[num_ranked][0]]
            ranked = greater + [(ranked[num_ranked][0], token, ranked[num_ranked][2]) for token in equal]
        count = rows[index].sampling.logprobs or 0
        found[index] = tuple((token, logprob) for _, token, logprob in ranked[: min(count, num_ranked)])
    return found


def _pick(logits: torch.Tensor, sampled: SampledRows) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [R, vocab] -> [R] token ids, and the largest logits [R, 1]; the id of no finite one is void."""
    largest = logits.amax(-1, keepdim=True)
    # Of the differences, not the logits: those can't overflow, however low the temperature.
    weights = (logits - largest).div_(sampled.temperature[:, None]).exp_()
    if bool((sampled.min_p > 0).any()):
        weights.masked_fill_(weights < sampled.min_p[:, None], 0.0)
    filtered = ((sampled.top_k > 0) | (sampled.top_p < 1)).nonzero().flatten()
    if len(filtered):
        keep = _filter(logits[filtered], weights[filtered], sampled.top_k[filtered], sampled.top_p[filtered])
        weights[filtered] *= keep
    cumulative = weights.double().cumsum(-1)
    total = cumulative[:, -1:]
    # A target below the total always lands on a token of positive weight.
    target = torch.minimum(sampled.uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, target, right=True).flatten()
    return tokens.clamp_(max=logits.shape[1] - 1), largest


def _filter(
    logits: torch.Tensor, weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """The tokens kept, [R, vocab] bool: those within top_k, and within top_p of what that leaves of the
    weights.

    Of equal logits the lower token id ranks first. The token that crosses top_p is kept.
    """
    token_ids = logits.argsort(dim=-1, descending=True, stable=True)
    ordered = weights.gather(1, token_ids).double()
    ranks = torch.arange(weights.shape[1], device=weights.device)
    limit = torch.where(top_k > 0, top_k, weights.shape[1])
    ordered.masked_fill_(ranks >= limit[:, None], 0.0)
    cumulative = ordered.cumsum(-1)
    before = cumulative - ordered
    keep = (ordered > 0) & (before < top_p[:, None] * cumulative[:, -1:])
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter_(1, token_ids, keep)
