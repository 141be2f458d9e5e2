"""Schedules the segments of each forward, and applies its outputs. Knows nothing of modes.

A step has a budget of tokens. Rounds in progress come first, the longest unserved before others; prompts are
prefilled in chunks with what is left, at least a reserved share and, while rounds run, within the bounds on
the streams' delay (engine.prefill). Sequences are ranked by arrival and priority (Sequence.rank): in this
order they are admitted, once pages suffice for a round of each (engine.page_budget), and prefilled. When
pages run out the last of them gives up its own and is recomputed later; the first always goes on.

Where the runner runs ahead, a step is scheduled while the one before it runs: which sequences go on is then
an assumption, and where it fails, as where one has ended, its segment alone is of no use. The runner has
begun it by then, so what it writes is written before the next owner of its pages writes them, and it lies
past all that can be found by content.
"""

import time
from bisect import insort
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager

from policies.cost import UNMEASURED
from replicas.config import EngineConfig
from replicas.engine.ahead import next_start, settled
from replicas.engine.batch import ModelSpec, ScheduledBatch, Segment, SegmentOutput
from replicas.engine.blocks import PagePool
from replicas.engine.constrain import constrained
from replicas.engine.counters import Counters
from replicas.engine.decoders.round import SegmentRequest
from replicas.engine.decoding import Decoding, mode_of
from replicas.engine.page_budget import PageBudget
from replicas.engine.prefill import PrefillBudget, is_coming
from replicas.engine.sequence import ActivePlan, Progress, Sequence, Status
from replicas.engine.sequence_pages import SequencePages
from replicas.engine.trials import Trials
from replicas.record import record

PREFILL_SHARE = 4
"""One in this many tokens of a step is left to prompts by rounds, while prompts wait."""


