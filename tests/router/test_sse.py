import json

import pytest

from policies.modes import Mode
from replicas.errors import ErrorCode, TriadError
from replicas.messages import DecodingReport, Finished, FinishReason
from router.sse import ChatAnswer, TextAnswer, decoding_report, error_event

REPORT = DecodingReport({Mode.DIFFUSION: 9, Mode.AR: 1}, 4, 2, "threshold", "r1")
FINISHED = Finished("x", FinishReason.LENGTH, 7, 10, REPORT, num_reused_tokens=3)
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
    assert raw.endswith(b"\n\n")
    lines = raw.decode().removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def test_a_chat_stream_begins_with_the_role():
    (head,) = events(ChatAnswer("id", "m", 5).head())
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
    (chunk,) = events(cls("id", "m", 5).delta(text))
    (choice,) = chunk["choices"]
    for key in at:
        choice = choice[key]
    assert choice == text


@pytest.mark.parametrize(("cls", "empty"), [(ChatAnswer, {"delta": {}}), (TextAnswer, {"text": ""})])
def test_the_last_chunk_has_reason_and_report(cls, empty):
    last, done = events(cls("id", "m", 5).tail(FINISHED))
    assert done == "[DONE]"
    assert last["choices"] == [{"index": 0, "logprobs": None, "finish_reason": "length"} | empty]
    assert last["decoding"] == DECODING
    assert "usage" not in last


@pytest.mark.parametrize("cls", [ChatAnswer, TextAnswer])
def test_usage_on_request_is_a_chunk_of_its_own(cls):
    answer = cls("id", "m", 5, include_usage=True)
    assert all(chunk["usage"] is None for chunk in events(answer.head() + answer.delta("x")))
    last, usage, done = events(answer.tail(FINISHED))
    assert last["usage"] is None
    assert (usage["choices"], usage["usage"]) == ([], USAGE)
    assert usage["object"] == last["object"]
    assert done == "[DONE]"


def test_whole_answers():
    chat = ChatAnswer("id", "m", 5).whole("Hi", FINISHED)
    assert chat["object"] == "chat.completion"
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": "Hi", "refusal": None}
    text = TextAnswer("id", "m", 5).whole("Hi", FINISHED)
    assert text["object"] == "text_completion"
    assert text["choices"][0]["text"] == "Hi"
    for body in (chat, text):
        assert body["choices"][0]["finish_reason"] == "length"
        assert (body["usage"], body["decoding"]) == (USAGE, DECODING)


def test_a_request_without_forwards_has_a_report():
    assert decoding_report(DecodingReport())["tokens_per_forward"] == 0.0


def test_an_error_in_mid_stream_is_an_event():
    (error,) = events(error_event(TriadError(ErrorCode.UNAVAILABLE, "Replica r1 was lost.")))
    assert error["error"]["message"] == "Replica r1 was lost."
    assert error["error"]["code"] == "unavailable"
