"""What a forward gives back of a segment."""

from math import inf, log

from replicas.engine.batch import SegmentOutput

TOP = ((5, -0.0001506805419921875), (7, -9.25))


def test_a_chosen_token_has_the_log_probability_that_stands_among_the_most_probable() -> None:
    """To the last digit, though it was taken by another way; clients compare the two."""
    output = SegmentOutput((5, 8, 9), (0.9998493307, 0.25, 0.0), top=(TOP, TOP, TOP))
    assert [entry.logprob for entry in output.logprobs(3)] == [TOP[0][1], log(0.25), -inf]
    assert [entry.top for entry in output.logprobs(2)] == [TOP, TOP]
