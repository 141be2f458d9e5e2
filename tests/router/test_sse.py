import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.modes import Mode
from replicas.errors import ErrorCode, TriadError
from replicas.messages import DecodingReport, Delta, Finished, FinishReason, TextLogprob
from router.answer import Counts, decoding_report, delta_event, error_event, event, whole_body
from router.sse import ChatAnswer, TextAnswer
from tests.router.conftest import running
from tests.router.stall import Stall
from tests.thorough import examples

REPORT = DecodingReport({Mode.DIFFUSION: 9, Mode.AR: 1}, 4, 2, "threshold", "r1")
FINISHED = Finished("x", 7, 10, REPORT, num_reused_tokens=3)
LENGTH = FinishReason.LENGTH
SO_FAR = Counts(7, 4)


def a_delta(text: str, *logprobs: TextLogprob, index: int = 0, reason: FinishReason | None = None) -> Delta:
    return Delta("x", text, 1, logprobs, index, reason)


ENDED = a_delta("", reason=LENGTH)


DECODING = {
    "tokens": {"ar": 1, "diffusion": 9},
    "forwards": 4,
    "tokens_per_forward": 2.25,
    "switches": 2,
    "rule": "threshold",
    "replica": "r1",
}
USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 10,
    "total_tokens": 17,
    "prompt_tokens_details": {"cached_tokens": 3},
}


def events(raw: bytes) -> list:
    """Each event's JSON; [DONE] as it stands."""
    if not raw:
        return []
    assert raw.endswith(b"\n\n")
    lines = raw.decode().removesuffix("\n\n").split("\n\n")
    if lines[-1].startswith("event: error\n"):
        lines[-1] = lines[-1].removeprefix("event: error\n")
        assert "error" in json.loads(lines[-1][6:])
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def test_a_chat_stream_begins_with_the_role():
    (head,) = events(ChatAnswer("id", "m", 5).head(SO_FAR))
    assert head == {
        "id": "id",
        "object": "chat.completion.chunk",
        "created": 5,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
    }


@pytest.mark.parametrize("text", ['a "quoted" line\nand\r\n\ndata: [DONE]\n\n', "né→😀", "\u2028"])
@pytest.mark.parametrize(("cls", "at"), [(ChatAnswer, ("delta", "content")), (TextAnswer, ("text",))])
def test_any_text_is_one_event(cls, at, text):
    (chunk,) = events(cls("id", "m", 5).delta(a_delta(text), SO_FAR))
    (choice,) = chunk["choices"]
    for key in at:
        choice = choice[key]
    assert choice == text


ANY_TEXT = st.text() | st.text(st.characters(categories=("Cs", "Cc"))) | st.just("\0text\0")
PIECES = st.tuples(st.integers(0, 2), ANY_TEXT, st.sampled_from(["", "", "", "because"]))


@pytest.mark.parametrize("cls", [ChatAnswer, TextAnswer])
@examples(200)
@given(
    pieces=st.lists(PIECES, max_size=6),
    include_usage=st.booleans(),
    continuous_usage=st.booleans(),
    tier=st.sampled_from([None, "auto"]),
)
def test_each_chunk_is_what_json_makes_of_it_as_a_whole(
    cls, pieces, include_usage, continuous_usage, tier
) -> None:
    answer = cls(
        "id",
        "m",
        5,
        num_choices=3,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        service_tier=tier,
    )
    is_chat = cls is ChatAnswer
    for index, text, reasoning in pieces:
        news = {"reasoning_content": reasoning, "reasoning": reasoning} if reasoning else {}
        news |= {"content": text} if text or not reasoning else {}
        choice = {"delta": news} if is_chat else {"text": text}
        body = {
            "id": "id",
            "object": "chat.completion.chunk" if is_chat else "text_completion",
            "created": 5,
            "model": "m",
            "choices": [{"index": index, **choice, "logprobs": None, "finish_reason": None}],
        }
        body |= {"service_tier": tier} if tier else {}
        if continuous_usage:
            body["usage"] = {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}
        elif include_usage:
            body["usage"] = None
        assert answer.delta(Delta("x", text, 1, index=index, reasoning=reasoning), SO_FAR) == event(body)


