"""A round that verifies: a causal forward of the seed and of what may follow it, each position sampled as AR
does it.

What agrees with the sample is kept, and the first that does not is the sample itself. So the output is AR's,
whatever was to follow.
"""

from replicas.engine.batch import SegmentOutput
from replicas.engine.decoders.round import NO_DRAFT, Draft, Round, RoundProgress, SegmentRequest


class VerifyRound(Round):
    """A round of one forward.

    request: the seed and what is verified behind it, causal; then the masks of a draft, if any
    """

    def __init__(self, start: int, request: SegmentRequest):
        self.start = start
        self._request = request

    def next_segment(self, following: int = 0) -> SegmentRequest:
        return self._request

    def apply_output(self, request: SegmentRequest, output: SegmentOutput) -> RoundProgress:
        drafted = request.token_ids[1 : request.num_causal]
        chosen = output.token_ids[: request.num_causal]  # fewer where nothing can be sampled from a row
        pairs = zip(drafted, chosen, strict=False)
        num_accepted = next((at for at, (token, own) in enumerate(pairs) if token != own), len(chosen) - 1)
        num_accepted = min(num_accepted, len(drafted))
        # The seed and the accepted drafts are cached; the token after them, AR's own, is the next seed.
        count = num_accepted + 1
        draft = Draft.behind(request, output) if count == request.num_causal else NO_DRAFT
        return RoundProgress(chosen[:count], output.logprobs(count), num_cached=count, done=True, draft=draft)


def verify(token_ids: tuple[int, ...]) -> SegmentRequest:
    """The segment that verifies a seed and what may come after it."""
    return SegmentRequest(token_ids, len(token_ids), adapter=False, wanted=tuple(range(len(token_ids))))
