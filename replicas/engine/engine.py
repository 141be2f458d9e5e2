"""The engine: sequences in, tokens out, one forward a step. No torch, no text, no threads.

Not thread-safe: one thread calls all of it. Other threads reach it through replicas.engine_thread.
"""

import time
from collections import Counter, deque
from collections.abc import Callable

from policies.cost import ForwardStats, RoundYield, StepCost
from policies.modes import DecodePlan, Mode
from policies.policy import Trial
from policies.quality import plans_within
from policies.replica_load import ReplicaLoad
from policies.turnarounds import Turnarounds
from replicas.config import EngineConfig
from replicas.engine.batch import Runner, ScheduledBatch
from replicas.engine.forwards import Forwards
from replicas.engine.grammar import Grammar
from replicas.engine.lengths import CompletionLengths
from replicas.engine.scheduler import Scheduler
from replicas.engine.sequence import ActivePlan, Progress, Sequence, Status, Text
from replicas.errors import ErrorCode, TriadError, context_exceeded
from replicas.messages import DecodingOptions, FinishReason, SamplingParams

AUTO = DecodingOptions()
PRIORITY_S = 10.0
"""A request ranks as if it had come this much earlier for each level of priority below 0."""
MAX_FORWARDS_KEPT = 256
REMEMBERED_S = 0.1


