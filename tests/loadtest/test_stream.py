"""The stream's bytes may come in any pieces; what they say is the same."""

import json
import random
from pathlib import Path

import pytest

from loadtest.records import Chunk, ErrorKind, Record, from_json, read_records, to_json, write_records
from loadtest.stream import EventReader, StreamReader


def record() -> Record:
    return Record("auto", "1/s", "tasks", "tasks", 0.0)


def event(body: object) -> str:
    return f"data: {json.dumps(body)}\n\n"


def delta(text: str, **more: object) -> str:
    return event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], **more})


LAST = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
DONE = "data: [DONE]\n\n"


@pytest.mark.parametrize("seed", range(30))
def test_events_do_not_depend_on_the_pieces(seed: int) -> None:
    rng = random.Random(seed)
    whole = (
        ': a comment\n\ndata: {"a": 1}\n\ndata:no space\r\n\r\nevent: x\ndata: ü\ndata: two\n\ndata: unended'
    )
    rest, reader, found = whole.encode(), EventReader(), []
    while rest:
        size = rng.randint(1, 9)
        found += reader.feed(rest[:size])
        rest = rest[size:]
    assert found == ['{"a": 1}', "no space", "ü\ntwo"]


def test_events_in_one_read_share_its_time_and_are_counted_apart() -> None:
    r = record()
    reader = StreamReader(r)
    reader.feed((delta("One") + delta(" two")).encode(), 1.0)
    reader.feed((LAST + DONE).encode(), 2.0)
    reader.close()
    assert r.chunks == [Chunk(1.0, 3), Chunk(1.0, 4)]
    assert (reader.text, r.error) == ("One two", None)


def test_a_server_that_counts_tokens_along_the_way_gives_tokens_by_chunk() -> None:
    """vLLM's continuous_usage_stats: a running count with each chunk."""
    r = record()
    reader = StreamReader(r)
    for text, count in (("One", 1), (" two three", 3), (" four", 4)):
        usage = {"prompt_tokens": 5, "completion_tokens": count}
        reader.feed(delta(text, usage=usage).encode(), float(count))
    assert [chunk.num_tokens for chunk in r.chunks] == [1, 2, 1]
    assert r.output_tokens == 4


def test_text_completions_are_read_too() -> None:
    r = record()
    reader = StreamReader(r)
    reader.feed(event({"choices": [{"index": 0, "text": "Hi", "finish_reason": None}]}).encode(), 1.0)
    reader.feed(event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}).encode(), 1.5)
    reader.feed(DONE.encode(), 2.0)
    reader.close(check=lambda text: text == "Hi")
    assert (len(r.chunks), r.finish_reason, r.error) == (1, "length", None)
    assert r.correct is False  # cut off by its length, so not a whole answer


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (delta("One"), ErrorKind.TRUNCATED),
        ("", ErrorKind.TRUNCATED),
        (delta("One") + LAST, ErrorKind.MISSING_DONE),
        (DONE, ErrorKind.TRUNCATED),
        (event({"error": {"message": "gone"}}) + DONE, ErrorKind.ERROR_EVENT),
        ("data: {\n\n", ErrorKind.MALFORMED),
        (event([1]), ErrorKind.MALFORMED),
        (event({"choices": 3}), ErrorKind.MALFORMED),
        (event({"choices": [], "usage": {"prompt_tokens": 1}}), ErrorKind.MALFORMED),
    ],
)
def test_faults_of_a_stream(body: str, kind: ErrorKind) -> None:
    r = record()
    reader = StreamReader(r)
    reader.feed(body.encode(), 1.0)
    reader.close()
    assert r.error is kind


def test_records_read_back(tmp_path: Path) -> None:
    r = record()
    r.chunks = [Chunk(1.0, 3, 2), Chunk(2.5, 1)]
    r.decoding = {"tokens": {"ar": 3}}
    r.fail(ErrorKind.WRONG_TEXT, "x" * 500)
    assert from_json(to_json(r)) == r
    path = tmp_path / "records.jsonl"
    write_records([r, record()], path)
    assert list(read_records(path)) == [r, record()]
    path.write_text(to_json(r) + '\n{"setting": 1}\n')
    with pytest.raises(ValueError, match=":2 is no record"):
        list(read_records(path))
