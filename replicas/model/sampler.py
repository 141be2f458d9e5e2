"""From logits to tokens and their probabilities.

A sampled token depends on the row's logits and parameters, the request's seed and the sampled
position, and on nothing else of the batch: one uniform number a row from a stateless hash of (seed,
position) picks from the cumulative distribution in the order of token ids.
"""

from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch

from replicas.engine.batch import TokenProb
from replicas.messages import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of logits to choose from.

    position: of the token chosen. prompt_len: of its sequence.
    seen: all tokens before it, where the sampling has penalties; else empty.
    allowed: a mask of what it may be (engine.grammar); None for anything.
    """

    sampling: SamplingParams
    position: int
    prompt_len: int = 0
    seen: tuple[int, ...] = ()
    allowed: bytes | None = None

    @property
    def has_rules(self) -> bool:
        """Its logits are changed before the choice."""
        sampling = self.sampling
        return (
            sampling.has_penalties
            or bool(sampling.logit_bias)
            or self.forbids_end
            or self.allowed is not None
        )

    @property
    def forbids_end(self) -> bool:
        return self.position < self.prompt_len + self.sampling.min_tokens


@dataclass(frozen=True, slots=True)
class SampledRows:
    """The rows that are not greedy, R of W.

    rows: [R] int64; temperature, top_p, min_p: [R] float32; top_k: [R] int64, 0 for no limit
    uniforms: [R] float64 in [0, 1)
    """

    rows: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    uniforms: torch.Tensor

    @classmethod
    def build(cls, rows: Sequence[Row], device: torch.device) -> "SampledRows | None":
        """None if all of the W rows are greedy."""
        picked = [index for index, row in enumerate(rows) if row.sampling.temperature > 0]
        if not picked:
            return None
        params = [rows[index].sampling for index in picked]
        positions = [rows[index].position for index in picked]
        numbers = [(max(p.temperature, 1e-5), p.top_p, p.min_p) for p in params]
        temperature, top_p, min_p = torch.tensor(numbers, dtype=torch.float32, device=device).unbind(1)
        return cls(
            rows=torch.tensor(picked, device=device),
            temperature=temperature,
            top_k=torch.tensor([p.top_k for p in params], device=device),
            top_p=top_p,
            min_p=min_p,
            uniforms=torch.from_numpy(uniforms([p.seed for p in params], positions)).to(device),
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


Choose = Callable[[torch.Tensor, int | None], tuple[torch.Tensor, torch.Tensor]]


def choose(logits: torch.Tensor, forbidden: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [W, vocab] float32 -> argmax [W] int64 and logsumexp [W]; the forbidden token's becomes -inf."""
    if forbidden is not None:
        logits[:, forbidden] = float("-inf")
    return logits.argmax(-1), logits.logsumexp(-1)


@torch.inference_mode()
def sample(
    logits: torch.Tensor,
    rows: Sequence[Row],
    mask_token_id: int | None,
    eos_token_ids: Set[int] = frozenset(),
    choose: Choose = choose,
) -> tuple[list[int], list[float], dict[int, tuple[TokenProb, ...]]]:
    """logits [W, vocab] -> W token ids, W probabilities, and by row the most probable tokens asked for.

    The mask token is never chosen. Probabilities are those of the softmax of the raw logits without
    the mask token: before penalties, bias, grammar, temperature and filters. Overwrites logits.
    """
    logits = logits.float()
    tokens, normalisers = choose(logits, mask_token_id)
    ruled = [index for index, row in enumerate(rows) if row.has_rules]
    choices = logits
    if ruled:
        choices = _ruled(logits, rows, ruled, eos_token_ids)
        tokens[ruled] = choices[ruled].argmax(-1)
    sampled = SampledRows.build(rows, logits.device)
    if sampled is not None:
        tokens[sampled.rows] = _pick(choices[sampled.rows], sampled)
    chosen = logits.gather(1, tokens[:, None]).squeeze(1)
    probs = (chosen - normalisers).exp_()
    # float64 holds any token id exactly, so ids and probabilities leave the device in one copy.
    ids, values = torch.stack((tokens.double(), probs.double())).tolist()
    return [int(token) for token in ids], values, _most_probable(logits, normalisers, rows)


def _ruled(
    logits: torch.Tensor, rows: Sequence[Row], ruled: Sequence[int], eos_token_ids: Set[int]
) -> torch.Tensor:
    """A copy of logits with the ruled rows' penalties, bias, min_tokens and masks applied, in this order."""
    changed = logits.clone()
    for index in ruled:
        row, line = rows[index], changed[index]
        sampling = row.sampling
        if sampling.repetition_penalty != 1.0 and row.seen:
            ids = torch.tensor(sorted(set(row.seen)), device=line.device)
            values = line[ids]
            line[ids] = torch.where(
                values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty
            )
        counts = Counter(row.seen[row.prompt_len :])
        if counts:
            amounts = torch.tensor(list(counts.values()), dtype=line.dtype, device=line.device)
            penalty = sampling.presence_penalty + sampling.frequency_penalty * amounts
            line[torch.tensor(list(counts), device=line.device)] -= penalty
        for token, bias in sampling.logit_bias:
            line[token] += bias
        if row.forbids_end:
            line[list(eos_token_ids)] = float("-inf")
        if row.allowed is not None:
            line[_forbidden(row.allowed, len(line))] = float("-inf")
    return changed


def _forbidden(allowed: bytes, vocab_size: int) -> torch.Tensor:
    """[vocab] bool, of a mask of what is allowed."""
    bits = np.unpackbits(np.frombuffer(allowed, np.uint8), count=vocab_size, bitorder="little")
    return torch.from_numpy(bits == 0)


def _most_probable(
    logits: torch.Tensor, normalisers: torch.Tensor, rows: Sequence[Row]
) -> dict[int, tuple[TokenProb, ...]]:
    """By row, for those that ask for log-probabilities: as many as each asks for, most probable first."""
    asking = [index for index, row in enumerate(rows) if row.sampling.logprobs is not None]
    if not asking:
        return {}
    most = max(rows[index].sampling.logprobs or 0 for index in asking)
    values, ids = (logits[asking] - normalisers[asking, None]).topk(min(most, logits.shape[1]))
    found = {}
    for index, row_ids, row_values in zip(asking, ids.tolist(), values.tolist(), strict=True):
        count = rows[index].sampling.logprobs or 0
        found[index] = tuple(zip(row_ids, row_values, strict=True))[:count]
    return found


def _pick(logits: torch.Tensor, sampled: SampledRows) -> torch.Tensor:
    """logits [R, vocab] -> [R] token ids."""
    scaled = logits / sampled.temperature[:, None]
    weights = torch.softmax(scaled, -1)
    if bool((sampled.min_p > 0).any()):
        weights.masked_fill_(weights < sampled.min_p[:, None] * weights.amax(-1, keepdim=True), 0.0)
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
