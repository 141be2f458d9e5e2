import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from replicas.errors import ErrorCode, TriadError
from replicas.text import TextCodec
from tests.replicas.codec import byte_codec

CODEC = byte_codec()


def pieces(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool, int]:
    """Streams a text token by token: what was released at each, the rest, and how it ended."""
    stream = CODEC.stream(stop)
    released = [stream.push((token,)) for token in CODEC.encode(text)]
    return [*released, stream.finish()], stream.stopped, stream.num_tokens


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_any_text_streams_back_whole(text: str) -> None:
    assert "".join(pieces(text)[0]) == text


@settings(max_examples=300, deadline=None)
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


@settings(max_examples=200, deadline=None)
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
