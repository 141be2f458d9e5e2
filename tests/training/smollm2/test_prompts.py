"""Prompts: varied, never near a held-out one, and with passages that read as text."""

import random
import re
from itertools import cycle, islice

import pytest

from tests.replicas.codec import byte_codec
from training.smollm2.documents import Prompts
from training.smollm2.prompts import (
    LICENCES,
    Drawer,
    encode,
    held_out_prompts,
    passages,
    shingles,
    train_chats,
)

PASSAGE = "This is a passage of some length that stands for a paragraph of a docstring, in plain English."


def test_held_out_prompts() -> None:
    prompts = held_out_prompts()
    assert len(set(prompts)) == len(prompts) == 64
    assert all(prompt and prompt == prompt.strip() for prompt in prompts)


def test_training_prompts_are_different_and_far_from_held_out_ones() -> None:
    chats = list(train_chats(3000, [PASSAGE], seed=0))
    assert len({tuple(m["content"] for m in chat) for chat in chats}) == 3000
    kept_out = set().union(*map(shingles, held_out_prompts()))
    for chat in chats:
        assert chat[-1]["role"] == "user"
        assert not shingles(chat[-1]["content"]) & kept_out
        assert not re.search(r"[{}|]", "".join(m["content"] for m in chat)), "a slot was left open"
    assert sum(PASSAGE in chat[-1]["content"] for chat in chats) > 10
    assert 0.05 < sum(len(chat) == 2 for chat in chats) / 3000 < 0.25
    assert list(islice(train_chats(3000, [PASSAGE], seed=0), 50)) == chats[:50]
    assert list(islice(train_chats(3000, [PASSAGE], seed=1), 50)) != chats[:50]


def test_a_near_copy_of_a_held_out_prompt_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    near = f"Please: {held_out_prompts()[0].lower()} thank you"
    other = "Another prompt altogether."
    drawn = cycle([near, other])
    monkeypatch.setattr(Drawer, "draw", lambda self, rng: ({"role": "user", "content": next(drawn)},))
    assert [chat[0]["content"] for chat in train_chats(1, [], seed=0)] == [other]
    with pytest.raises(ValueError, match="ask for fewer"):
        list(train_chats(2, [], seed=0))


def test_passages_are_plain_paragraphs() -> None:
    found = passages("httpx", random.Random(0))
    assert len(found) > 20
    for text in found:
        assert 20 <= len(text.split()) <= 80
        assert text[0].isupper()
        assert text.endswith(".")
    assert passages("httpx", random.Random(0)) == found
    assert passages("no-such-package", random.Random(0)) == []
    assert "httpx" in LICENCES


def test_long_prompts_are_left_out_and_files_keep_the_rest(tmp_path) -> None:
    chats = [({"role": "user", "content": "a" * length},) for length in (3, 500, 9)]
    ids = encode(byte_codec(), chats, max_len=100)
    assert len(ids) == 2
    Prompts.save(tmp_path / "prompts", {"train": Prompts.of(ids, 0, 100), "other": Prompts.of(ids[:1], 0)})
    loaded = Prompts.load(tmp_path / "prompts", "train")
    assert loaded.ids.shape == (2, 100)
    for row, wanted in enumerate(ids):
        assert loaded.ids[row, : loaded.lengths[row]].tolist() == wanted
        assert not loaded.ids[row, loaded.lengths[row] :].any()
    assert len(Prompts.load(tmp_path / "prompts", "other")) == 1
