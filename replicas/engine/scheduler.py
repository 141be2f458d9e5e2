"""Which segments the next forward runs, and what its outputs change. Knows nothing of modes.

A step has a budget of tokens. Rounds in progress come first, the longest unserved before others;
prompts are prefilled in chunks with what is left, at least a reserved share and, while rounds run,
within the bounds on the streams' delay (engine.prefill). Sequences are ranked by arrival and priority
(Sequence.rank): in this order they are admitted and prefilled. When pages run out the last of them gives
up its own and is recomputed later; the first always goes on, so something always does.
"""

import logging
import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as Seq

from policies.cost import UNMEASURED, RoundMade
from policies.modes import DecodePlan, Mode
from policies.policy import Probes
from replicas.engine.blocks import ROOT, PagePool
from replicas.engine.constrain import constrained
from replicas.engine.decoders.choose import ActivePlan, begin_round, following_block, plan_for
from replicas.engine.decoders.round import Ask, Round
from replicas.engine.plan import ModelSpec, Segment, SegmentOutput, StepPlan
from replicas.engine.prefill import Limits, PrefillBudget, is_coming, reusable_len
from replicas.engine.sequence import Progress, Sequence, Status
from replicas.errors import ErrorCode

logger = logging.getLogger(__name__)

MAX_ROUNDS_KEPT = 1024
MAX_PROBE_CREDIT = 4.0

PREFILL_SHARE = 4
"""While prompts wait, rounds leave them one in this many tokens of a step."""


