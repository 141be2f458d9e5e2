"""The joint objective of tri-mode training (arXiv 2607.05722).

One forward goes over [clean | noisy]: AR loss on the clean half, masked-token loss on the noisy one. Clean
tokens attend causally. The noisy half holds blocks of the answer: a block is [seed, then tokens of which
some are masked]; its seed (index 0) is always known, as when serving. A noisy token attends to its whole
block and to the clean tokens of its document before the block's first position. Noisy tokens have the
positions of their clean counterparts, and the logits at position i of the noisy half predict the token AT i
(no shift), those of the clean half the token at i + 1.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class NoisyBlock:
    """One block of the noisy half: tokens start..start+len(ids) of a document (past its end: EOS)."""

    start: int
    ids: list[int]
    """The model's input: tokens, some of them masked."""
    targets: list[int]
    weights: list[float]
    """The weight of the loss at each position: 0 where the token is not masked."""


def make_blocks(
    ids: Sequence[int],
    answer_start: int,
    block_length: int,
    rng: random.Random,
    *,
    mask_id: int,
    eos_id: int,
    full_mask_share: float = 0.4,
    tail_weight: float = 0.1,
    max_weight: float = 4.0,
) -> list[NoisyBlock]:
    """Cuts a document's answer into noisy blocks from a random offset on.

    ids: the document, whose last token is EOS; answer_start: index of the answer's first token. Blocks
    begin no earlier than at the token before the answer. A masked position has weight 1 / mask ratio (at most
    `max_weight`), and `tail_weight` times that past the document's end, where the target is EOS.
    """
    first = answer_start - 1
    if rng.random() < 0.6:
        first += rng.randrange(min(block_length, len(ids) - 1 - first))
    blocks = []
    for start in range(first, len(ids) - 1, block_length):
        targets = [ids[i] if i < len(ids) else eos_id for i in range(start, start + block_length)]
        ratio = 1.0 if rng.random() < full_mask_share else rng.uniform(0.05, 1.0)
        masked = [rng.random() < ratio for _ in range(1, block_length)]
        if not any(masked):
            masked[rng.randrange(block_length - 1)] = True
        weight = min(max_weight, len(masked) / sum(masked))
        seen, weights = [targets[0]], [0.0]
        for offset, is_masked in enumerate(masked, 1):
            seen.append(mask_id if is_masked else targets[offset])
            inside = start + offset < len(ids)
            weights.append((weight if inside else weight * tail_weight) if is_masked else 0.0)
        blocks.append(NoisyBlock(start, seen, targets, weights))
    return blocks


def clean_mask(documents: Tensor) -> Tensor:
    """The mask of the clean half, bool [rows, clean, clean]: causal within a document.

    documents: int64 [rows, clean], 0 is padding

    Padding attends to padding before it, so no row of the mask is empty.
    """
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return (documents[:, :, None] == documents[:, None, :]) & causal


def noisy_mask(
    documents: Tensor, positions: Tensor, noisy_documents: Tensor, noisy_blocks: Tensor, noisy_starts: Tensor
) -> Tensor:
    """The mask of the noisy half, bool [rows, noisy, clean + noisy], True where a noisy token attends.

    documents, positions: int64 [rows, clean], the clean half's
    noisy_documents, noisy_blocks, noisy_starts: int64 [rows, noisy], the document, the block (numbered within
    the row) and the block's first position
    """
    same = noisy_documents[:, :, None] == documents[:, None, :]
    to_clean = same & (positions[:, None, :] < noisy_starts[:, :, None]) & (documents != 0)[:, None, :]
    to_noisy = noisy_blocks[:, :, None] == noisy_blocks[:, None, :]
    return torch.cat((to_clean, to_noisy), dim=2)


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The sum of the weighted cross-entropies.

    logits: [n, vocab]; targets: int64 [n]; weights: float [n]
    """
    return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()
