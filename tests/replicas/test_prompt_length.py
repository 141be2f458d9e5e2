"""The fewest tokens that a length allows are never more than a tokenizer gives."""

from pathlib import Path
from random import Random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

import replicas
from replicas.errors import ErrorCode, TriadError
from replicas.prompt_length import chars_per_token, fewest_tokens
from replicas.text import TextCodec
from tests.replicas.codec import byte_codec

OWN = str(Path(replicas.__path__[0]) / "checkpoints" / "triad-5m" / "tokenizer.json")
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    vocab = {char: k for k, char in enumerate([*ALPHABET, "th", "the", "Ġt", "Ġth"])}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "t"), ("Ġt", "h")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def byte_fallback(num_bytes: int = 256) -> Tokenizer:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(num_bytes)), "▁", "a", "▁a", "aa"]
    model = models.BPE(
        vocab={piece: k for k, piece in enumerate(pieces)},
        merges=[("▁", "a"), ("a", "a")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


KNOWN = {
    "own": Tokenizer.from_file(OWN),
    "byte level": byte_level(),
    "composing": byte_level(normalizers.NFC()),
    "byte fallback": byte_fallback(),
}
TEXTS = [
    "the thethe the",
    " " * 50,
    "aaaa aaaa",
    "\u03b1\u0313\u0300\u0345" * 20,
    "\u1100\u1161\u11a8" * 9,
    "日本 😀",
]


@pytest.mark.parametrize("name", KNOWN)
def test_no_text_has_fewer_tokens_than_its_length_allows(name: str) -> None:
    tokenizer, random = KNOWN[name], Random(name)
    per_token = chars_per_token(tokenizer)
    assert per_token is not None
    for _ in range(200):
        text = "".join(random.choice(TEXTS) for _ in range(random.randint(0, 20)))
        assert fewest_tokens(len(text), per_token) <= len(
            tokenizer.encode(text, add_special_tokens=False).ids
        )


def dropping() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def swallowing() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_fallback(num_bytes=255),
        byte_level(normalizers.Strip()),
        byte_level(normalizers.Replace("  ", " ")),
        dropping(),
        swallowing(),
        Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")),
    ],
)
def test_nothing_is_told_of_a_tokenizer_that_may_swallow_text(tokenizer: Tokenizer) -> None:
    assert chars_per_token(tokenizer) is None
    assert fewest_tokens(10**9, None) == 0


@pytest.mark.parametrize(
    ("prompt", "param", "says"),
    [
        ("x" * 10_000, "prompt", "10000 characters"),
        (({"role": "user", "content": "x" * 10_000},), "messages", "characters"),
        (({"role": "user", "content": ""},) * 5_000, "messages", "5000 messages"),
    ],
)
def test_a_prompt_that_is_too_long_by_its_length_is_refused(prompt, param: str, says: str) -> None:
    codec: TextCodec = byte_codec()
    with pytest.raises(TriadError, match=says) as caught:
        codec.encode(prompt, 200)
    assert (caught.value.code, caught.value.param) == (ErrorCode.CONTEXT_LENGTH_EXCEEDED, param)
    assert len(codec.encode(prompt)) > 200
