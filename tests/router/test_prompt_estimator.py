from dataclasses import replace

import pytest

from policies.modes import Mode
from replicas.messages import (
    DecodingOptions,
    DecodingReport,
    Finished,
    GenerateRequest,
    SamplingParams,
)
from router.prompt_estimator import PromptEstimator


def asking(prompt, **decoding):
    return GenerateRequest("r", "", (prompt,), SamplingParams(), DecodingOptions(**decoding))


def chat(*contents):
    return tuple({"role": "user", "content": content} for content in contents)


def test_messages_share_the_beginning_they_share():
    estimator = PromptEstimator()
    first, second = asking(chat("s" * 600, "one" * 99)), asking(chat("s" * 600, "two" * 99))
    estimator.sent(estimator.keys(first), "a", 0.0)
    share = estimator.placement_request(second, estimator.keys(second), 1, 0.0).held["a"]
    assert 0.5 <= share < 1.0
    assert estimator.placement_request(first, estimator.keys(first), 1, 0.0).held == {"a": 1.0}
    estimator.forget("a")
    assert estimator.placement_request(first, estimator.keys(first), 1, 0.0).held == {}


def test_a_pinned_mode_is_known_and_auto_is_not():
    estimator = PromptEstimator()
    assert estimator.placement_request(asking("Hello", mode=Mode.AR), (), 1, 0.0).mode is Mode.AR
    assert estimator.placement_request(asking("Hello", lossless=True), (), 1, 0.0).mode is None


def test_token_ids_are_counted_and_text_is_estimated_better_with_time():
    estimator = PromptEstimator()
    assert estimator.prompt_lens(asking((1, 2, 3)), 1024) == [3]
    text = asking("x" * 600)
    assert estimator.prompt_lens(text, 1024) == [150]
    for _ in range(200):
        estimator.finished(text, Finished("r", 300, 1, DecodingReport()))
    assert 290 <= estimator.prompt_lens(text, 1024)[0] <= 310


@pytest.mark.parametrize(
    ("how", "length"),
    [
        ({}, 2500),
        ({"drops_turns": True}, 1024),
        ({"truncate_prompt_tokens": -1}, 1024),
        ({"truncate_prompt_tokens": 300}, 300),
        ({"truncate_prompt_tokens": 9000}, 2500),
    ],
)
def test_a_prompt_that_is_shortened_counts_as_what_is_left_and_teaches_nothing(how, length):
    """It asks for no more room than that, and what of its text was counted is not known."""
    estimator = PromptEstimator()
    request = replace(asking(chat("x" * 9994)), **how)
    assert estimator.prompt_lens(request, 1024) == [length]
    for _ in range(200):
        estimator.finished(request, Finished("r", 100, 1, DecodingReport()))
    assert estimator.prompt_lens(asking("x" * 400), 1024) == [100 if how else 50]
