"""Training batches: documents drawn from the task families, packed into rows of fixed length.

A batch is a pure function of (seed, step), so training resumes exactly.
"""

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.objective import NoisyBlock, clean_mask, make_blocks, noisy_mask
from training.tasks.family import Chat
from training.tasks.registry import train_chat
from training.tokenizer import ASSISTANT_ID, EOS_ID, MASK_ID, render


@dataclass(frozen=True)
class DataConfig:
    """The make-up of a batch; lengths in tokens."""

    rows: int = 12
    clean_len: int = 256
    noisy_len: int = 208
    block_lengths: tuple[int, ...] = (4, 8, 8, 16, 16, 32, 32, 32)
    two_turn_share: float = 0.03
    system_share: float = 0.05
    talk_share: float = 0.01
    drill_share: float = 0.1
    tool_share: float = 0.35
    first_weight: float = 8.0
    """The weight in the AR loss of an answer's first token, which decides between text and a call."""
    shares: tuple[tuple[str, float], ...] = (
        ("add", 2.0),
        ("json", 1.5),
        ("relist", 1.5),
        ("sort", 3.0),
        ("units", 1.5),
        ("tool_call", 2.5),
        ("tool_calls", 1.5),
        ("tool_none", 2.5),
        ("tool_result", 1.5),
    )


@dataclass(frozen=True)
class Document:
    """A tokenised chat."""

    ids: list[int]
    answers: list[tuple[int, int]]
    """The (start, end) token spans to learn, their EOS included."""


@dataclass(frozen=True)
class Batch:
    """Inputs and targets of one step; noisy fields are None in AR-only training."""

    ids: Tensor
    """int64 [rows, clean (+ noisy)]"""
    positions: Tensor
    """int64 [rows, clean (+ noisy)]"""
    clean_mask: Tensor
    """bool [rows, clean, clean]"""
    noisy_mask: Tensor | None
    """bool [rows, noisy, clean + noisy]"""
    targets: Tensor
    """int64 [rows, clean (+ noisy)]"""
    ar_weights: Tensor
    """float32 [rows, clean (+ noisy)], 0 in the noisy half."""
    noisy_weights: Tensor
    """float32 [rows, clean (+ noisy)], 0 in the clean half."""
    num_tokens: int
    """Clean tokens that are not padding."""

    def to(self, device: torch.device) -> "Batch":
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def encode_chat(tokenizer: Tokenizer, chat: Chat) -> Document:
    """Tokenises the chat, which the chat template renders."""
    ids = tokenizer.encode(render(chat), add_special_tokens=False).ids
    answers = [
        (place + 1, ids.index(EOS_ID, place) + 1)
        for place, token_id in enumerate(ids)
        if token_id == ASSISTANT_ID
    ]
    return Document(ids, answers)


def _draw_documents(config: DataConfig, tokenizer: Tokenizer, rng: random.Random) -> list[Document]:
    documents: list[Document] = []
    room = config.rows * config.clean_len
    shares = dict(config.shares)
    while room > 0:
        chat = train_chat(
            rng,
            shares,
            config.two_turn_share,
            config.system_share,
            config.talk_share,
            config.drill_share,
            config.tool_share,
        )
        document = encode_chat(tokenizer, chat)
        if len(document.ids) <= config.clean_len:
            documents.append(document)
            room -= len(document.ids)
    return documents


def _pack(config: DataConfig, documents: list[Document]) -> list[list[Document]]:
    """Packs the documents first fit, longest first; what doesn't fit is left out."""
    rows: list[list[Document]] = [[] for _ in range(config.rows)]
    room = [config.clean_len] * config.rows
    for document in sorted(documents, key=lambda d: -len(d.ids)):
        for row in range(config.rows):
            if len(document.ids) <= room[row]:
                rows[row].append(document)
                room[row] -= len(document.ids)
                break
    return rows


def _blocks(config: DataConfig, document: Document, rng: random.Random) -> list[NoisyBlock]:
    """Noisy blocks of the document's last answer."""
    start, end = document.answers[-1]
    return make_blocks(
        document.ids[:end], start, rng.choice(config.block_lengths), rng, mask_id=MASK_ID, eos_id=EOS_ID
    )


def make_batch(config: DataConfig, tokenizer: Tokenizer, seed: int, step: int, joint: bool) -> Batch:
    """The batch of a step; with the noisy half if `joint`, else AR only."""
    rng = random.Random(f"{seed}/{step}")
    rows = _pack(config, _draw_documents(config, tokenizer, rng))
    shape = (config.rows, config.clean_len + (config.noisy_len if joint else 0))
    ids, positions, targets = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    ar_weights, noisy_weights = torch.zeros(shape), torch.zeros(shape)
    documents = torch.zeros(config.rows, config.clean_len, dtype=torch.int64)
    noisy = torch.zeros(3, config.rows, config.noisy_len, dtype=torch.int64)  # document, block, start
    num_tokens = 0
    for row, packed in enumerate(rows):
        clean_at, noisy_at, num_blocks = 0, config.clean_len, 0
        for number, document in enumerate(packed, 1):
            length = len(document.ids)
            span = slice(clean_at, clean_at + length)
            ids[row, span] = torch.tensor(document.ids)
            positions[row, span] = torch.arange(length)
            documents[row, span] = number
            targets[row, clean_at : clean_at + length - 1] = torch.tensor(document.ids[1:])
            for start, end in document.answers:
                ar_weights[row, clean_at + start - 1 : clean_at + end - 1] = 1.0
                ar_weights[row, clean_at + start - 1] = config.first_weight
            clean_at += length
            num_tokens += length
            for block in _blocks(config, document, rng) if joint else ():
                size = len(block.ids)
                if noisy_at + size > shape[1]:
                    break
                num_blocks += 1
                span = slice(noisy_at, noisy_at + size)
                ids[row, span] = torch.tensor(block.ids)
                positions[row, span] = torch.arange(block.start, block.start + size)
                targets[row, span] = torch.tensor(block.targets)
                noisy_weights[row, span] = torch.tensor(block.weights)
                inner = slice(noisy_at - config.clean_len, noisy_at - config.clean_len + size)
                noisy[0, row, inner] = number
                noisy[1, row, inner] = num_blocks
                noisy[2, row, inner] = block.start
                noisy_at += size
    mask = None
    if joint:
        mask = noisy_mask(documents, positions[:, : config.clean_len], noisy[0], noisy[1], noisy[2])
    return Batch(ids, positions, clean_mask(documents), mask, targets, ar_weights, noisy_weights, num_tokens)
