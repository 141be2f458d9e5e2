"""Deltas of one choice joined to one."""

from hypothesis import given
from hypothesis import strategies as st

from policies.modes import Mode
from replicas.messages import Delta, FinishReason, TextLogprob, ToolCallDelta, TracedTokens
from router.deltas import joined

CALLS = st.builds(
    ToolCallDelta, st.integers(0, 2), st.text(max_size=3), st.none(), st.none() | st.just("name")
)
MANY = st.lists(
    st.builds(
        Delta,
        st.just("r"),
        st.text(max_size=5),
        st.integers(0, 9),
        st.just(()) | st.just((TextLogprob(b"a", -1.0, 0),)),
        st.just(3),
        st.none() | st.sampled_from(FinishReason),
        st.just(()) | st.just((5, 6)),
        st.none() | st.just("stop"),
        st.just("") | st.text(max_size=5),
        st.just(()) | st.lists(CALLS, max_size=3).map(tuple),
        st.just(()) | st.just((TracedTokens(Mode.AR, 1, 1, "a"),)),
    ),
    min_size=1,
    max_size=6,
)


@given(MANY, st.data())
def test_a_joined_delta_says_what_its_parts_said_however_they_were_joined_before(deltas, data):
    whole = joined(deltas)
    for name in ("text", "reasoning"):
        assert getattr(whole, name) == "".join(getattr(delta, name) for delta in deltas)
    for name in ("logprobs", "token_ids", "trace"):
        assert getattr(whole, name) == tuple(x for delta in deltas for x in getattr(delta, name))
    assert whole.num_tokens == sum(delta.num_tokens for delta in deltas)
    assert (whole.index, whole.reason, whole.stop_reason) == (3, deltas[-1].reason, deltas[-1].stop_reason)
    cut = data.draw(st.integers(0, len(deltas)))
    parts = [joined(part) for part in (deltas[:cut], deltas[cut:]) if part]
    assert joined(parts) == whole
