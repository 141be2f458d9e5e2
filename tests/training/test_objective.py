"""The joint objective against brute force and by hand."""

import math
import random

import pytest
import torch

from training.batches import DataConfig, encode_chat, make_batch
from training.objective import clean_mask, make_blocks, noisy_mask, weighted_cross_entropy
from training.tasks.family import Chat
from training.tokenizer import ASSISTANT_ID, EOS_ID, MASK_ID, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(num_chats=400, vocab_size=700, seed=0)


@pytest.mark.parametrize("seed", range(30))
def test_masks_equal_brute_force(seed):
    rng = random.Random(seed)
    clean_len, noisy_len = rng.randint(5, 23), rng.randint(4, 19)
    documents = torch.zeros(1, clean_len, dtype=torch.long)
    positions = torch.zeros_like(documents)
    at, lengths = 0, []
    while at < clean_len - 2 and rng.random() < 0.9:
        length = rng.randint(2, clean_len - at)
        documents[0, at : at + length] = len(lengths) + 1
        positions[0, at : at + length] = torch.arange(length)
        lengths.append(length)
        at += length
    noisy = torch.zeros(3, 1, noisy_len, dtype=torch.long)
    at, block = 0, 0
    while lengths and at < noisy_len and rng.random() < 0.9:
        size = min(rng.randint(1, 6), noisy_len - at)
        document = rng.randint(1, len(lengths))
        block += 1
        noisy[0, 0, at : at + size] = document
        noisy[1, 0, at : at + size] = block
        noisy[2, 0, at : at + size] = rng.randrange(lengths[document - 1])
        at += size
    got_clean = clean_mask(documents)[0]
    got_noisy = noisy_mask(documents, positions, *noisy)[0]
    for i in range(clean_len):
        for j in range(clean_len):
            assert got_clean[i, j] == (j <= i and documents[0, i] == documents[0, j])
    for i in range(noisy_len):
        document, block, start = (int(v) for v in noisy[:, 0, i])
        for j in range(clean_len):
            wanted = document != 0 and documents[0, j] == document and positions[0, j] < start
            assert got_noisy[i, j] == wanted
        for j in range(noisy_len):
            assert got_noisy[i, clean_len + j] == (block == noisy[1, 0, j])


@pytest.mark.parametrize("block_length", [4, 8, 16, 32])
def test_blocks(block_length):
    ids = [*range(100, 140), EOS_ID]
    starts = set()
    for seed in range(200):
        blocks = make_blocks(
            ids, 10, block_length, random.Random(seed), mask_id=MASK_ID, eos_id=EOS_ID, max_weight=1e9
        )
        starts.add(blocks[0].start)
        for previous, block in zip([None, *blocks], blocks, strict=False):
            assert previous is None or block.start == previous.start + block_length
            assert len(block.ids) == len(block.targets) == len(block.weights) == block_length
            assert block.ids[0] == block.targets[0] != MASK_ID
            assert block.weights[0] == 0
            num_masked = block.ids.count(MASK_ID)
            assert 1 <= num_masked <= block_length - 1
            for i, (seen, target, weight) in enumerate(
                zip(block.ids, block.targets, block.weights, strict=True), block.start
            ):
                assert target == (ids[i] if i < len(ids) else EOS_ID)
                assert seen in (target, MASK_ID)
                tail = 1.0 if i < len(ids) else 0.1
                wanted = (block_length - 1) / num_masked * tail if seen == MASK_ID else 0.0
                assert weight == pytest.approx(wanted)
    assert starts == set(range(9, 9 + min(block_length, 31)))


def test_weighted_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [5.0, 1.0]])
    loss = weighted_cross_entropy(logits, torch.tensor([0, 1, 0]), torch.tensor([1.0, 2.0, 0.0]))
    assert loss.item() == pytest.approx(math.log(2) + 2 * math.log(4))


def test_batch_is_consistent(tokenizer):
    config = DataConfig(rows=3, clean_len=300, noisy_len=256)
    batch = make_batch(config, tokenizer, seed=1, step=7, joint=True)
    again = make_batch(config, tokenizer, seed=1, step=7, joint=True)
    assert all(torch.equal(a, b) for a, b in zip(vars(batch).values(), vars(again).values(), strict=True)
               if isinstance(a, torch.Tensor))  # fmt: skip
    assert batch.num_tokens > 0.6 * 3 * 300
    clean_ids, noisy_ids = batch.ids[:, :300], batch.ids[:, 300:]
    learned = batch.ar_weights[:, :300] > 0
    following = torch.roll(clean_ids, -1, dims=1)
    assert torch.equal(batch.targets[:, :300][learned], following[learned])
    first = learned & (clean_ids == ASSISTANT_ID)
    assert bool(first.any())
    assert batch.ar_weights[:, :300][first].unique().tolist() == [DataConfig().first_weight]
    assert batch.ar_weights[:, :300][learned & ~first].unique().tolist() == [1.0]
    assert not batch.ar_weights[:, 300:].any()
    assert not batch.noisy_weights[:, :300].any()
    masked = batch.noisy_weights[:, 300:] > 0
    assert masked.any()
    assert bool((noisy_ids[masked] == MASK_ID).all())
    assert not (clean_ids == MASK_ID).any()
    # A noisy token's own clean counterpart is never visible: no answer leaks.
    row, query = masked.nonzero()[0].tolist()
    visible = batch.noisy_mask[row, query, :300]
    assert bool((batch.positions[row, :300][visible] < batch.positions[row, 300 + query]).all())


def test_encoded_chat_ends_with_eos_and_marks_answers(tokenizer):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    document = encode_chat(tokenizer, Chat(chat))
    assert [document.ids[end - 1] for _, end in document.answers] == [EOS_ID, EOS_ID]
    assert [end - start for start, end in document.answers] == [2, 2]
