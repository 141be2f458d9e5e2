"""A byte tokenizer that fits the scripted model: ids 0 to 2 are special, every other is one byte."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from replicas.text import TextCodec

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant', 'system') %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "[assistant]"
)


def tiny_tokenizer(chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<mask>": 1, "<eos>": 2} | {char: 3 + k for k, char in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", mask_token="<mask>", eos_token="<eos>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def byte_codec(chat_template: str | None = TEMPLATE) -> TextCodec:
    return TextCodec(tiny_tokenizer(chat_template))
