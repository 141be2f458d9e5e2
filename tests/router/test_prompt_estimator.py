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
    wishes = PromptEstimator()
    first, second = asking(chat("s" * 600, "one" * 99)), asking(chat("s" * 600, "two" * 99))
    wishes.sent(wishes.keys(first), "a", 0.0)
    share = wishes.wish(second, wishes.keys(second), 1, 0.0).held["a"]
    assert 0.5 <= share < 1.0
    assert wishes.wish(first, wishes.keys(first), 1, 0.0).held == {"a": 1.0}
    wishes.forget("a")
    assert wishes.wish(first, wishes.keys(first), 1, 0.0).held == {}


def test_a_pinned_mode_is_known_and_auto_is_not():
    wishes = PromptEstimator()
    assert wishes.wish(asking("Hello", mode=Mode.AR), (), 1, 0.0).mode is Mode.AR
    assert wishes.wish(asking("Hello", lossless=True), (), 1, 0.0).mode is None


def test_token_ids_are_counted_and_text_is_estimated_better_with_time():
    wishes = PromptEstimator()
    assert wishes.prompt_lens(asking((1, 2, 3))) == [3]
    text = asking("x" * 600)
    assert wishes.prompt_lens(text) == [150]
    for _ in range(200):
        wishes.finished(text, Finished("r", 300, 1, DecodingReport()))
    assert 290 <= wishes.prompt_lens(text)[0] <= 310
