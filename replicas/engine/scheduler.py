"""Which segments the next forward runs, and what its outputs change. Knows nothing of modes.

A step has a budget of tokens. Rounds in progress come first, the longest unserved before others;
prompts are prefilled in chunks with what is left, at least a reserved share, in the order they came.
When pages run out the youngest sequence gives up its own and is recomputed later; the oldest always
goes on, so something always does.
"""

import time
from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from policies.modes import Mode
from replicas.engine.blocks import ROOT, PagePool
from replicas.engine.decoders.choose import ActivePlan, begin_round, plan_for
from replicas.engine.decoders.round import Ask
from replicas.engine.plan import ModelSpec, Segment, SegmentOutput, StepPlan
from replicas.engine.sequence import Progress, Sequence, Status

PREFILL_SHARE = 4
"""While prompts wait, rounds leave them one in this many tokens of a step."""


@dataclass(frozen=True, slots=True)
class Limits:
    """max_running: sequences in a step. max_step_tokens: query tokens in a step."""

    max_running: int
    max_step_tokens: int


class Scheduler:
    def __init__(
        self,
        spec: ModelSpec,
        limits: Limits,
        active: ActivePlan,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._clock = clock
        self._spec = spec
        self._limits = limits
        self._pool = PagePool(spec.num_pages, spec.page_size)
        self._running: list[Sequence] = []  # in order of admission
        self._waiting: deque[Sequence] = deque()
        self._planned: tuple[Sequence, ...] = ()  # the sequences of the plan under way, aligned with it
        self._num_steps = 0
        self.active = active
        self.num_tokens = 0
        self.tokens_by_mode: Counter[Mode] = Counter()  # by rounds; a prefill's token is nobody's yield
        self.forwards_by_mode: Counter[Mode] = Counter()

    @property
    def running(self) -> Seq[Sequence]:
        return self._running

    @property
    def waiting(self) -> Seq[Sequence]:
        return self._waiting

    @property
    def pages_used(self) -> int:
        return self._pool.num_used

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence at once; its pages are free when this returns."""
        if sequence.status is Status.RUNNING:
            self._running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
        sequence.status = Status.ENDED
        self._release(sequence)

    def schedule(self) -> StepPlan:
        """The next forward; without segments when there is nothing to do."""
        asks = self._pick()
        segments = []
        planned = []
        for sequence in [running for running in self._running if running in asks]:
            if sequence.status is not Status.RUNNING:
                continue  # preempted for an older one, earlier in this loop
            ask = asks[sequence]
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
                    causal=ask.causal,
                    adapter=ask.adapter,
                    wanted=ask.wanted,
                    sampling=sequence.sampling,
                    prompt_len=sequence.num_prompt_tokens,
                    history=tuple(sequence.tokens[:start]) if sequence.sampling.has_penalties else (),
                )
            )
        self._num_steps += 1
        self._planned = tuple(planned)
        return StepPlan(tuple(segments))

    def commit(self, plan: StepPlan, outputs: Seq[SegmentOutput]) -> list[Progress]:
        """Applies the outputs of the plan that schedule() gave last; what is new, by sequence."""
        progress = []
        for sequence, segment, output in zip(self._planned, plan.segments, outputs, strict=True):
            made = self._apply(sequence, segment, output)
            self._keep(sequence)
            if made.ended:
                self.remove(sequence)
            if made.token_ids or made.ended:
                progress.append(made)
        self._planned = ()
        return progress

    def planned(self) -> tuple[Sequence, ...]:
        """The sequences of the plan under way."""
        return self._planned

    def check_integrity(self) -> None:
        """Between steps. Raises AssertionError where the bookkeeping disagrees with itself."""
        self._pool.check_integrity([page for sequence in self._running for page in sequence.pages])
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
        budget = self._limits.max_step_tokens
        prefilling = [sequence for sequence in self._running if sequence.is_prefilling]
        rounds = [sequence for sequence in self._running if not sequence.is_prefilling]
        can_admit = bool(self._waiting) and len(self._running) < self._limits.max_running
        reserved = budget // PREFILL_SHARE if prefilling or can_admit else 0
        asks: dict[Sequence, Ask] = {}
        for sequence in sorted(rounds, key=lambda item: item.last_step):
            ask = self._ask_round(sequence, budget - reserved)
            if ask is not None:
                asks[sequence] = ask
                budget -= len(ask.token_ids)
        for sequence in prefilling:
            if budget > 0:
                asks[sequence] = self._ask_prefill(sequence, budget)
                budget -= len(asks[sequence].token_ids)
        num_promised = 0
        while self._waiting and budget > 0 and len(self._running) < self._limits.max_running:
            sequence = self._waiting[0]
            self._reuse(sequence)
            num_pages = self._pool.pages_for(sequence.prefill_end + 1) - len(sequence.pages)
            if num_promised + num_pages > self._pool.num_free:
                self._release(sequence)
                break
            num_promised += num_pages
            self._waiting.popleft()
            sequence.status = Status.RUNNING
            if sequence.began_s is None:
                sequence.began_s = self._clock()
            self._running.append(sequence)
            if sequence.is_prefilling:
                asks[sequence] = self._ask_prefill(sequence, budget)
                budget -= len(asks[sequence].token_ids)
        return asks

    def _reuse(self, sequence: Sequence) -> None:
        """Gives a sequence about to run the cached pages of its prefix; its first token needs a forward."""
        needed = sequence.prefill_end - (1 if sequence.num_completion_tokens == 0 else 0)
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
            ask = current.ask()
            return ask if len(ask.token_ids) <= budget else None
        plan = plan_for(sequence, self.active, self._spec)
        begun = begin_round(sequence, plan.decode, self._spec)
        ask = begun.ask()
        if len(ask.token_ids) > budget:
            return None
        sequence.round = begun
        sequence.note_mode(begun.mode, plan.rule)
        return ask

    def _ask_prefill(self, sequence: Sequence, budget: int) -> Ask:
        end = min(sequence.prefill_end, sequence.num_cached + budget)
        tokens = tuple(sequence.tokens[sequence.num_cached : end])
        gives_first_token = sequence.num_completion_tokens == 0 and end == len(sequence.tokens)
        wanted = (len(tokens) - 1,) if gives_first_token else ()
        return Ask(tokens, causal=True, adapter=False, wanted=wanted)

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gives the sequence pages for num_tokens, taken from the youngest if need be."""
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
        self._waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.pages)
        sequence.pages = []
        sequence.num_cached = sequence.num_kept = 0
        sequence.key_number = ROOT

    def _apply(self, sequence: Sequence, segment: Segment, output: SegmentOutput) -> Progress:
        current = sequence.round
        if current is None or sequence.is_prefilling:
            sequence.num_cached += len(segment.token_ids)
            if not segment.wanted:
                return Progress(sequence)
            plan = plan_for(sequence, self.active, self._spec)
            sequence.note_mode(plan.decode.mode, plan.rule)
            mode, tokens, logprobs = plan.decode.mode, output.token_ids, output.logprobs(1)
        else:
            advance = current.advance(output)
            sequence.num_forwards += 1
            self.forwards_by_mode[current.mode] += 1
            mode, tokens, logprobs = current.mode, advance.tokens, advance.logprobs
            if advance.done:
                sequence.num_cached = current.start + advance.num_cached
                sequence.round = None
        taken, reason = sequence.append(tokens, mode, self._spec.eos_token_ids)
        self.num_tokens += len(taken)
        if current is not None:
            self.tokens_by_mode[mode] += len(taken)
        return Progress(sequence, taken, logprobs[: len(taken)], reason)
