"""Noisy blocks of many rows at once, on the device: the objective of replicas.training.objective in tensors.

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
    """full_mask_share: of blocks masked whole; the ratio of the others is uniform in [0.05, 1].

    A masked position weighs 1 / (the block's mask ratio), at most max_weight; past the answer's end, where
    the target is the end of text, tail_weight times that. In a draft the k-th token after the seed weighs
    exp(-(k - 1) / draft_decay), since it counts only where all before it are right. aligned_share: of rows
    whose blocks begin with the answer. distill: the base's own share of the target (loss.py).
    """

    lengths: tuple[int, ...] = (4, 8, 8, 8, 16, 16, 32)
    full_mask_share: float = 0.5
    aligned_share: float = 0.25
    tail_weight: float = 0.1
    max_weight: float = 4.0
    draft_decay: float = 6.0
    distill: float = 0.7


@dataclass(frozen=True)
class NoisyBlocks:
    """The noisy half of a batch, all [rows, noisy] but the mask.

    ids: what the model sees; targets: what it should say; positions: of the clean counterparts;
    weights: of the loss, 0 where nothing is asked; shares: the base's share of the target, 0 where the base
    has none: past the end, and where a token after the position is visible, which the base never sees.
    mask: bool [rows, noisy, clean + noisy].
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor
    weights: Tensor
    shares: Tensor
    mask: Tensor


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
    """ids: int64 [rows, clean], padded at the end; prompt_lens, lengths: int64 [rows], of the prompt and of
    all; ended: bool [rows], whether an end of text is the last token. The seed of a row's first block is no
    token before the answer's first, as when serving. num_noisy: positions of the noisy half.
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
