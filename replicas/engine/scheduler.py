"""Schedules the segments of each forward, and applies its outputs. Knows nothing of modes.

A step has a budget of tokens. Rounds in progress come first, the longest unserved before others; prompts are
prefilled in chunks with what is left, at least a reserved share and, while rounds run, within the bounds on
the streams' delay (engine.prefill). Sequences are ranked by arrival and priority (Sequence.rank): in this
order they are admitted, once pages suffice for a round of each (engine.page_budget), and prefilled. When
pages run out the last of them gives up its own and is recomputed later; the first always goes on.
"""

import time
from bisect import insort
from collections.abc import Callable
from collections.abc import Sequence as Seq

from policies.cost import UNMEASURED
from replicas.config import EngineConfig
from replicas.engine.batch import ModelSpec, ScheduledBatch, Segment, SegmentOutput
from replicas.engine.blocks import PagePool
from replicas.engine.constrain import constrained
from replicas.engine.counters import Counters
from replicas.engine.decoders.choose import ActivePlan
from replicas.engine.decoders.round import SegmentRequest
from replicas.engine.decoding import Decoding, mode_of
from replicas.engine.page_budget import PageBudget
from replicas.engine.prefill import PrefillBudget, is_coming
from replicas.engine.sequence import Progress, Sequence, Status
from replicas.engine.sequence_pages import SequencePages
from replicas.engine.trials import Trials

PREFILL_SHARE = 4
"""One in this many tokens of a step is left to prompts by rounds, while prompts wait."""


