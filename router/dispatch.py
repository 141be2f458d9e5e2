"""Sends requests to replicas: admits each, places it, and where the chosen one refuses, places it again."""

import random
import sys
import time
from collections.abc import Collection

from policies.control.loop import Clock
from replicas.errors import ErrorCode, TriadError
from replicas.messages import Accepted, Finished, GenerateRequest, ModelInfo
from replicas.token_messages import Tokenized, TokenRequest
from router.admission_control import Admission, AdmissionControl, Shed
from router.connections import DISCOVERY_PERIOD_S, ReplicaConnections
from router.errors import Overloaded, raise_if_shed
from router.inbox import Inbox
from router.load_view import LoadView
from router.placement import place
from router.prompt_estimator import PromptEstimator, check_fits
from router.replica_connection import ConnectionTimes, Directory, ReplicaConnection, ReplicaLost

MAX_UNSURE = 16
"""Prompts that by the estimate don't fit, sent off by this router and not yet read by a replica, for each
replica that can be reached: reading them takes time from the others."""

_ELSEWHERE = frozenset({ErrorCode.UNAVAILABLE, ErrorCode.QUEUE_FULL})
"""Refusals for which another replica may have a better answer."""


class Dispatcher:
    """Sends requests to replicas, on one event loop; run() finds the replicas and keeps a connection to each.

    directory: the replicas that run. view: their load. router.generation sends requests by `place`.
    """

    def __init__(
        self,
        directory: Directory,
        view: LoadView,
        admission: AdmissionControl,
        *,
        times: ConnectionTimes | None = None,
        discovery_period_s: float = DISCOVERY_PERIOD_S,
        rng: random.Random | None = None,
        clock: Clock = time.monotonic,
    ):
        self._view = view
        self._admission = admission
        self._rng = rng or random.Random()
        self._clock = clock
        self._traffic = admission.traffic
        self._estimator = PromptEstimator()
        self._connections = ReplicaConnections(
            directory,
            self._traffic,
            self._estimator.forget,
            times=times or ConnectionTimes(),
            discovery_period_s=discovery_period_s,
            clock=clock,
        )
        self._num_unsure = 0
        self._draining = False

    @property
    def ready(self) -> bool:
        """True while a replica can take a request and new ones are wanted."""
        return not self._draining and self._connections.any_open

    @property
    def is_draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        """Refuses new requests from now on; those that are here go on."""
        self._draining = True

    def check_room(self) -> None:
        """Raises TriadError where no request is taken, whatever it asks: while draining, and while all
        places are taken. `place` checks again, with the request's size."""
        if self._draining:
            raise TriadError(ErrorCode.UNAVAILABLE, "The server is shutting down.")
        verdict = self._verdict()
        if isinstance(verdict, Shed) and verdict.contended:
            raise_if_shed(verdict)

    @property
    def model(self) -> ModelInfo | None:
        """The model that the replicas serve; None until a replica has been seen."""
        return self._connections.model

    @property
    def num_in_flight(self) -> int:
        """This router's own choices that run or wait, of all requests."""
        return self._traffic.num_in_flight

    def in_flight(self) -> dict[str, int]:
        """This router's own requests, by replica, however many choices they have."""
        return self._connections.in_flight()

    async def run(self) -> None:
        """Runs until cancelled; then every request still here fails."""
        await self._connections.run()

    async def place(
        self, request: GenerateRequest, avoid: set[str], is_admitted: bool = False
    ) -> tuple[ReplicaConnection, Accepted, Inbox]:
        """Sends a request to the best replica that takes it. Adds those that refuse or fail to `avoid`.

        is_admitted: it has been let in before, and its replica was lost. Raises TriadError when none takes
        it, ReplicaLost or INTERNAL at the first that fails.
        """
        self._check_size(request)
        max_context = sys.maxsize if self.model is None else self.model.max_context
        lens = self._estimator.prompt_lens(request, max_context)
        num_tokens = sum(lens)
        is_sure = max(lens) <= max_context
        if not is_admitted:
            raise_if_shed(self._verdict(request.num_indices, num_tokens, request.timeout_s))
            if not is_sure and self._num_unsure >= MAX_UNSURE * len(self._connections.usable()):
                message = "Too many prompts that may not fit the context are being read; try again in 1 s."
                raise Overloaded(ErrorCode.QUEUE_FULL, message, 1)
        self._num_unsure += not is_sure
        try:
            return await self._send(request, avoid, num_tokens, is_sure)
        finally:
            self._num_unsure -= not is_sure

    async def _send(
        self, request: GenerateRequest, avoid: set[str], num_tokens: int, is_sure: bool
    ) -> tuple[ReplicaConnection, Accepted, Inbox]:
        keys = self._estimator.keys(request)
        refusal: TriadError | None = None
        while True:
            now_s = self._clock()
            usable = self._connections.usable(avoid)
            wanted = self._estimator.placement_request(request, keys, num_tokens, now_s)
            chosen = place(usable, self._traffic, self._view.seen, now_s, self._rng, wanted)
            if chosen is None:
                raise refusal or TriadError(ErrorCode.UNAVAILABLE, "No other replica can take the request.")
            connection = self._connections[chosen]
            try:
                accepted, inbox = await connection.submit(request, num_tokens, is_sure)
                self._estimator.sent(keys, chosen, now_s)
                return connection, accepted, inbox
            except TriadError as error:
                avoid.add(chosen)
                if error.code not in _ELSEWHERE or isinstance(error, ReplicaLost):
                    raise
                refusal = error

    def _check_size(self, request: GenerateRequest) -> None:
        """Raises TriadError where no replica can ever serve so long a prompt, or so many choices."""
        max_choices = self._admission.max_choices
        if request.num_indices > max_choices:
            message = (
                f"this request asks for {request.num_indices} completions, but a replica takes {max_choices} "
                f"at once; lower n, or send fewer prompts a request"
            )
            raise TriadError(ErrorCode.INVALID_REQUEST, message, "n" if request.num_choices > 1 else "prompt")
        if self.model is not None:
            check_fits(request, self.model)

    async def tokens(self, request: TokenRequest) -> Tokenized | str:
        """Has some replica tokenize or detokenize, and another where that one can't. Raises TriadError."""
        refusal = TriadError(ErrorCode.UNAVAILABLE, "No replica can be reached.")
        avoid: set[str] = set()
        while usable := self._connections.usable(avoid):
            chosen = self._rng.choice(usable)
            try:
                return await self._connections[chosen].tokens(request)
            except TriadError as error:
                if error.code not in _ELSEWHERE:
                    raise
                if refusal.code is not ErrorCode.QUEUE_FULL:  # which says more than one that is gone
                    refusal = error
                avoid.add(chosen)
        raise refusal

    def can_retry(self, avoid: Collection[str]) -> bool:
        """True if another replica than these can be reached."""
        return bool(self._connections.usable(avoid))

    def ended(self, request: GenerateRequest, event: Finished) -> None:
        """Learns the length of tokens from a request that has finished."""
        self._estimator.finished(request, event)

    def now_s(self) -> float:
        return self._clock()

    def _verdict(
        self, num: int = 1, num_prompt_tokens: int = 0, deadline_s: float | None = None
    ) -> Admission:
        replica_ids, now_s = self._connections.usable(), self._clock()
        return self._admission.check(
            replica_ids,
            self._view.seen,
            now_s,
            num=num,
            num_prompt_tokens=num_prompt_tokens,
            deadline_s=deadline_s,
        )