@pytest.mark.parametrize(("cls", "empty"), [(ChatAnswer, {"delta": {}}), (TextAnswer, {"text": ""})])
def test_the_last_chunk_has_reason_and_report(cls, empty):
    last, done = events(cls("id", "m", 5).tail(ENDED, FINISHED))
    assert done == "[DONE]"
    assert last["choices"] == [{"index": 0, "logprobs": None, "finish_reason": "length"} | empty]
    assert last["decoding"] == DECODING
    assert "usage" not in last


@pytest.mark.parametrize("cls", [ChatAnswer, TextAnswer])
def test_usage_on_request_is_a_chunk_of_its_own(cls):
    answer = cls("id", "m", 5, include_usage=True)
    chunks = events(answer.head(SO_FAR) + answer.delta(a_delta("x"), SO_FAR))
    assert all(chunk["usage"] is None for chunk in chunks)
    last, usage, done = events(answer.tail(ENDED, FINISHED))
    assert last["usage"] is None
    assert (usage["choices"], usage["usage"]) == ([], USAGE)
    assert usage["object"] == last["object"]
    assert done == "[DONE]"


@pytest.mark.parametrize("cls", [ChatAnswer, TextAnswer])
@pytest.mark.parametrize("include_usage", [False, True])
def test_continuous_usage_is_in_every_chunk(cls, include_usage):
    answer = cls("id", "m", 5, include_usage=include_usage, continuous_usage=True)
    so_far = {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}
    chunks = events(answer.head(SO_FAR) + answer.delta(a_delta("x"), SO_FAR) + answer.end(ENDED, SO_FAR))
    assert [chunk["usage"] for chunk in chunks] == [so_far] * len(chunks)
    last, *usage, done = events(answer.tail(ENDED, FINISHED))
    assert last["usage"] == {"prompt_tokens": 7, "completion_tokens": 10, "total_tokens": 17}
    assert [chunk["usage"] for chunk in usage] == ([USAGE] if include_usage else [])
    assert done == "[DONE]"


def test_whole_answers():
    chat = ChatAnswer("id", "m", 5).whole([a_delta("Hi", reason=LENGTH)], FINISHED)
    assert chat["object"] == "chat.completion"
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": "Hi", "refusal": None}
    text = TextAnswer("id", "m", 5).whole([a_delta("Hi", reason=LENGTH)], FINISHED)
    assert text["object"] == "text_completion"
    assert text["choices"][0]["text"] == "Hi"
    for body in (chat, text):
        assert body["choices"][0]["finish_reason"] == "length"
        assert (body["usage"], body["decoding"]) == (USAGE, DECODING)


@pytest.mark.parametrize("tokens", [{}, {Mode.DIFFUSION: 26}])
def test_a_request_without_forwards_has_a_report_and_no_quotient(tokens):
    """As where the prefill brought a first block of diffusion with all the text."""
    assert decoding_report(DecodingReport(tokens))["tokens_per_forward"] is None


def test_an_error_in_mid_stream_is_an_event():
    (error,) = events(error_event(TriadError(ErrorCode.UNAVAILABLE, "Replica r1 was lost.")))
    assert error["error"]["message"] == "Replica r1 was lost."
    assert error["error"]["code"] == "unavailable"


HALF = TextLogprob(b"\xe2\x80", -0.5, 2, (TextLogprob(b"\xe2\x80", -0.5), TextLogprob(b"a", float("-inf"))))
WORD = TextLogprob("é".encode(), -1.5, 3, (TextLogprob(b"a", -1.0),))


