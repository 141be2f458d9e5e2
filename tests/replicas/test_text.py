import logging
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from replicas.errors import ErrorCode, TriadError
from replicas.model.config import CheckpointError
from replicas.text import TextCodec
from replicas.text_stream import TextStream
from tests.replicas.codec import byte_codec, tiny_tokenizer
from tests.thorough import examples
from tests.tiny_checkpoint import BYTE_FALLBACK_KINDS, byte_fallback_tokenizer

CODEC = byte_codec()
TRIAD_5M = Path(__file__).parents[2] / "replicas" / "checkpoints" / "triad-5m"
TOKENIZERS: dict[str, PreTrainedTokenizerFast] = {
    "one byte a token": tiny_tokenizer(),
    "triad-5m": AutoTokenizer.from_pretrained(TRIAD_5M),
    **{f"byte-fallback, {kind}": byte_fallback_tokenizer(kind) for kind in BYTE_FALLBACK_KINDS},
}
CODECS = {name: TextCodec(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def pieces(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool, int]:
    """Streams a text token by token: what was released at each, the rest, and how it ended."""
    stream = CODEC.stream(stop)
    released = [stream.push((token,)) for token in CODEC.encode(text)]
    return [*released, stream.finish()], stream.stopped, stream.num_tokens


@examples(70)
@given(st.text(max_size=40))
def test_any_text_streams_back_whole(text: str) -> None:
    assert "".join(pieces(text)[0]) == text


@examples(100)
@given(
    text=st.text(alphabet="abé€", max_size=20),
    stop=st.lists(st.text(alphabet="abé€", min_size=1, max_size=4), max_size=3),
    cut=st.integers(1, 7),
)
def test_stop_strings_cut_the_text_as_a_search_would(text: str, stop: list[str], cut: int) -> None:
    """Whatever the chunks, the released text is what is before the first stop to be completed."""
    ends = [(text.find(s) + len(s), -len(s)) for s in stop if s in text]
    first = min(ends, default=None)
    expected = text if first is None else text[: first[0] + min(b for a, b in ends if a == first[0])]
    stream = CODEC.stream(tuple(stop))
    ids = CODEC.encode(text)
    released = ""
    for at in range(0, len(ids), cut):
        released += stream.push(tuple(ids[at : at + cut]))
        assert expected.startswith(released)
    assert released + stream.finish() == expected
    assert stream.stopped == (first is not None)


def test_tokens_after_a_stop_are_not_counted() -> None:
    released, stopped, num_tokens = pieces("one. two", (".",))
    assert ("".join(released), stopped, num_tokens) == ("one", True, 4)


def test_half_a_character_waits_for_its_other_bytes_and_special_tokens_are_silent() -> None:
    released, _, _ = pieces("é")
    assert released == ["", "é", ""]
    stream = CODEC.stream()
    assert stream.push((*CODEC.encode("a"), 2)) == "a"
    lone = CODEC.stream()
    assert lone.push((CODEC.encode("é")[0],)) == ""
    assert lone.finish() == "\ufffd"


@examples(70)
@given(text=st.text(alphabet="aé€😀", max_size=12), stop=st.text(alphabet="aé", min_size=1, max_size=2))
def test_each_token_begins_where_its_text_does(text: str, stop: str) -> None:
    """starts against the characters that are whole before each byte; released are those before the stop."""
    stream = CODEC.stream((stop,))
    ids = CODEC.encode(text)
    released = stream.push(tuple(ids)) + stream.finish()
    raw = text.encode()
    whole = [len(raw[:at].decode(errors="ignore")) for at in range(len(raw))]
    assert stream.starts == whole[: stream.num_tokens]
    assert stream.num_released == len(released)
    assert b"".join(map(CODEC.token_bytes, ids)) == raw


def test_the_bytes_of_special_added_and_sentencepiece_tokens() -> None:
    assert CODEC.token_bytes(2) == b"<eos>"
    assert CODEC.token_bytes(10_000) == b""
    vocab = {"<unk>": 0, "▁né": 1, "<0xE2>": 2, "a": 3}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert [codec.token_bytes(k) for k in (1, 2, 3)] == [" né".encode(), b"\xe2", b"a"]


class RandomTokens:
    """A few tokens of a tokenizer, among them many that are part of a character, and all that are special."""

    def __init__(self, name: str):
        self.codec = CODECS[name]
        self.tokenizer = TOKENIZERS[name]
        every = range(len(self.tokenizer))
        parts = [token for token in every if not _is_utf8(self.codec.token_bytes(token))]
        rng = random.Random(name)
        added = self.tokenizer.added_tokens_decoder
        self.special = [token_id for token_id, token in added.items() if token.special]
        pools = (parts, list(every), self.special)
        self.likely = [rng.choice(pool) for pool in pools for _ in range(12)]

    def raw(self, ids: list[int], continues_text: bool) -> list[bytes]:
        """By token; none for special ones."""
        raw, is_first = [], not continues_text
        for token in ids:
            is_special = token in self.special
            raw.append(b"" if is_special else self.codec.token_bytes(token, is_first))
            is_first &= is_special
        return raw


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def spans(raw: bytes) -> list[int]:
    """How many bytes each character of the text stands for, a U+FFFD for each run that is none."""
    lengths: list[int] = []
    while raw:
        try:
            valid, end = raw.decode(), len(raw)
            broken = 0
        except UnicodeDecodeError as error:
            valid, end, broken = raw[: error.start].decode(), error.end, error.end - error.start
        lengths += [len(char.encode()) for char in valid] + [broken] * bool(broken)
        raw = raw[end:]
    return lengths


@pytest.mark.parametrize("name", TOKENIZERS)
@examples(80)
@given(data=st.data(), continues_text=st.booleans())
def test_any_tokens_in_any_parts_are_one_text(name: str, data: st.DataObject, continues_text: bool) -> None:
    tokens = RandomTokens(name)
    anything = st.integers(0, len(tokens.tokenizer) - 1)
    ids = data.draw(st.lists(st.sampled_from(tokens.likely) | anything, max_size=14))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    stream = tokens.codec.stream(continues_text=continues_text)
    text = ""
    for begin, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        text += stream.push(tuple(ids[begin:end]))
        assert stream.num_released == len(text)
    text += stream.finish()

    pieces = tokens.raw(ids, continues_text)
    raw = b"".join(pieces)
    assert text == raw.decode(errors="replace")
    if _is_utf8(raw) and not continues_text:
        assert text == tokens.tokenizer.decode(ids, skip_special_tokens=True)
    assert not stream.stopped
    assert stream.num_released == len(text)
    ends = [0]
    for length in spans(raw):
        ends.append(ends[-1] + length)
    at = 0
    for start, piece in zip(stream.starts, pieces, strict=True):
        if piece:
            assert ends[start] <= at < ends[start + 1], (
                "a token's offset is that of the character it begins in"
            )
        at += len(piece)


@pytest.mark.parametrize("name", TOKENIZERS)
@examples(20)
@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="▁"), max_size=30))
def test_what_is_encoded_comes_back(name: str, text: str) -> None:
    codec = CODECS[name]
    stream = codec.stream()
    ids = codec.encode(text)
    assert stream.push(tuple(ids)) + stream.finish() == TOKENIZERS[name].decode(ids, skip_special_tokens=True)