@record
class Scheduled:
    """What one sequence runs in a step."""

    sequence: Sequence
    request: SegmentRequest
    segment: Segment


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
        self._scheduled: list[Scheduled] = []  # of the step under way
        self._ahead: list[Scheduled] = []  # of the one after it, if that is begun already
        self._is_ahead = False  # true where the step under way was
        self._num_steps = self._num_tried = 0
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
        """The next forward, where none is under way; without segments when there is nothing to do."""
        self._scheduled, self._is_ahead = self._compose(None) or [], False
        return _batch_of(self._scheduled)

    def schedule_ahead(self, can_be_followed: Callable[[Segment], bool]) -> ScheduledBatch | None:
        """The forward after the one under way, whose output is not known yet; None where it has to be.

        A sequence whose next segment can't be told is left out of it. Where most are, or pages have to be
        taken from one, nothing is begun.
        """
        decoding = [row for row in self._scheduled if row.request.wanted]
        before = {row.sequence: _segment_before(row, can_be_followed) for row in decoding}
        go_on = [followed for sequence, followed in before.items() if sequence.num_remaining > 1]
        if 2 * go_on.count(None) > len(go_on):
            return None
        with self._chunks_taken():
            self._ahead = self._compose(before) or []
        return _batch_of(self._ahead) if self._ahead else None

    def resume(self) -> ScheduledBatch:
        """The forward that was begun ahead, without the segments of sequences that have ended since."""
        live = [row for row in self._scheduled if row.sequence.status is Status.RUNNING]
        self.counters.num_in_vain += len(self._scheduled) - len(live)
        self._scheduled = live
        return _batch_of(live)

    def drop_ahead(self) -> None:
        """Forgets the step begun ahead: its sequences are where they were."""
        self._ahead = []

    def commit(self, outputs: Seq[SegmentOutput | None]) -> list[Progress]:
        """Applies the outputs of the step under way; what is new, by sequence. The one begun ahead is then
        under way, if there is any.

        A segment that failed, or whose output can't be applied, ends its sequence alone. None: it was not
        run; its sequence is where it was.
        """
        progress = []
        self.counters.num_steps += 1
        self.counters.num_ahead += self._is_ahead
        self.counters.num_segments += len(self._scheduled)
        for row, output in zip(self._scheduled, outputs, strict=True):
            if output is None:
                continue
            made = self.decoding.apply(row.sequence, row.request, output)
            if output.failure is not None or (made.error is not None and row.sequence.failure is None):
                self._pool.forget(row.sequence.pages)  # it may be their content that is at fault
            else:
                self._pages.keep(row.sequence)
            if made.ended:
                self.remove(row.sequence)
            if made.token_ids or made.ended:
                progress.append(made)
        made_by: dict[Sequence, SegmentOutput | None] = {}
        if self._ahead:
            made_by = dict(zip((row.sequence for row in self._scheduled), outputs, strict=True))
        ahead, self._scheduled, self._ahead, self._is_ahead = self._ahead, [], [], True
        for row in ahead:
            came = self._settled(row, made_by.get(row.sequence))
            if came is None:
                self.counters.num_in_vain += 1
            else:
                self._scheduled.append(came)
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

    def _compose(self, before: Mapping[Sequence, Segment | None] | None) -> list[Scheduled] | None:
        """The segments of a step.

        before: of the sequences whose output is still to come the segment to follow, None for none. While
        there is a step under way no pages are taken from any sequence: None where too few are free.
        """
        is_ahead, before = before is not None, before or {}
        if self._num_tried == self._num_steps:
            self.trials.step(self._clock())
            self._num_tried += 1
        requests = self._pick(before)
        scheduled = []
        for sequence in [running for running in self._running if running in requests]:
            if sequence.status is not Status.RUNNING:
                continue  # preempted for one before it, earlier in this loop
            request, followed = requests[sequence], before.get(sequence)
            allowed: tuple[bytes | None, ...] = ()
            start = end = sequence.num_cached
            if followed is None:
                request, allowed = constrained(sequence, request)
                if sequence.failure is not None:
                    continue
            else:
                start = next_start(followed)
                end = start + followed.num_checked - 1
            if request.drafts and not self._pages.can_extend(sequence, end + len(request.token_ids)):
                request = request.without_draft()  # a draft is worth no other sequence's pages
            if is_ahead and not self._pages.extend(sequence, end + len(request.token_ids)):
                return None
            if not self._grow(sequence, end + len(request.token_ids)):
                continue
            segment = Segment(
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
                follows=followed,
            )
            scheduled.append(Scheduled(sequence, request, segment))
        for row in scheduled:
            row.sequence.last_step = self._num_steps
        self._num_steps += 1
        return scheduled

    @contextmanager
    def _chunks_taken(self) -> Iterator[None]:
        """Chunks of prompts that are under way count as cached meanwhile: their tokens are known, and what
        follows them is computed after them."""
        chunks = [row for row in self._scheduled if not row.request.wanted]
        for row in chunks:
            row.sequence.num_cached += row.request.num_causal
        try:
            yield
        finally:
            for row in chunks:
                row.sequence.num_cached -= row.request.num_causal

    def _settled(self, row: Scheduled, output: SegmentOutput | None) -> Scheduled | None:
        """What was begun ahead for a sequence, as it has come to be; None where it is of no use.

        output: of its sequence in the step before
        """
        sequence = row.sequence
        if sequence.status is not Status.RUNNING:
            return None
        before = row.segment.follows
        if before is None:
            return row if row.segment.start == sequence.num_cached else None
        segment = None if output is None else settled(row.segment, output)
        if segment is None or segment.start != sequence.num_cached:
            return None
        return Scheduled(sequence, self.decoding.begin_settled(sequence, before, segment), segment)

    def _pick(self, before: Mapping[Sequence, Segment | None]) -> dict[Sequence, SegmentRequest]:
        """The segments to run within the token budget, pages aside."""
        config = self._config
        budget = config.max_step_tokens
        prefilling: list[Sequence] = []
        rounds: list[Sequence] = []
        for sequence in self._running:
            (prefilling if sequence.is_prefilling and sequence not in before else rounds).append(sequence)
        can_admit = bool(self._waiting) and len(self._running) < config.max_running
        reserved = min(budget // PREFILL_SHARE, config.max_prefill_tokens) if prefilling or can_admit else 0
        requests: dict[Sequence, SegmentRequest] = {}
        for sequence in sorted(rounds, key=lambda item: item.last_step):
            request: SegmentRequest | None = None
            if sequence not in before:
                request = self.decoding.next_segment(sequence, budget - reserved)
            elif (followed := before[sequence]) is not None:
                request = self.decoding.open_segment(sequence, followed, budget - reserved)
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

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._pages.release(sequence)
        sequence.num_preemptions += 1
        sequence.status = Status.WAITING
        self.add(sequence)


def _rank(sequence: Sequence) -> tuple[float, int]:
    return sequence.rank


def _batch_of(scheduled: Seq[Scheduled]) -> ScheduledBatch:
    mode = mode_of([(row.sequence, row.request) for row in scheduled])
    return ScheduledBatch(tuple(row.segment for row in scheduled), mode)


def _segment_before(row: Scheduled, can_be_followed: Callable[[Segment], bool]) -> Segment | None:
    """The segment of the step under way, if its sequence's next one can follow it unseen."""
    gives_seed = row.segment.num_checked > 0 and row.request.successor is None
    return row.segment if gives_seed and can_be_followed(row.segment) else None