def test_logprobs_of_chat_have_bytes_and_no_infinity():
    answer = ChatAnswer("id", "m", 5, num_logprobs=2)
    (chunk,) = events(answer.delta(a_delta("…é", HALF, WORD), SO_FAR))
    half, word = chunk["choices"][0]["logprobs"]["content"]
    entry = {"token": "\\xe2\\x80", "logprob": -0.5, "bytes": [0xE2, 0x80]}
    impossible = {"token": "a", "logprob": -9999.0, "bytes": [97]}
    assert half == entry | {"top_logprobs": [entry, impossible]}
    assert (word["token"], word["bytes"]) == ("é", [0xC3, 0xA9])
    whole = answer.whole([a_delta("…é", HALF, WORD, reason=LENGTH)], FINISHED)
    assert whole["choices"][0]["logprobs"] == {"content": [half, word], "refusal": None}


def test_logprobs_of_completions_are_parallel_lists():
    answer = TextAnswer("id", "m", 5, num_logprobs=1)
    (chunk,) = events(answer.delta(a_delta("…é", HALF, WORD), SO_FAR))
    assert chunk["choices"][0]["logprobs"] == {
        "tokens": ["bytes:\\xe2\\x80", "é"],
        "token_logprobs": [-0.5, -1.5],
        # The chosen token is among them, also where it is not one of the most probable.
        "top_logprobs": [{"bytes:\\xe2\\x80": -0.5, "a": -9999.0}, {"a": -1.0, "é": -1.5}],
        "text_offset": [2, 3],
    }
    alone = TextAnswer("id", "m", 5, num_logprobs=0).whole([a_delta("é", WORD, reason=LENGTH)], FINISHED)
    assert alone["choices"][0]["logprobs"]["top_logprobs"] is None


def many(num: int, num_top: int) -> tuple[TextLogprob, ...]:
    top = tuple(TextLogprob(b"%d" % k, -float(k)) for k in range(num_top))
    return tuple(TextLogprob(b'"logprobs":null', -1.5, k, top) for k in range(num))


@pytest.mark.parametrize("cls", [ChatAnswer, TextAnswer])
@pytest.mark.parametrize("num_top", [0, 3, 20])
async def test_many_logprobs_are_written_in_parts_as_they_would_be_at_once(cls, num_top):
    answer = cls("id", "m", 5, num_choices=3, num_logprobs=num_top)
    choices = [
        a_delta('"logprobs":null', *many(num, num_top), index=index, reason=LENGTH)
        for index, num in enumerate((1000, 0, 300))
    ]
    pieces = await whole_body(answer, choices, FINISHED)
    assert json.loads(b"".join(pieces)) == answer.whole(choices, FINISHED)
    for choice in choices:
        assert events(await delta_event(answer, choice, SO_FAR)) == events(answer.delta(choice, SO_FAR))


@pytest.mark.parametrize("cls", [ChatAnswer, TextAnswer])
async def test_an_answer_of_very_many_logprobs_leaves_the_loop_to_others(cls):
    answer = cls("id", "m", 5, num_choices=16, num_logprobs=20)
    choices = [a_delta("x", *many(500, 20), index=index, reason=LENGTH) for index in range(16)]
    stall = Stall()
    async with running(stall.run()):
        await whole_body(answer, choices, FINISHED)
        await delta_event(answer, choices[0], SO_FAR)
    assert stall.longest_s < 0.1  # at once it would be a second and more


@pytest.mark.parametrize("cls", [ChatAnswer, TextAnswer])
def test_choices_have_their_indices_and_end_one_by_one(cls):
    answer = cls("id", "m", 5, num_choices=3)
    assert [c["choices"][0]["index"] for c in events(answer.head(SO_FAR))] == (
        [0, 1, 2] if cls is ChatAnswer else []
    )
    (chunk,) = events(answer.delta(a_delta("x", index=2), SO_FAR))
    assert chunk["choices"][0]["index"] == 2
    (end,) = events(answer.end(a_delta("", index=1, reason=FinishReason.STOP), SO_FAR))
    assert (end["choices"][0]["index"], end["choices"][0]["finish_reason"]) == (1, "stop")
    assert "decoding" not in end
    last, _ = events(answer.tail(a_delta("", index=2, reason=LENGTH), FINISHED))
    assert (last["choices"][0]["index"], last["choices"][0]["finish_reason"]) == (2, "length")
    whole = answer.whole([a_delta(str(i), index=i, reason=LENGTH) for i in range(3)], FINISHED)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