@examples(130)
@given(
    st.lists(st.sampled_from(b"A\x7f\x80\x90\x9f\xa0\xbf\xc0\xc2\xe0\xe2\xed\xf0\xf4\xf5\xff"), max_size=8)
)
def test_a_byte_belongs_to_the_character_it_is_in(raw: list[int]) -> None:
    """Also halves of surrogates, overlong ones and others that a decoder takes in before it refuses them."""
    tokenizer = TOKENIZERS["byte-fallback, replace"]
    ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in raw])
    stream = CODECS["byte-fallback, replace"].stream(continues_text=True)
    text = "".join(stream.push((token,)) for token in ids) + stream.finish()
    assert text == bytes(raw).decode(errors="replace")
    ends = [0]
    for length in spans(bytes(raw)):
        ends.append(ends[-1] + length)
    assert all(ends[start] <= at < ends[start + 1] for at, start in enumerate(stream.starts))


def test_a_broken_character_is_one_replacement_character_and_the_text_goes_on() -> None:
    """An emitted character, the beginning of one, then another piece: tokenizers' DecodeStream raises."""
    tokenizer = byte_fallback_tokenizer()
    names = ["▁a", "<0xC3>", "<0xA9>", "<0xE2>", "b", "<0xE2>", "<0x82>", "▁the", "<0xFF>", "<0xF0>"]
    stream = TextCodec(tokenizer).stream()
    parts = [stream.push((token,)) for token in tokenizer.convert_tokens_to_ids(names)]
    assert parts == ["a", "", "é", "", "\ufffdb", "", "", "\ufffd the", "\ufffd", ""]
    assert stream.finish() == "\ufffd"
    assert stream.starts == [0, 1, 1, 2, 3, 4, 4, 5, 9, 10]


@pytest.mark.parametrize("kind", BYTE_FALLBACK_KINDS)
def test_the_space_before_a_text_is_in_neither_text_nor_logprobs(kind: str) -> None:
    """But where the completion goes on from a text, it is a space like any other."""
    tokenizer = byte_fallback_tokenizer(kind)
    codec = TextCodec(tokenizer)
    ids = tuple(tokenizer.convert_tokens_to_ids(["</s>", "▁the", "▁a"]))
    first = codec.stream()
    assert first.push(ids) == "the a" == tokenizer.decode(ids, skip_special_tokens=True)
    assert (first.first, first.starts) == (1, [0, 0, 3])
    assert [codec.token_bytes(ids[1], is_first=True), codec.token_bytes(ids[2])] == [b"the", b" a"]
    assert codec.stream(continues_text=True).push(ids) == " the a"


