"""The tokenizer: byte-level BPE trained on the generated chats, built so that copying is token-identical.

Pre-tokens: a lower-case word with the space before it, an all-capitals word likewise, a capitalised word
WITHOUT a space, one digit, or a run of anything else (spaces, punctuation, line ends), which leaves the last
space to a lower-case word that follows. So `Alice` is the same token after a space, a quote, a comma or a
line start, and so is every digit. Byte-level underneath, so any UTF-8 text round-trips.
"""

import random
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from training.tasks.family import Chat
from training.tasks.registry import SYSTEM_MESSAGES, train_chat

PAD, BOS, EOS, MASK = "<|pad|>", "<|bos|>", "<|eos|>", "<|mask|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, MASK, SYSTEM, USER, ASSISTANT)
PAD_ID, BOS_ID, EOS_ID, MASK_ID, SYSTEM_ID, USER_ID, ASSISTANT_ID = range(len(SPECIAL_TOKENS))

PRE_TOKEN = r" ?[a-z]+| ?[A-Z][A-Z]+(?![a-z])|[A-Z][a-z]*|[0-9]|[^A-Za-z0-9]+(?![a-z])|[^A-Za-z0-9]+"

CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text()


def train_tokenizer(num_chats: int, vocab_size: int, seed: int) -> Tokenizer:
    """BPE of at most `vocab_size` tokens, trained on `num_chats` generated training chats."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=max(2, num_chats // 2000),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(f"tokenizer/{seed}")
    texts = list(SYSTEM_MESSAGES) * max(1, num_chats // 200)
    for _ in range(num_chats):
        chat = train_chat(rng, shares={}, two_turn_share=0.0, system_share=0.0, talk_share=0.05)
        texts.extend(message["content"] for message in chat.messages)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wrap(tokenizer: Tokenizer, max_len: int) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers has it, with special tokens and chat template."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        mask_token=MASK,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=max_len,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def render(chat: Chat) -> str:
    """The chat as the chat template writes it, control tokens by their names."""
    tools: list[Any] | None = chat.tools or None
    rendered = render_jinja_template(
        [chat.messages], tools=tools, chat_template=CHAT_TEMPLATE, bos_token=BOS, eos_token=EOS
    )
    return str(rendered[0][0])


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a `tokenizer.json`."""
    return Tokenizer.from_file(str(path))
