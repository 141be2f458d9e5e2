"""How the sequences of a batch decode: which segment each wants next, and what its output does to it.

A round of a mode (engine.decoders) says both while it lasts; between two of them, at a safe point, the plan
in force, or the one on trial, says which begins.
"""

import logging
from collections import Counter
from collections.abc import Sequence as Seq

from policies.modes import Mode
from replicas.engine.ahead import open_request, request_of
from replicas.engine.batch import ModelSpec, Segment, SegmentOutput, TokenLogprob
from replicas.engine.constrain import failure_of
from replicas.engine.counters import Counters
from replicas.engine.decoders.ar import ArRound
from replicas.engine.decoders.choose import (
    begin_round,
    begun_behind_prompt,
    following_block,
    plan_for,
)
from replicas.engine.decoders.round import Draft, Round, SegmentRequest
from replicas.engine.decoders.self_speculation import SelfSpeculationRound
from replicas.engine.grammar import GrammarFailed
from replicas.engine.sequence import ActivePlan, Progress, Sequence
from replicas.engine.trials import Trials
from replicas.errors import ErrorCode

logger = logging.getLogger(__name__)

MIXED_SHARE = 0.1
"""The share of a forward's decoding that may be of other modes than its own."""


class Decoding:
    """Takes sequences from round to round; what they make is counted in `counters`."""

    def __init__(
        self, spec: ModelSpec, active: ActivePlan, overlaps_blocks: bool, trials: Trials, counters: Counters
    ):
        self._spec = spec
        self._overlaps_blocks = overlaps_blocks
        self._trials = trials
        self._counters = counters
        self.active = active
        """The plan in force."""

    def behind_prompt(self, sequence: Sequence, request: SegmentRequest) -> SegmentRequest:
        """The last chunk of a prompt with the sequence's first block behind it, if its mode has one."""
        plan = plan_for(sequence, self._trials.plan(self.active), self._spec).decode
        return begun_behind_prompt(sequence, request, plan, self._spec, self._overlaps_blocks)

    def next_segment(self, sequence: Sequence, budget: int) -> SegmentRequest | None:
        """The next segment of a sequence; None when the budget is too small for it, which then comes
        later."""
        if sequence.round is not None:
            following = 0
            if self._overlaps_blocks:
                following = following_block(sequence, self._trials.plan(self.active), self._spec)
            request = sequence.round.next_segment(following)
            return request if len(request.token_ids) <= budget else None
        plan = plan_for(sequence, self._trials.plan(self.active), self._spec)
        begun = begin_round(sequence, plan.decode, self._spec, self._overlaps_blocks)
        request = begun.next_segment()
        if len(request.token_ids) > budget:
            return None
        self._begin(sequence, begun, plan)
        return request

    def open_segment(self, sequence: Sequence, before: Segment, budget: int) -> SegmentRequest | None:
        """The longest segment that a sequence may want after one whose output is not known yet; None where it
        can't be told, as behind a forward of diffusion, and where the budget is too small."""
        plan = plan_for(sequence, self._trials.plan(self.active), self._spec)
        request = open_request(before, sequence.num_remaining, sequence.worth, plan.decode, self._spec)
        return request if request is not None and len(request.token_ids) <= budget else None

    def begin_settled(self, sequence: Sequence, before: Segment, segment: Segment) -> SegmentRequest:
        """Begins the round of a segment that was begun to follow `before`, and has come to be this one."""
        plan = plan_for(sequence, self._trials.plan(self.active), self._spec)
        request = request_of(segment)
        begun: Round
        if plan.decode.mode is Mode.AR:
            begun = ArRound(segment.start, segment.token_ids[0])
        else:
            begun = SelfSpeculationRound(segment.start, request)
            sequence.worth.note(before, bool(sequence.draft.token_ids), request.num_causal - 1)
        self._begin(sequence, begun, plan)
        return request

    def _begin(self, sequence: Sequence, begun: Round, plan: ActivePlan) -> None:
        if self._trials.is_tried_by(sequence):
            self._trials.begins(sequence, begun.mode)
        else:
            sequence.note_mode(begun.mode, plan.rule)
        sequence.begin_round(begun, plan.decode)

    def apply(self, sequence: Sequence, request: SegmentRequest, output: SegmentOutput) -> Progress:
        """What a segment's output does to its sequence. One that can't be applied ends it with INTERNAL."""
        failure = output.failure
        if failure is None:
            try:
                return self._apply(sequence, request, output)
            except GrammarFailed as error:
                failure = sequence.failure = failure_of(sequence, error)
            except Exception as error:
                logger.exception("what a step made of request %s can't be applied", sequence.request_id)
                failure = f"the request's tokens can't be taken ({type(error).__name__})"
        return Progress(sequence, error=ErrorCode.INTERNAL, message=failure)

    def _apply(self, sequence: Sequence, request: SegmentRequest, output: SegmentOutput) -> Progress:
        counters, current = self._counters, sequence.round
        if current is None or sequence.is_prefilling:
            if (prefilled := self._apply_chunk(sequence, request, output)) is None:
                return Progress(sequence)
            mode, tokens, logprobs = prefilled
        else:
            progress = current.apply_output(request, output)
            sequence.num_forwards += 1
            sequence.num_rows += len(request.token_ids)
            counters.forwards_by_mode[current.mode] += 1
            mode, tokens, logprobs = current.mode, progress.tokens, progress.logprobs
            if progress.done:
                sequence.num_cached = current.start + progress.num_cached
                sequence.round = request.successor
                sequence.draft = progress.draft
        taken, reason = sequence.append(tokens, mode, self._spec.eos_token_ids)
        if taken:
            counters.made_by_mode[mode] += len(taken)
            # A prompt's token is nobody's yield.
            counters.tokens_by_mode[mode] += len(taken) - (current is None)
        has_ended = current is not None and (sequence.round is not current or reason is not None)
        if has_ended and mode is not Mode.AR:  # what a round of `ar` brings is never in doubt
            made = self._trials.ended(sequence, sequence.end_round())
            if made is not None:
                counters.note_round(made)
        forward = 0 if current is None else sequence.num_forwards
        return Progress(sequence, taken, logprobs[: len(taken)], reason, mode=mode, forward=forward)

    def _apply_chunk(
        self, sequence: Sequence, request: SegmentRequest, output: SegmentOutput
    ) -> tuple[Mode, tuple[int, ...], tuple[TokenLogprob, ...]] | None:
        """Takes a chunk of a prompt. The completion's first tokens, and their mode; None before its end."""
        tokens, logprobs = output.token_ids, output.logprobs(len(output.token_ids))
        if sequence.is_scored:
            if len(tokens) < len(request.wanted):
                raise ValueError("the logits of the prompt are not finite")
            num_scored = min(len(tokens), sequence.num_prompt_tokens - 1 - sequence.num_cached)
            del sequence.prompt_logprobs[sequence.num_cached :]  # from before it was preempted
            sequence.prompt_logprobs += logprobs[:num_scored]
            tokens, logprobs = tokens[num_scored:], logprobs[num_scored:]
        sequence.num_cached += request.num_causal
        self._counters.num_prefilled += request.num_causal
        if not tokens:
            return None
        in_force = plan_for(sequence, self.active, self._spec)
        sequence.note_mode(in_force.decode.mode, in_force.rule)
        decode = plan_for(sequence, self._trials.plan(self.active), self._spec).decode
        if request.successor is not None:
            sequence.begin_round(request.successor, decode, num_coming=1)
            return decode.mode, request.successor.begin(output), logprobs[:1]
        if request.drafts:
            sequence.draft = Draft.behind(request, output)
        return decode.mode, tokens[:1], logprobs[:1]


def mode_of(scheduled: Seq[tuple[Sequence, SegmentRequest]]) -> Mode | None:
    """The mode of nearly all query tokens of rounds; None without rounds, and for a mixture."""
    rows: Counter[Mode] = Counter()
    for sequence, request in scheduled:
        if sequence.round is not None and not sequence.is_prefilling:
            rows[sequence.round.mode] += len(request.token_ids)
    for mode, num_rows in rows.most_common(1):
        if num_rows >= (1.0 - MIXED_SHARE) * rows.total():
            return mode
    return None
