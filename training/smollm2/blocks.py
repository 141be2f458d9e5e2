"""Noisy blocks of many rows at once, on the device: the objective of training.objective in tensors.

A row is a prompt and its answer. Its noisy half cuts the answer into blocks of one length from a random
offset on. A block's first token, the seed, is always known; of the others some are masked, in a share of the
blocks all, which is a draft. A noisy token attends to the clean tokens before its block and to the whole
block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockConfig:
    """The ways in which blocks are drawn, masked and weighted."""

    lengths: tuple[int, ...] = (4, 8, 8, 8, 16, 16, 32)
    """The block lengths in tokens, of which each row draws one."""
    full_mask_share: float = 0.5
    """The share of blocks masked whole; the others' mask ratio is uniform in [0.05, 1]."""
    aligned_share: float = 0.25
    """The share of rows whose blocks begin with the answer."""
    tail_weight: float = 0.1
    """The factor on the weight of a position past the answer's end, where the target is the end of text."""
    max_weight: float = 4.0
    """A masked position weighs 1 / (the block's mask ratio), at most this."""
    draft_decay: float = 6.0
    """In a draft the k-th token after the seed weighs exp(-(k - 1) / draft_decay), since it counts only where
    all before it are right."""
    distill: float = 0.7
    """The base's own share of the target (loss.py)."""


@dataclass(frozen=True)
class NoisyBlocks:
    """The noisy half of a batch, all [rows, noisy] but the mask."""

    ids: Tensor
    """The model's input, int64."""
    targets: Tensor
    """The tokens that it should say, int64."""
    positions: Tensor
    """The positions of the clean counterparts, int64."""
    weights: Tensor
    """The weight of the loss; 0 where nothing is asked."""
    shares: Tensor
    """The base's share of the target. It is 0 past the end, and where a token after the position is visible,
    which the base never sees."""
    mask: Tensor
    """bool [rows, noisy, clean + noisy], True where a noisy token attends."""


def draw_blocks(
    ids: Tensor,
    prompt_lens: Tensor,
    lengths: Tensor,
    ended: Tensor,
    config: BlockConfig,
    generator: torch.Generator,
    *,
    num_noisy: int,
    mask_id: int,
    eos_id: int,
) -> NoisyBlocks:
    """Draws the noisy half; a row's first seed is the answer's first token or a later one, as when serving.

    ids: int64 [rows, clean], padded at the end
    prompt_lens, lengths: int64 [rows], the prompt's and the whole row's
    ended: bool [rows], True if an end of text is the last token
    num_noisy: positions of the noisy half
    """
    device, rows = ids.device, len(ids)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    choices = torch.tensor(config.lengths, device=device)
    block_lens = choices[(uniform(rows) * len(choices)).long()]
    offsets = (uniform(rows) * block_lens).long() * (uniform(rows) >= config.aligned_share)
    index = torch.arange(num_noisy, device=device).expand(rows, -1)
    number = index // block_lens[:, None]
    within = index % block_lens[:, None]
    positions = (prompt_lens + offsets)[:, None] + index
    starts = positions - within
    targets = ids.gather(1, positions.clamp(max=ids.shape[1] - 1))
    inside = positions < lengths[:, None]
    targets = torch.where(inside, targets, eos_id)

    num_blocks = num_noisy // min(config.lengths) + 1
    full = uniform(rows, num_blocks) < config.full_mask_share
    ratios = torch.where(full, 1.0, 0.05 + 0.95 * uniform(rows, num_blocks))
    chosen = 1 + (uniform(rows, num_blocks) * (block_lens[:, None] - 1)).long()
    masked = (uniform(rows, num_noisy) < ratios.gather(1, number)) | (within == chosen.gather(1, number))
    masked &= within > 0

    counts = torch.zeros(rows, num_blocks, device=device).scatter_add(1, number, masked.float())
    weights = ((block_lens - 1)[:, None] / counts.gather(1, number)).clamp(max=config.max_weight)
    is_draft = counts.gather(1, number) == (block_lens - 1)[:, None]
    weights = torch.where(is_draft, (-(within - 1) / config.draft_decay).exp(), weights)
    tail = torch.where(ended, config.tail_weight, 0.0)[:, None]
    asked = masked & (starts < lengths[:, None] - 1)
    weights = torch.where(asked, weights * torch.where(inside, 1.0, tail), 0.0)

    seen = (~masked).float()
    total = torch.zeros(rows, num_blocks, device=device).scatter_add(1, number, seen)
    before = total.cumsum(1).gather(1, number)  # seen up to the end of the own block
    nothing_after = before == seen.cumsum(1)
    shares = torch.where(inside & nothing_after, config.distill, 0.0)

    to_clean = torch.arange(ids.shape[1], device=device) < starts[:, :, None]
    to_noisy = number[:, :, None] == number[:, None, :]
    return NoisyBlocks(
        ids=torch.where(masked, mask_id, targets),
        targets=targets,
        positions=positions,
        weights=weights,
        shares=shares,
        mask=torch.cat((to_clean, to_noisy), dim=2),
    )