class Engine:
    """Runs requests, many at a time.

    clock: seconds, for the requests' deadlines and the forwards' latencies

    Raises ValueError when the pool can't hold one sequence of full context.
    """

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig = EngineConfig(),  # noqa: B008
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        spec = runner.spec
        if spec.num_pages * spec.page_size < spec.max_context:
            raise ValueError(
                f"{spec.num_pages} pages of {spec.page_size} tokens can't hold one sequence of "
                f"{spec.max_context}: raise kv_cache_mb or lower max_context"
            )
        self.spec = spec
        self._config = config
        self._clock = clock
        self._sequences: dict[str, Sequence] = {}
        self._num_submitted = 0
        self._lengths = CompletionLengths()
        self._turnarounds = Turnarounds()
        self._yields: tuple[RoundYield, ...] = ()
        self._cycle: tuple[float, ScheduledBatch] | None = None  # when the last forward's step began
        self._remaining: float | None = None
        self._remaining_s = 0.0
        self.forwards: deque[ForwardStats] = deque(maxlen=MAX_FORWARDS_KEPT)
        """The last steps' forwards, for whoever learns from them to take; safe from another thread."""
        self._scheduler = Scheduler(
            spec,
            config,
            ActivePlan(DecodePlan(Mode.AR), "start"),
            clock,
        )
        self._forwards = Forwards(runner, self._scheduler)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def capacity(self) -> int:
        """Sequences it holds at most, running or waiting."""
        return self._config.max_running + self._config.max_waiting

    @property
    def active_plan(self) -> ActivePlan:
        return self._scheduler.decoding.active

    @property
    def scheduler(self) -> Scheduler:
        return self._scheduler

    def set_step_cost(self, cost: StepCost) -> None:
        """Sets the cost of a forward here, by which chunks of prompts are sized."""
        self._scheduler.step_cost = cost

    def set_yields(self, yields: tuple[RoundYield, ...]) -> None:
        """Sets what was measured of the checkpoint's plans, by which later requests' bounds on quality are
        kept."""
        self._yields = yields

    def set_plan(self, decode: DecodePlan, rule: str) -> None:
        """Sets the plan that `auto` sequences follow from their next safe point on."""
        self._scheduler.decoding.active = ActivePlan(decode, rule)
        self._scheduler.trials.stop()

    def set_trial(self, trial: Trial | None) -> None:
        """Sets the trial that `auto` sequences make next."""
        self._scheduler.trials.wanted = trial

    def submit(
        self,
        request_id: str,
        prompt_ids: list[int],
        sampling: SamplingParams,
        decoding: DecodingOptions = AUTO,
        timeout_s: float | None = None,
        priority: int = 0,
        grammar: Grammar | None = None,
        text: Text | None = None,
        cache_salt: str = "",
    ) -> Sequence:
        """Queues a request. TriadError when it can't be served as it stands, or the queue is full.

        text: follows its completion from the beginning on, and says where a stop string ends it.
        cache_salt: its prompt's pages are shared with requests of the same one alone.
        grammar: follows sampling's response_format or tools from its beginning on; the sequence owns it from
            here on.
        priority: lower goes first. A level is worth PRIORITY_S of waiting, so nobody waits for ever.
        """
        self._check(request_id, prompt_ids, sampling, decoding)
        now_s = self._clock()
        left = self.spec.max_context - len(prompt_ids)
        bound = decoding.max_differing
        max_tokens = left if sampling.max_tokens is None else min(sampling.max_tokens, left)
        sequence = Sequence(
            seq_id=self._num_submitted,
            request_id=request_id,
            tokens=list(prompt_ids),
            max_tokens=max_tokens,
            sampling=sampling,
            decoding=decoding,
            diffusions=() if bound is None else plans_within(bound, self._yields),
            deadline_s=None if timeout_s is None else now_s + timeout_s,
            rank=(now_s + PRIORITY_S * priority, self._num_submitted),
            grammar=grammar,
            text=text,
            cache_salt=cache_salt,
        )
        self._num_submitted += 1
        self._sequences[request_id] = sequence
        self._turnarounds.arrived(now_s)
        self._scheduler.add(sequence)
        return sequence

    def cancel(self, request_id: str) -> Sequence | None:
        """Ends a request at once, pages and all; None when it has ended already."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._scheduler.remove(sequence)
            self._note_silence()
        return sequence

    def step(self) -> list[Progress]:
        """Runs one step: schedule, forward, commit. Returns what is new, by sequence; each ends exactly once.

        Where the runner runs ahead, the next step is scheduled and begun before this one's forward is over.

        Raises RunnerLost.
        """
        began_s = self._clock()
        self._note_cycle(began_s)
        expired = self._expire()
        batch = self._forwards.schedule()
        ended = expired + self._end_failed()
        if not batch.segments:
            return ended
        outputs, is_one_forward = self._forwards.run(batch)
        progress = self._scheduler.commit(outputs)
        if is_one_forward:
            self._cycle = (began_s, batch)
        for made in progress:
            if made.ended:
                del self._sequences[made.sequence.request_id]
                self._turnarounds.ended(self._clock())
            if made.reason is not None and made.sequence.num_completion_tokens:
                self._lengths.note(made.sequence.num_completion_tokens, made.reason is FinishReason.STOP)
        progress += self._end_failed()  # in the step begun ahead: what was under way of them is committed
        self._note_silence()
        return ended + progress

    def _check(
        self, request_id: str, prompt_ids: list[int], sampling: SamplingParams, decoding: DecodingOptions
    ) -> None:
        context = self.spec.max_context
        if request_id in self._sequences:
            raise TriadError(ErrorCode.INVALID_REQUEST, f"a request {request_id!r} is running already")
        if not prompt_ids:
            raise TriadError(
                ErrorCode.INVALID_REQUEST, "the prompt is empty; give at least one token", "prompt"
            )
        self._check_vocabulary("prompt", prompt_ids)
        if self.spec.mask_token_id is not None and self.spec.mask_token_id in prompt_ids:
            message = f"token id {self.spec.mask_token_id} is the mask of diffusion, which no prompt may have"
            raise TriadError(ErrorCode.INVALID_REQUEST, message, "prompt")
        self._check_vocabulary("logit_bias", [token for token, _ in sampling.logit_bias])
        self._check_vocabulary("stop_token_ids", list(sampling.stop_token_ids))
        if sampling.max_tokens is not None and sampling.max_tokens < 0:
            raise TriadError(ErrorCode.INVALID_REQUEST, "max_tokens must be at least 0", "max_tokens")
        if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
            raise TriadError(ErrorCode.INVALID_REQUEST, "min_tokens is above max_tokens", "min_tokens")
        if sampling.needs_grammar and (
            sampling.ignore_eos or (sampling.min_tokens and sampling.form_decides_on_end)
        ):
            field = "ignore_eos" if sampling.ignore_eos else "min_tokens"
            decider = "a form of the answer" if sampling.tools is None else "tools"
            message = f"{field} does not go with {decider}, which decides on the end; leave it out"
            raise TriadError(ErrorCode.INVALID_REQUEST, message, field)
        if len(prompt_ids) >= context:
            raise context_exceeded(context, f"has {len(prompt_ids)} input tokens", "prompt")
        if decoding.mode is not None and decoding.mode not in self.spec.modes:
            raise TriadError(
                ErrorCode.INVALID_REQUEST,
                f"this model has no mode {decoding.mode}; it has {', '.join(self.spec.modes)}",
                "decoding.mode",
            )
        if decoding.risk is not None and self.spec.sampler is None:
            raise TriadError(
                ErrorCode.INVALID_REQUEST,
                "this model has no learned sampler, so a risk means nothing; give a factor or a threshold",
                "decoding.risk",
            )
        if len(self._sequences) >= self.capacity:
            raise TriadError(
                ErrorCode.QUEUE_FULL,
                f"the replica's queue of {self._config.max_waiting} requests is full; retry later",
            )

    def _check_vocabulary(self, param: str, token_ids: list[int]) -> None:
        vocab_size = self.spec.vocab_size
        for token in token_ids:
            if not 0 <= token < vocab_size:
                message = f"token id {token} is not in the vocabulary of {vocab_size}"
                raise TriadError(ErrorCode.INVALID_REQUEST, message, param)

    def _expire(self) -> list[Progress]:
        now_s = self._clock()
        late = [
            sequence
            for sequence in self._sequences.values()
            if sequence.deadline_s is not None and sequence.deadline_s <= now_s
        ]
        for sequence in late:
            self.cancel(sequence.request_id)
        message = "the request's time is up"
        return [Progress(sequence, error=ErrorCode.DEADLINE_EXCEEDED, message=message) for sequence in late]

    def _end_failed(self) -> list[Progress]:
        """Ends the sequences that could not go on when the step was scheduled."""
        failed = [sequence for sequence in self._scheduler.running if sequence.failure is not None]
        for sequence in failed:
            self.cancel(sequence.request_id)
        code = ErrorCode.INTERNAL
        return [Progress(sequence, error=code, message=sequence.failure or "") for sequence in failed]

    def _note_cycle(self, now_s: float) -> None:
        """Ends the cycle of the last forward: what is done until the next begins is a part of its cost."""
        if self._cycle is not None:
            (began_s, batch), self._cycle = self._cycle, None
            num_cached = sum(segment.start for segment in batch.segments)
            shape = (batch.num_tokens, len(batch.segments), num_cached)
            self.forwards.append(ForwardStats(*shape, 1000.0 * (now_s - began_s), batch.mode))

    def _note_silence(self) -> None:
        """Ends the cycle of the last forward where no other follows: silence is no part of its cost."""
        if not self.has_work:
            now_s = self._clock()
            self._note_cycle(now_s)
            self._scheduler.trials.fell_silent(now_s)

    def _mean_remaining(self) -> float | None:
        """The mean of what running sequences are still expected to generate, REMEMBERED_S old at most.

        The load is read after each step, and published less often.
        """
        running, now_s = self._scheduler.running, self._clock()
        if not running:
            self._remaining = None
        elif self._remaining is None or now_s - self._remaining_s > REMEMBERED_S:
            remaining = self._lengths.remaining
            total = sum(remaining(s.num_completion_tokens, s.num_remaining) for s in running)
            self._remaining, self._remaining_s = total / len(running), now_s
        return self._remaining

    def snapshot(self, replica_id: str) -> ReplicaLoad:
        """The load now, rates and costs left out: they are replicas.stats' to measure."""
        running, waiting = self._scheduler.running, self._scheduler.waiting
        auto = [sequence for sequence in self._sequences.values() if sequence.decoding.mode is None]
        pinned = Counter(s.decoding.mode for s in self._sequences.values() if s.decoding.mode is not None)
        num_running = max(1, len(running))
        return ReplicaLoad(
            replica_id=replica_id,
            num_running=len(running),
            num_waiting=len(waiting),
            num_auto=len(auto),
            max_running=self._config.max_running,
            pages_used=self._scheduler.pages_used,
            num_pages=self.spec.num_pages,
            waiting_prompt_tokens=sum(sequence.num_prompt_tokens for sequence in waiting),
            running_by_mode=Counter(sequence.last_mode for sequence in running if sequence.last_mode),
            modes=self.spec.modes,
            decode=self._scheduler.decoding.active.decode,
            num_lossless=sum(sequence.is_kept_lossless for sequence in auto),
            pinned_by_mode=pinned,
            page_size=self.spec.page_size,
            max_step_tokens=self._config.max_step_tokens,
            mean_context=sum(sequence.num_cached for sequence in running) / num_running,
            mean_remaining=self._mean_remaining(),
            mean_completion=self._lengths.mean,
            num_ended=self._num_submitted - len(self._sequences),
            num_between=self._turnarounds.num_between(self._clock()),
            turnaround_s=self._turnarounds.mean_s,
            risk=self.spec.risk,
            host_s=self.host_s,
        )

    @property
    def host_s(self) -> float:
        """CPU seconds that the thread of the steps has taken beside forwards."""
        return self._forwards.host_time.seconds

    def check_integrity(self) -> None:
        """Raises AssertionError where the bookkeeping disagrees with itself. Called between steps."""
        self._scheduler.check_integrity()
        held = [*self._scheduler.running, *self._scheduler.waiting]
        assert {sequence.request_id for sequence in held} == set(self._sequences)
        assert all(sequence.status is not Status.ENDED for sequence in held)