class Scheduler:
    def __init__(
        self,
        spec: ModelSpec,
        limits: Limits,
        active: ActivePlan,
        clock: Callable[[], float] = time.monotonic,
        overlaps_blocks: bool = True,
    ):
        """overlaps_blocks: a block of diffusion is begun in the forward that commits the one before, where
        the model denoises without adapter, as it commits."""
        self._clock = clock
        self._overlaps_blocks = overlaps_blocks and not spec.denoise_with_adapter
        self._spec = spec
        self.step_cost = UNMEASURED  # of a forward; it bounds prompts beside rounds
        self._limits = limits
        self._pool = PagePool(spec.num_pages, spec.page_size)
        self._running: list[Sequence] = []  # both by rank
        self._waiting: list[Sequence] = []
        self._planned: tuple[Sequence, ...] = ()  # the sequences of the plan under way, aligned with it
        self._num_steps = 0
        self._probe_credit = 0.0  # forwards that may go into trying
        self._num_probes = 0
        self._is_probing = False  # some sequence's round tries a plan
        self.active = active
        self.probes: Probes | None = None
        """Plans that rounds of `auto` sequences try now and then, whatever the active one."""
        self.made_by_mode: Counter[Mode] = Counter()  # all tokens, by the mode that a prefill's goes on in
        self.tokens_by_mode: Counter[Mode] = Counter()  # by rounds; a prefill's token is nobody's yield
        self.forwards_by_mode: Counter[Mode] = Counter()
        self.num_prefilled = 0
        self.rounds: deque[RoundMade] = deque(maxlen=MAX_ROUNDS_KEPT)
        """The last blocks' outcomes, for whoever learns from them to take; safe from another thread."""

    @property
    def running(self) -> Seq[Sequence]:
        return self._running

    @property
    def waiting(self) -> Seq[Sequence]:
        return self._waiting

    @property
    def num_tokens(self) -> int:
        """All tokens made so far."""
        return self.made_by_mode.total()

    @property
    def pages_used(self) -> int:
        return self._pool.num_used

    def add(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence at once; its pages are free when this returns."""
        if sequence.status is Status.RUNNING:
            self._running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
        sequence.status = Status.ENDED
        self._release(sequence)
        if self._is_probing and sequence.tries_plan:
            # With the last of them the trial is over, though it has brought nothing.
            self._is_probing = any(other.tries_plan for other in (*self._running, *self._waiting))

    def spare_page(self) -> int | None:
        """A page of nobody's, to be written before anything else is planned; None where all are taken."""
        pages = self._pool.allocate(1)
        if pages is None:
            return None
        self._pool.release(pages)
        return pages[0]

    def schedule(self) -> StepPlan:
        """The next forward; without segments when there is nothing to do."""
        asks = self._pick()
        segments = []
        planned = []
        for sequence in [running for running in self._running if running in asks]:
            if sequence.status is not Status.RUNNING:
                continue  # preempted for one before it, earlier in this loop
            ask, allowed = constrained(sequence, asks[sequence])
            if sequence.failure is not None:
                continue
            start = sequence.num_cached
            if not self._grow(sequence, start + len(ask.token_ids)):
                continue
            sequence.last_step = self._num_steps
            planned.append(sequence)
            segments.append(
                Segment(
                    seq_id=sequence.seq_id,
                    start=start,
                    token_ids=ask.token_ids,
                    pages=tuple(sequence.pages),
                    num_causal=ask.num_causal,
                    adapter=ask.adapter,
                    wanted=ask.wanted,
                    sampling=sequence.sampling,
                    prompt_len=sequence.num_prompt_tokens,
                    history=tuple(sequence.tokens[:start]) if sequence.sampling.has_penalties else (),
                    allowed=allowed,
                )
            )
        if self.probes is not None and planned:
            self._account_for_probes(self.probes.share, planned)
        self._num_steps += 1
        self._planned = tuple(planned)
        return StepPlan(tuple(segments))

    def commit(self, plan: StepPlan, outputs: Seq[SegmentOutput | None]) -> list[Progress]:
        """Applies the outputs of the plan that schedule() gave last; what is new, by sequence.

        A segment that failed, or whose output can't be applied, ends its sequence alone. None: it was not
        run; its sequence is where it was.
        """
        progress = []
        for sequence, segment, output in zip(self._planned, plan.segments, outputs, strict=True):
            if output is None:
                continue
            made = self._applied(sequence, segment, output)
            if made.error is not None:
                self._pool.forget(sequence.pages)  # it may be their content that is at fault
            else:
                self._keep(sequence)
            if made.ended:
                self.remove(sequence)
            if made.token_ids or made.ended:
                progress.append(made)
        self._planned = ()
        return progress

    def decoding(self) -> tuple[Mode | None, bool]:
        """Of the plan under way: the mode of most sequences that decode, and whether any tries a plan."""
        rounds = [s for s in self._planned if s.round is not None and not s.is_prefilling]
        modes = Counter(sequence.round.mode for sequence in rounds if sequence.round is not None)
        is_trial = any(sequence.is_probing for sequence in rounds)
        return (modes.most_common(1)[0][0] if modes else None), is_trial

    def check_integrity(self) -> None:
        """Between steps. Raises AssertionError where the bookkeeping disagrees with itself."""
        self._pool.check_integrity([page for sequence in self._running for page in sequence.pages])
        assert self._running == sorted(self._running, key=_rank)
        assert self._waiting == sorted(self._waiting, key=_rank)
        assert len(self._running) <= self._limits.max_running
        for sequence in self._running:
            assert sequence.status is Status.RUNNING
            assert sequence.num_cached <= len(sequence.pages) * self._spec.page_size
            if sequence.round is None and not sequence.is_prefilling:
                assert sequence.num_cached == len(sequence.tokens) - 1, "not at a safe point"
        for sequence in self._waiting:
            assert sequence.status is Status.WAITING
            assert not sequence.pages

    def _pick(self) -> dict[Sequence, Ask]:
        """What to run within the token budget, pages aside."""
        limits = self._limits
        budget = limits.max_step_tokens
        prefilling = [sequence for sequence in self._running if sequence.is_prefilling]
        rounds = [sequence for sequence in self._running if not sequence.is_prefilling]
        can_admit = bool(self._waiting) and len(self._running) < limits.max_running
        reserved = min(budget // PREFILL_SHARE, limits.max_prefill_tokens) if prefilling or can_admit else 0
        asks: dict[Sequence, Ask] = {}
        for sequence in sorted(rounds, key=lambda item: item.last_step):
            ask = self._ask_round(sequence, budget - reserved)
            if ask is not None:
                asks[sequence] = ask
                budget -= len(ask.token_ids)
        prefill = PrefillBudget(limits, self.step_cost, budget, asks)
        for sequence in prefilling:
            if (ask := prefill.ask(sequence)) is not None:
                asks[sequence] = ask
        self._admit(asks, prefill)
        return asks

    def _admit(self, asks: dict[Sequence, Ask], prefill: PrefillBudget) -> None:
        """Lets waiting sequences run, and adds what they ask, while the budget and the pages last."""
        num_promised = 0
        for sequence in tuple(self._waiting):
            if prefill.room() <= 0 or len(self._running) == self._limits.max_running:
                return
            self._reuse(sequence)
            num_pages = self._pool.pages_for(sequence.prefill_end + 1) - len(sequence.pages)
            if num_promised + num_pages > self._pool.num_free:
                self._release(sequence)
                return
            if is_coming(sequence, self._running, self._spec.page_size):
                self._release(sequence)
                continue
            num_promised += num_pages
            self._waiting.remove(sequence)
            sequence.status = Status.RUNNING
            if sequence.began_s is None:
                sequence.began_s = self._clock()
            insort(self._running, sequence, key=_rank)
            if sequence.is_prefilling and (ask := prefill.ask(sequence)) is not None:
                asks[sequence] = ask

    def _reuse(self, sequence: Sequence) -> None:
        """Gives a sequence about to run the cached pages of its prefix; its first token needs a forward."""
        needed = reusable_len(sequence)
        sequence.pages, sequence.key_number = self._pool.find(sequence.tokens[:needed])
        sequence.num_kept = len(sequence.pages)
        sequence.num_cached = sequence.num_kept * self._spec.page_size
        if sequence.num_completion_tokens == 0:
            sequence.num_reused = sequence.num_cached

    def _keep(self, sequence: Sequence) -> None:
        """Makes pages findable that have become full of committed K/V."""
        size = self._spec.page_size
        # A sequence that ends inside an accepted draft has K/V cached for tokens it did not take.
        num_tokens = min(sequence.num_cached, len(sequence.tokens))
        while (end := (sequence.num_kept + 1) * size) <= num_tokens:
            tokens = tuple(sequence.tokens[end - size : end])
            page = sequence.pages[sequence.num_kept]
            sequence.key_number = self._pool.keep(page, sequence.key_number, tokens)
            sequence.num_kept += 1

    def _ask_round(self, sequence: Sequence, budget: int) -> Ask | None:
        """None when the budget is too small for it; it then begins its round another time."""
        current = sequence.round
        if current is not None:
            ask = self._ask(sequence, current)
            return ask if len(ask.token_ids) <= budget else None
        plan = plan_for(sequence, self.active, self._spec)
        probe = self._probe_for(sequence)
        decode = plan.decode if probe is None else probe
        begun = begin_round(sequence, decode, self._spec)
        ask = begun.ask()
        if len(ask.token_ids) > budget:
            return None
        sequence.begin_round(begun, decode, probe is not None)
        self._is_probing |= probe is not None
        if probe is None:
            sequence.note_mode(begun.mode, plan.rule)
        return ask

    def _ask(self, sequence: Sequence, current: Round) -> Ask:
        if not self._overlaps_blocks or self._probe_for(sequence) is not None:
            return current.ask()
        return current.ask(following_block(sequence, self.active, self._spec))

    def _probe_for(self, sequence: Sequence) -> DecodePlan | None:
        """The plan to try, where it is time to and the request may run it.

        All sequences that begin a round before the first such one has ended try it, so that it is seen
        as it would be in force: with all of them in it.
        """
        if self.probes is None or (self._probe_credit < 1.0 and not self._is_probing):
            return None
        decode = self.probes.plans[self._num_probes % len(self.probes.plans)]
        if sequence.decoding.mode is not None:
            return None
        if plan_for(sequence, ActivePlan(decode, ""), self._spec).decode != decode:
            return None
        return decode

    def _account_for_probes(self, share: float, planned: Seq[Sequence]) -> None:
        """A share of the forwards may go into trying; a plan that takes more delays the next."""
        self._probe_credit = min(self._probe_credit + share, MAX_PROBE_CREDIT)
        if any(sequence.is_probing for sequence in planned):
            self._probe_credit -= 1.0

    def _note_round(self, sequence: Sequence) -> None:
        made = sequence.round_made()
        if sequence.is_probing and made.plan.mode is Mode.DIFFUSION and self._overlaps_blocks:
            # In force it would have been begun in the commit before.
            made = made._replace(forwards=max(1, made.forwards - 1))
        if made.plan.mode is not Mode.AR:
            self.rounds.append(made)
        if sequence.is_probing and self._is_probing:
            self._is_probing = False
            self._num_probes += 1

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gives the sequence pages for num_tokens, taken from the last in rank if need be."""
        missing = self._pool.pages_for(num_tokens) - len(sequence.pages)
        if missing <= 0:
            return True
        while (pages := self._pool.allocate(missing)) is None:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.pages.extend(pages)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        sequence.num_preemptions += 1
        sequence.status = Status.WAITING
        self.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.pages)
        sequence.pages = []
        sequence.num_cached = sequence.num_kept = 0
        sequence.key_number = ROOT

    def _applied(self, sequence: Sequence, segment: Segment, output: SegmentOutput) -> Progress:
        failure = output.failure
        if failure is None:
            try:
                return self._apply(sequence, segment, output)
            except Exception as error:
                logger.exception("what a step made of request %s can't be applied", sequence.request_id)
                failure = f"the request's tokens can't be taken ({type(error).__name__})"
        return Progress(sequence, error=ErrorCode.INTERNAL, message=failure)

    def _apply(self, sequence: Sequence, segment: Segment, output: SegmentOutput) -> Progress:
        current = sequence.round
        if current is None or sequence.is_prefilling:
            sequence.num_cached += len(segment.token_ids)
            self.num_prefilled += len(segment.token_ids)
            if not segment.wanted:
                return Progress(sequence)
            plan = plan_for(sequence, self.active, self._spec)
            sequence.note_mode(plan.decode.mode, plan.rule)
            mode, tokens, logprobs = plan.decode.mode, output.token_ids, output.logprobs(1)
        else:
            advance = current.advance(output)
            sequence.num_forwards += 1
            sequence.num_rows += len(segment.token_ids)
            self.forwards_by_mode[current.mode] += 1
            mode, tokens, logprobs = current.mode, advance.tokens, advance.logprobs
            if advance.done:
                sequence.num_cached = current.start + advance.num_cached
                sequence.round = advance.successor
        taken, reason = sequence.append(tokens, mode, self._spec.eos_token_ids)
        if taken:
            self.made_by_mode[mode] += len(taken)
        if current is not None:
            self.tokens_by_mode[mode] += len(taken)
            if sequence.round is not current or reason is not None:
                self._note_round(sequence)
                sequence.note_next_round()
        return Progress(sequence, taken, logprobs[: len(taken)], reason)


def _rank(sequence: Sequence) -> tuple[float, int]:
    return sequence.rank
