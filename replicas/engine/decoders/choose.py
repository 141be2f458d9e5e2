"""Chooses the plan of a sequence, and the round that it begins at a safe point."""

from policies.modes import DecodePlan, Mode, available_plan, default_plan, lossless_plan
from policies.quality import bounded_plan
from replicas.engine.batch import ModelSpec
from replicas.engine.constrain import with_forced
from replicas.engine.decoders.ar import ArRound
from replicas.engine.decoders.diffusion import Denoising, DiffusionRound
from replicas.engine.decoders.round import NO_DRAFT, Round, SegmentRequest
from replicas.engine.decoders.self_speculation import (
    SelfSpeculationRound,
    masks_behind,
    verify_and_draft,
    with_draft,
)
from replicas.engine.sequence import ActivePlan, Sequence

PINNED_RULE = "request"
MAX_FORCED = 16
"""Forced tokens that a step of AR takes at most."""


def plan_for(sequence: Sequence, active: ActivePlan, spec: ModelSpec) -> ActivePlan:
    """The request's own mode where it pins one, else the active plan within what the request allows.

    A sequence keeps the last, since it is asked for in every step.
    """
    if sequence.planned is None or sequence.planned[0] is not active:
        sequence.planned = (active, _plan_for(sequence, active, spec))
    return sequence.planned[1]


def _plan_for(sequence: Sequence, active: ActivePlan, spec: ModelSpec) -> ActivePlan:
    options = sequence.decoding
    if options.mode is not None:
        base, rule = default_plan(options.mode, spec.risk), PINNED_RULE
    elif sequence.is_kept_lossless:
        base, rule = lossless_plan(active.decode, spec.modes), active.rule
    elif options.max_differing is not None:
        base, rule = bounded_plan(active.decode, sequence.diffusions, spec.modes), active.rule
    else:
        base, rule = available_plan(active.decode, spec.modes), active.rule
    if base.mode is Mode.AR:
        return ActivePlan(base, rule)
    block_length = options.block_length or base.block_length
    bound = (options.threshold, options.factor, options.risk)
    if bound == (None, None, None):
        # A plan may come from where another checkpoint is served.
        bound = (base.threshold, base.factor, None if spec.sampler is None else base.risk)
    return ActivePlan(DecodePlan(base.mode, block_length, *bound), rule)


def begin_round(sequence: Sequence, plan: DecodePlan, spec: ModelSpec, overlaps_blocks: bool) -> Round:
    """A new round of a sequence at a safe point.

    A block never passes the model's context. A draft is cut to what the request may still generate;
    a diffusion block is not, since its length bears on its tokens: a completion of 10 tokens is to be
    the beginning of one of 50.

    overlaps_blocks: blocks of diffusion begin in the forward before.
    """
    start = len(sequence.tokens) - 1
    seed = sequence.tokens[start]
    block_length = min(plan.block_length, spec.max_context - start)
    if plan.mode is Mode.AR:
        most = min(MAX_FORCED, sequence.num_remaining - 1, spec.max_context - start - 1)
        return ArRound(start, seed, with_forced(sequence, NO_DRAFT, most).token_ids)
    assert spec.mask_token_id is not None, "a model without a mask token has only the mode ar"
    if plan.mode is Mode.SELF_SPECULATION:
        eos = frozenset() if sequence.sampling.ignore_eos else spec.eos_token_ids
        draft = with_forced(sequence, sequence.draft, min(block_length, sequence.num_remaining) - 1)
        request = verify_and_draft(seed, draft, block_length, sequence.num_remaining, spec.mask_token_id, eos)
        return SelfSpeculationRound(start, request)
    return _diffusion_round(sequence, plan, spec, start, seed, overlaps_blocks)


def begun_behind_prompt(
    sequence: Sequence, request: SegmentRequest, plan: DecodePlan, spec: ModelSpec, overlaps_blocks: bool
) -> SegmentRequest:
    """The request of a prompt's last tokens with the masks of the first draft, or block, behind them.

    It is the request as it is where the plan has none.
    """
    start, num_left = len(sequence.tokens), sequence.num_remaining
    block_length = min(plan.block_length, spec.max_context - start)
    if plan.mode is Mode.AR or num_left <= 1 or block_length <= 1:
        return request
    assert spec.mask_token_id is not None, "a model without a mask token has only the mode ar"
    if plan.mode is Mode.SELF_SPECULATION:
        return with_draft(request, masks_behind(block_length, num_left, spec.mask_token_id))
    if not overlaps_blocks:
        return request
    return _diffusion_round(sequence, plan, spec, start, None, overlaps_blocks).behind(request)


def _diffusion_round(
    sequence: Sequence,
    plan: DecodePlan,
    spec: ModelSpec,
    start: int,
    seed: int | None,
    overlaps_blocks: bool,
) -> DiffusionRound:
    assert spec.mask_token_id is not None
    block_length = min(plan.block_length, spec.max_context - start)
    sampling = sequence.sampling
    how = Denoising(
        threshold=plan.threshold,
        factor=plan.factor,
        risk=plan.risk,
        sampler=spec.sampler,
        mask_token_id=spec.mask_token_id,
        eos_token_ids=frozenset() if sampling.ignore_eos else spec.eos_token_ids,
        max_steps=sequence.decoding.max_steps or block_length,
        adapter=spec.denoise_with_adapter,
        hides_seed=overlaps_blocks,
        grammar=sequence.grammar,
        tells_logprobs=sampling.logprobs is not None,
        is_penalised=sampling.has_penalties,
    )
    return DiffusionRound(start, seed, block_length, how)


def following_block(sequence: Sequence, active: ActivePlan, spec: ModelSpec) -> int:
    """The length of the block of diffusion that is to follow the one in progress; 0 for none."""
    plan = sequence.round_plan
    if plan is None or plan.mode is not Mode.DIFFUSION:
        return 0
    num_untold = 0 if sequence.round is None else sequence.round.num_untold
    if sequence.num_remaining - num_untold <= 1 or plan_for(sequence, active, spec).decode != plan:
        return 0
    length = min(plan.block_length, spec.max_context - len(sequence.tokens) - num_untold)
    return length if length > 1 else 0