class Scheduler:
    def __init__(
        self,
        spec: ModelSpec,
        config: EngineConfig,
        active: ActivePlan,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._clock = clock
        self._spec = spec
        self._config = config
        self._pool = PagePool(spec.num_pages, spec.page_size)
        self._pages = SequencePages(self._pool)
        self._running: list[Sequence] = []  # both by rank
        self._waiting: list[Sequence] = []
        self._scheduled: tuple[tuple[Sequence, SegmentRequest], ...] = ()  # of the batch under way
        self._num_steps = 0
        self.step_cost = UNMEASURED
        """The latency of a forward, by which prompts beside rounds are bounded."""
        self.trials = Trials(config.overlap_blocks)
        self.counters = Counters()
        self.decoding = Decoding(spec, active, config.overlap_blocks, self.trials, self.counters)

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
        insort(self._waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence at once; its pages are free when this returns."""
        if sequence.status is Status.RUNNING:
            self._running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
        sequence.status = Status.ENDED
        self._pages.release(sequence)
        self.trials.removed(sequence)

    def spare_page(self) -> int | None:
        """A page of nobody's, to be written before anything else is scheduled; None where all are taken."""
        pages = self._pool.allocate(1)
        if pages is None:
            return None
        self._pool.release(pages)
        return pages[0]

    def schedule(self) -> ScheduledBatch:
        """The next forward; without segments when there is nothing to do."""
        self.trials.step(self._clock())
        requests = self._pick()
        segments = []
        scheduled = []
        for sequence in [running for running in self._running if running in requests]:
            if sequence.status is not Status.RUNNING:
                continue  # preempted for one before it, earlier in this loop
            request, allowed = constrained(sequence, requests[sequence])
            if sequence.failure is not None:
                continue
            start = sequence.num_cached
            if request.drafts and not self._pages.can_extend(sequence, start + len(request.token_ids)):
                request = request.without_draft()  # a draft is worth no other sequence's pages
            if not self._grow(sequence, start + len(request.token_ids)):
                continue
            self._pages.extend_ahead(sequence, self._num_next(sequence, start, len(request.token_ids)))
            sequence.last_step = self._num_steps
            scheduled.append((sequence, request))
            segments.append(
                Segment(
                    seq_id=sequence.seq_id,
                    start=start,
                    token_ids=request.token_ids,
                    pages=tuple(sequence.pages),
                    num_causal=request.num_causal,
                    adapter=request.adapter,
                    wanted=request.wanted,
                    sampling=sequence.sampling,
                    prompt_len=sequence.num_prompt_tokens,
                    history=sequence.history_for(request),
                    fixed=request.fixed,
                    allowed=allowed,
                )
            )
        self._num_steps += 1
        self._scheduled = tuple(scheduled)
        return ScheduledBatch(tuple(segments), mode=mode_of(scheduled))

    def commit(self, batch: ScheduledBatch, outputs: Seq[SegmentOutput | None]) -> list[Progress]:
        """Applies the outputs of the batch that schedule() gave last; what is new, by sequence.

        A segment that failed, or whose output can't be applied, ends its sequence alone. None: it was not
        run; its sequence is where it was.
        """
        progress = []
        for (sequence, request), output in zip(self._scheduled, outputs, strict=True):
            if output is None:
                continue
            made = self.decoding.apply(sequence, request, output)
            if made.error is not None:
                self._pool.forget(sequence.pages)  # it may be their content that is at fault
            else:
                self._pages.keep(sequence)
            if made.ended:
                self.remove(sequence)
            if made.token_ids or made.ended:
                progress.append(made)
        self._scheduled = ()
        return progress

    def check_integrity(self) -> None:
        """Raises AssertionError where the bookkeeping disagrees with itself. Called between steps."""
        self._pool.check_integrity([page for sequence in self._running for page in sequence.pages])
        assert self._running == sorted(self._running, key=_rank)
        assert self._waiting == sorted(self._waiting, key=_rank)
        assert len(self._running) <= self._config.max_running
        for sequence in self._running:
            assert sequence.status is Status.RUNNING
            assert sequence.num_cached <= len(sequence.pages) * self._spec.page_size
            if sequence.round is None and not sequence.is_prefilling:
                assert sequence.num_cached == len(sequence.tokens) - 1, "not at a safe point"
        for sequence in self._waiting:
            assert sequence.status is Status.WAITING
            assert not sequence.pages

    def _pick(self) -> dict[Sequence, SegmentRequest]:
        """The segments to run within the token budget, pages aside."""
        config = self._config
        budget = config.max_step_tokens
        prefilling = [sequence for sequence in self._running if sequence.is_prefilling]
        rounds = [sequence for sequence in self._running if not sequence.is_prefilling]
        can_admit = bool(self._waiting) and len(self._running) < config.max_running
        reserved = min(budget // PREFILL_SHARE, config.max_prefill_tokens) if prefilling or can_admit else 0
        requests: dict[Sequence, SegmentRequest] = {}
        for sequence in sorted(rounds, key=lambda item: item.last_step):
            request = self.decoding.next_segment(sequence, budget - reserved)
            if request is not None:
                requests[sequence] = request
                budget -= len(request.token_ids)
        prefill = PrefillBudget(config, self.step_cost, budget, requests)
        for sequence in prefilling:
            if (request := self._chunk(sequence, prefill)) is not None:
                requests[sequence] = request
        self._admit(requests, prefill)
        return requests

    def _admit(self, requests: dict[Sequence, SegmentRequest], prefill: PrefillBudget) -> None:
        """Lets waiting sequences run, and adds their first chunks, while the budget and the pages last."""
        pages = PageBudget(self._pool, self._spec, self.decoding.active, self._running)
        for sequence in tuple(self._waiting):
            if prefill.room() <= 0 or len(self._running) == self._config.max_running:
                return
            self._pages.reuse(sequence)
            if not pages.has_room(sequence):
                self._pages.release(sequence)
                return
            if is_coming(sequence, self._running, self._spec.page_size):
                self._pages.release(sequence)
                continue
            pages.promise(sequence)
            self._waiting.remove(sequence)
            sequence.status = Status.RUNNING
            if sequence.began_s is None:
                sequence.began_s = self._clock()
            insort(self._running, sequence, key=_rank)
            if sequence.is_prefilling and (request := self._chunk(sequence, prefill)) is not None:
                requests[sequence] = request

    def _chunk(self, sequence: Sequence, prefill: PrefillBudget) -> SegmentRequest | None:
        """The next chunk of a prompt; the first round begins behind the last one, where there is room."""
        request = prefill.take(sequence)
        if request is None or not request.wanted or sequence.is_scored:
            return request
        begun = self.decoding.behind_prompt(sequence, request)
        num_behind = len(begun.token_ids) - len(request.token_ids)
        return begun if prefill.take_more(num_behind) else request

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gives the sequence pages for num_tokens, taken from the last in rank if need be."""
        while not self._pages.extend(sequence, num_tokens):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _num_next(self, sequence: Sequence, start: int, length: int) -> int:
        """The most tokens that the step after one of so many from start on can need pages for."""
        following = 1 if sequence.is_prefilling else length
        most = min(len(sequence.tokens) + sequence.num_remaining, self._spec.max_context)
        return min(start + length + following, most)

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._pages.release(sequence)
        sequence.num_preemptions += 1
        sequence.status = Status.WAITING
        self.add(sequence)


def _rank(sequence: Sequence) -> tuple[float, int]:
    return sequence.rank