def reference_stop(pieces: list[str], stop: list[str], min_tokens: int) -> tuple[str, int | None]:
    """The text before the stop string that is complete first, past the first tokens; tokens taken."""
    text = "".join(pieces)
    protected = len("".join(pieces[:min_tokens]))
    found = [
        (begin + len(each), begin)
        for each in stop
        for begin in range(len(text))
        if text.startswith(each, begin) and begin + len(each) > protected
    ]
    if not found:
        return text, None
    end, begin = min(found)
    return text[:begin], next(n for n in range(len(pieces) + 1) if len("".join(pieces[:n])) >= end)


@examples(130)
@given(
    pieces=st.lists(st.sampled_from(["a", "b", "é"]), max_size=14),
    stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=3),
    min_tokens=st.integers(0, 12),
)
def test_a_stop_string_counts_once_min_tokens_are_there(
    pieces: list[str], stop: list[str], min_tokens: int
) -> None:
    tokenizer = byte_fallback_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(pieces)
    stream = CODECS["byte-fallback, replace"].stream(tuple(stop), min_tokens)
    text = ""
    for token in ids:
        text += stream.push((token,))
    text += stream.finish()
    expected, num_tokens = reference_stop(pieces, stop, min_tokens)
    assert text == expected
    assert stream.stopped == (num_tokens is not None)
    if num_tokens is not None:
        assert stream.num_tokens == num_tokens > min_tokens


@pytest.mark.parametrize(
    ("stop", "tokens", "text", "num_tokens"),
    [
        ("</s>", ["▁a", "b", "</s>", "c"], "ab", 3),
        ("b</s>", ["▁a", "b", "</s>", "c"], "a", 3),
        ("</s>c", ["▁a", "</s>", "b", "</s>", "c", "d"], "ab", 5),
        ("<|system|>", ["▁a", "</s>", "<|system|>", "d"], "a", 3),
        ("</s>", ["▁a", "<", "/", "s", ">", "b"], "a", 5),
        ("ab", ["▁a", "</s>", "b", "c"], "", 3),
        ("</s>", ["</s>", "▁a"], "", 1),
    ],
)
def test_a_stop_string_may_name_control_tokens(
    stop: str, tokens: list[str], text: str, num_tokens: int
) -> None:
    """They are not in the text, and so are left out of it where the stop string does not come about."""
    tokenizer = byte_fallback_tokenizer()
    stream = CODECS["byte-fallback, replace"].stream((stop,))
    ids = tokenizer.convert_tokens_to_ids(tokens)
    given_out = "".join(stream.push((token,)) for token in ids) + stream.finish()
    assert (given_out, stream.stopped, stream.num_tokens) == (text, True, num_tokens)
    assert stream.num_released == len(text)
    other = CODECS["byte-fallback, replace"].stream((stop + "never",))
    assert other.push(tuple(ids)) + other.finish() == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_control_token_as_a_stop_string_waits_for_min_tokens() -> None:
    tokenizer = byte_fallback_tokenizer()
    ids = tuple(tokenizer.convert_tokens_to_ids(["▁a", "</s>", "b", "</s>"]))
    stream = CODECS["byte-fallback, replace"].stream(("</s>",), min_tokens=2)
    assert (stream.push(ids), stream.num_tokens, stream.stopped) == ("ab", 4, True)


def test_accepting_never_raises_and_keeps_the_failure() -> None:
    class Broken(TextStream):
        def _push(self, token_id: int) -> str:
            raise ValueError(f"token {token_id}")

    tokens = CODEC.stream()
    assert [tokens.accept(token) for token in CODEC.encode("ab")] == [False, False]
    assert (tokens.take(), tokens.take()) == ("ab", "")
    broken = Broken(CODEC._bytes, (), {}, 0, False)
    assert broken.accept(7)
    assert str(broken.failure) == "token 7"


def test_a_decoder_whose_tokens_depend_on_each_other_is_refused() -> None:
    tokenizer = byte_fallback_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.CTC()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: decoder: type 'CTC' is not supported"):
        TextCodec(tokenizer)


def test_a_tokenizer_without_a_decoder_has_words() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    stream = TextCodec(tokenizer).stream()
    assert stream.push((1, 2, 1)) == tokenizer.decode([1, 2, 1]) == "one two one"


def test_prompts() -> None:
    assert CODEC.encode("ab") == CODEC.encode(tuple(CODEC.encode("ab")))
    chat = CODEC.encode(({"role": "user", "content": "hi"},))
    assert chat == CODEC.encode("[user]hi[assistant]")


@pytest.mark.parametrize(
    ("codec", "prompt", "param"),
    [
        (CODEC, ({"role": "robot", "content": "hi"},), "messages"),
        (byte_codec(None), ({"role": "user", "content": "hi"},), "messages"),
    ],
)
def test_bad_prompts_are_named(codec, prompt, param) -> None:
    with pytest.raises(TriadError) as caught:
        codec.encode(prompt)
    assert (caught.value.code, caught.value.param) == (ErrorCode.INVALID_REQUEST, param)


def test_the_embedded_checkpoint_loads_without_a_warning() -> None:
    """transformers would say that it does not know the model, which it is not asked to load."""
    said: list[logging.LogRecord] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = said.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(listener)
    try:
        TextCodec.load(str(TRIAD_5M))
    finally:
        logger.removeHandler(listener)
    assert [record.getMessage() for record in said] == []
