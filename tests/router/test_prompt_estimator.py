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
    assert estimator.prompt_lens(asking((1, 2, 3))) == [3]
    text = asking("x" * 600)
    assert estimator.prompt_lens(text) == [150]
    for _ in range(200):
        estimator.finished(text, Finished("r", 300, 1, DecodingReport()))
    assert 290 <= estimator.prompt_lens(text)[0] <= 310
