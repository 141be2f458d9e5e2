"""Samples answers by the base itself, many at a time: a static K/V cache, one token a row and step."""

import torch
from torch import Tensor

from training.smollm2.documents import Documents, Prompts
from training.smollm2.model import AdaptedModel

_CHECK_EVERY = 16
"""Steps between looks at whether all rows have ended; each makes the host wait for the device."""


@torch.no_grad()
def sample(
    model: AdaptedModel,
    prompts: Prompts,
    temperatures: Tensor,
    max_new_tokens: int,
    eos_id: int,
    generator: torch.Generator,
) -> Documents:
    """Samples answers to the prompts, without the adapter; each is cut after max_new_tokens.

    temperatures: float [rows], 0 is greedy

    Rows are as long as the prompts' width and max_new_tokens.
    """
    device = model.embedding.device
    prompt_ids, prompt_lens = prompts.ids.to(device), prompts.lengths.to(device)
    rows, width = prompt_ids.shape
    capacity = width + max_new_tokens
    ids = torch.full((rows, capacity), eos_id, device=device)
    ids[:, :width] = prompt_ids
    row = torch.arange(rows, device=device)

    hidden, prefilled = model.clean(prompt_ids)
    cached = [_grown(keys, values, capacity) for keys, values in prefilled]
    hidden = hidden[row, prompt_lens - 1]
    positions = prompt_lens.clone()
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    lengths = prompt_lens.clone()
    temperatures = temperatures.to(device)
    for step in range(max_new_tokens):
        tokens = torch.where(ended, eos_id, _choose(model.logits(hidden), temperatures, generator))
        ids[row, positions] = tokens
        lengths += ~ended
        ended |= tokens == eos_id
        if step + 1 == max_new_tokens or (step % _CHECK_EVERY == 0 and bool(ended.all())):
            break
        hidden = model.decode(tokens, positions, cached)
        positions += 1
    return Documents(ids, prompt_lens, lengths, ended)


def _grown(keys: Tensor, values: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """A cache of the full capacity that begins with what the prompts left; free places are 0."""
    shape = (*keys.shape[:2], capacity, keys.shape[3])
    grown = keys.new_zeros(shape), values.new_zeros(shape)
    for cache, part in zip(grown, (keys, values), strict=True):
        cache[:, :, : part.shape[2]] = part
    return grown


def _choose(logits: Tensor, temperatures: Tensor, generator: torch.Generator) -> Tensor:
    """A sample of softmax(logits / temperature) a row, as the argmax with Gumbel noise; the argmax at 0."""
    noise = torch.empty_like(logits).exponential_(generator=generator)
    noise = noise.clamp_min_(1e-30).log_().mul_(temperatures[:, None])
    return (logits - noise).argmax(-1)
