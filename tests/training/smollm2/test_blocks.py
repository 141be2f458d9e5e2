"""Blocks drawn on the device, position by position against what their definition says."""

import math

import torch

from training.smollm2.blocks import BlockConfig, NoisyBlocks, draw_blocks

MASK, EOS, CLEAN, NOISY, ROWS = 5, 2, 40, 24, 160
CONFIG = BlockConfig(lengths=(2, 4, 7), full_mask_share=0.4, aligned_share=0.3, distill=0.6)


def documents() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    prompt_lens = torch.randint(1, 12, (ROWS,), generator=generator)
    lengths = prompt_lens + torch.randint(1, 28, (ROWS,), generator=generator)
    ended = torch.rand(ROWS, generator=generator) < 0.7
    ids = torch.randint(6, 90, (ROWS, CLEAN), generator=generator)
    for row in range(ROWS):
        ids[row, lengths[row] :] = EOS
        if ended[row]:
            ids[row, lengths[row] - 1] = EOS
    return ids, prompt_lens, lengths, ended


def draw(seed: int = 0) -> NoisyBlocks:
    generator = torch.Generator().manual_seed(seed)
    return draw_blocks(*documents(), CONFIG, generator, num_noisy=NOISY, mask_id=MASK, eos_id=EOS)


def runs(visible: torch.Tensor) -> list[tuple[int, int]]:
    """The blocks of a row, as the mask's noisy part shows them."""
    found, at = [], 0
    while at < NOISY:
        size = int(visible[at].sum())
        found.append((at, at + size))
        at += size
    return found


def test_every_position() -> None:
    ids, prompt_lens, lengths, ended = documents()
    blocks = draw()
    seen_lengths, offsets, full = set(), set(), []
    for row in range(ROWS):
        first = int(blocks.positions[row, 0])
        offsets.add(first - int(prompt_lens[row]))
        spans = runs(blocks.mask[row, :, CLEAN:])
        size = spans[0][1]
        seen_lengths.add(size)
        assert size in CONFIG.lengths
        assert 0 <= first - int(prompt_lens[row]) < size
        for begin, end in spans:
            assert end - begin == size or end == NOISY
            start = first + begin
            masked = [int(blocks.ids[row, i]) == MASK for i in range(begin, end)]
            assert not masked[0], "the seed is known"
            if end - begin == size:
                assert any(masked)
                full.append(all(masked[1:]))
            for i in range(begin, end):
                position = first + i
                inside = position < int(lengths[row])
                assert int(blocks.positions[row, i]) == position
                assert int(blocks.targets[row, i]) == (int(ids[row, position]) if inside else EOS)
                assert int(blocks.ids[row, i]) in (MASK, int(blocks.targets[row, i]))
                visible = blocks.mask[row, i]
                assert visible[:CLEAN].tolist() == [key < start for key in range(CLEAN)]
                assert visible[CLEAN:].tolist() == [begin <= key < end for key in range(NOISY)]
                weight = 0.0
                if masked[i - begin] and start < int(lengths[row]) - 1:
                    weight = min(CONFIG.max_weight, (size - 1) / sum(masked))
                    if sum(masked) == size - 1:
                        weight = math.exp(-(i - begin - 1) / CONFIG.draft_decay)
                    if not inside:
                        weight *= CONFIG.tail_weight if ended[row] else 0.0
                assert abs(float(blocks.weights[row, i]) - weight) < 1e-5
                nothing_after = all(masked[i - begin + 1 :])
                share = CONFIG.distill if inside and nothing_after else 0.0
                assert abs(float(blocks.shares[row, i]) - share) < 1e-6
    assert seen_lengths == set(CONFIG.lengths)
    assert offsets == set(range(max(CONFIG.lengths)))
    assert 0.4 < sum(full) / len(full) < 0.9


def test_a_function_of_the_seed() -> None:
    first, again, other = draw(), draw(), draw(seed=1)
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, other.ids)
