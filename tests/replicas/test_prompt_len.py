"""No prompt that fits is ever refused by its length."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from replicas.prompt_len import MAX_COMPOSED, max_chars_per_token
from replicas.text import TextCodec
from tests.replicas.codec import byte_codec

BUILT_IN = Path(__file__).parents[2] / "replicas" / "checkpoints" / "triad-5m"
CODEC = TextCodec.load(str(BUILT_IN))

texts = st.one_of(
    st.text(max_size=300),
    st.text(" \n\t", max_size=300),
    st.text("aeioú̀̂̈ͅ", max_size=300),
    st.lists(st.sampled_from(["SELECT", " the", "<|end|>", "<|mask|>", "   ", "é", "日本", "\u0000"])).map(
        "".join
    ),
)


@settings(max_examples=200, deadline=None)
@given(texts)
def test_the_built_in_tokenizer_keeps_to_its_bound(text):
    most = CODEC.max_prompt_chars(2)  # of one token
    assert most is not None
    assert len(text) <= most * len(CODEC.encode(text))


def byte_fallback() -> Tokenizer:
    """As of Llama 2."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "▁a", "▁▁"]
    vocab = {"<unk>": 0} | {piece: 1 + number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab, [("▁", "a"), ("▁", "▁")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


def composing() -> Tokenizer:
    """As of Qwen."""
    tokenizer = Tokenizer(
        models.BPE({char: k for k, char in enumerate(pre_tokenizers.ByteLevel.alphabet())}, [])
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizer


@settings(max_examples=100, deadline=None)
@given(texts)
@pytest.mark.parametrize(("made", "longest"), [(byte_fallback, 6), (composing, MAX_COMPOSED)])
def test_others_keep_to_theirs(made, longest, text):
    tokenizer = made()
    assert max_chars_per_token(json.loads(tokenizer.to_str())) == longest
    assert len(text) <= longest * len(tokenizer.encode(text).ids)


def test_a_byte_is_a_token_where_there_is_nothing_longer_than_a_special_one():
    assert byte_codec().max_prompt_chars(101) == 100 * len("<mask>")


def changed(**changes) -> Tokenizer:
    tokenizer = composing()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def with_token(token: AddedToken) -> Tokenizer:
    tokenizer = composing()
    tokenizer.add_tokens([token])
    return tokenizer


def truncating() -> Tokenizer:
    tokenizer = composing()
    tokenizer.enable_truncation(10)
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        changed(normalizer=normalizers.Strip()),
        changed(normalizer=normalizers.StripAccents()),
        changed(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.BertNormalizer()])),
        changed(normalizer=normalizers.Replace("ab", "a")),
        changed(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
        changed(pre_tokenizer=pre_tokenizers.Split(" ", "removed")),
        changed(pre_tokenizer=None),
        Tokenizer(models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>", fuse_unk=True)),
        Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")),
        Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)),
        with_token(AddedToken("<mask>", lstrip=True)),
        truncating(),
    ],
)
def test_where_a_token_may_stand_for_any_number_of_characters_there_is_no_bound(tokenizer):
    assert max_chars_per_token(json.loads(tokenizer.to_str())) is None
