"""One simulated replica: continuous batching by the engine's rules, many steps at a time.

Between two events (a prompt done, a request done, one admitted, a new plan) every step is alike: all
decoding sequences run one forward each, or, where the token budget is short, the same share of them.
So a stretch of steps is one event, and no token or step costs anything by itself.

A request's forwards are drawn when it begins a plan; a change of plan draws them anew for the tokens
still to come. Not modelled: a round cut off by a change of plan (the engine finishes it first), the draft
that self-speculation lacks after one, drafts cut short at a request's end, and preemption (a request that
starts has pages for all it will write).
"""

import heapq
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from loadtest.simulator.load import Requests
from loadtest.simulator.meter import Meter
from loadtest.simulator.parts import Decoding, Hardware, RecentPrefixes
from loadtest.simulator.yields import Rounds
from policies.cost import ModeFactors, ReplicaCosts, RoundYield
from policies.modes import DecodePlan, Mode
from policies.replica_load import ReplicaLoad
from policies.turnarounds import Turnarounds

PREFILL_SHARE = 4
"""Prompts that wait get one in so many of a step's tokens, as in the engine."""
MAX_STRETCH = 512
"""Steps taken as one before the growth of the cache is looked at again."""
KNOWN_FACTORS = {mode: ModeFactors((0.0,), (0.1,)) for mode in Mode}
"""What a replica has found its modes' forwards to cost beside its step cost: nothing."""
NUM_EXPLORING = 4
"""Requests that try a plan at a time."""


class SimulatedReplica:
    """One replica. Its next event of its own is at `next_s`, infinity while idle; times are the cluster's."""

    def __init__(
        self,
        replica_id: str,
        hardware: Hardware,
        requests: Requests,
        rounds: Mapping[DecodePlan, Rounds],
        plan: DecodePlan,
        yields: Mapping[DecodePlan, RoundYield],
    ):
        self.replica_id = replica_id
        self.hardware = hardware
        self.requests = requests
        self.rounds = rounds
        self.plan = plan
        self.plan_since_s = 0.0
        self.version = 0
        """Grows whenever next_s changes."""
        self.next_s = math.inf
        self.num_shifts = 0
        self.first_s: list[tuple[int, float]] = []
        """Requests that have had their first token since this was last emptied, and when."""
        self.tokens_by_mode = dict.fromkeys(Mode, 0.0)
        self._meter = Meter(yields)
        self._num_ended = 0
        self._turnarounds = Turnarounds()
        self._waiting: deque[int] = deque()
        self._waiting_tokens = 0
        self._prefilling: deque[list[int]] = deque()  # [request, tokens to go]
        self._decoding: dict[int, Decoding] = {}
        self._ends: list[tuple[float, int]] = []  # by count of forwards
        self._forwards = 0.0  # that every decoding sequence has had since the start
        self._queries = 0.0  # of one forward of all of them
        self._wanted = 0.0  # logits of that
        self._pace = 0.0  # tokens that brings
        self._cached = 0.0
        self._pages = 0
        self._limits = 0  # the most tokens that those decoding may come to, prompts included
        self._made = 0.0
        self._prefilled = 0.0
        self._prefixes = RecentPrefixes()
        # The stretch under way.
        self._at_s = 0.0
        self._num_steps = 0
        self._step_s = 0.0
        self._share = 0.0
        self._chunk = 0.0
        self._is_planned_anew = False

    @property
    def num_running(self) -> int:
        return len(self._decoding) + len(self._prefilling)

    @property
    def num_cached(self) -> float:
        """Tokens in the cache of those decoding."""
        return self._cached

    @property
    def prefill_per_token(self) -> float:
        return self._meter.prefill_per_token

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        return self.num_running + len(self._waiting)

    def submit(self, request: int, now_s: float) -> None:
        self._turnarounds.arrived(now_s)
        self._waiting.append(request)
        self._waiting_tokens += self.requests.prompt[request]
        if self.next_s == math.inf:
            self._begin(now_s)
        elif self.num_running < self.hardware.max_running:
            self._cut(now_s)

    def set_plan(self, plan: DecodePlan, now_s: float) -> None:
        """Sets the plan of `auto` requests, from their next safe point on."""
        if plan == self.plan:
            return
        self.plan = plan
        self.plan_since_s = now_s
        self.num_shifts += 1
        if self.next_s < math.inf:
            self._is_planned_anew = True
            self._cut(now_s)

    def kill(self) -> list[int]:
        """Empties the replica; returns the requests that were here."""
        lost = [*self._waiting, *(request for request, _ in self._prefilling), *self._decoding]
        self._waiting.clear()
        self._prefilling.clear()
        self._decoding.clear()
        self._ends.clear()
        self._prefixes.clear()
        self._waiting_tokens = self._pages = self._limits = 0
        self._queries = self._wanted = self._pace = self._cached = 0.0
        self.next_s = math.inf
        self.version += 1
        return lost

    def advance(self) -> Sequence[int]:
        """Ends the stretch, at next_s, and begins the next; returns the requests that have finished."""
        now_s = self.next_s
        had = self._share * self._num_steps
        made = self._pace * had
        self._forwards += had
        self._cached += made
        self._made += made
        ended = self._take_ended()
        if self._chunk:
            ended += self._prefill(self._chunk * self._num_steps, now_s)
        for _ in ended:
            self._turnarounds.ended(now_s)
        if self._is_planned_anew:
            self._plan_anew()
        self._begin(now_s)
        return ended

    def load(self, now_s: float) -> ReplicaLoad:
        """The load that the replica would publish now; its rates are since the last call."""
        done = 0.0
        if self.next_s < math.inf and self._step_s:
            done = self._share * min(self._num_steps, int((now_s - self._at_s) / self._step_s))
        made = self._made + self._pace * done
        self._meter.look(now_s, made, self._prefilled)
        running = [(s.pace, s.rows) for s in self._decoding.values() if s.plan == self.plan]
        self._meter.saw(self.plan, running)
        requests, hardware = self.requests, self.hardware
        by_mode: dict[Mode, int] = {}
        pinned: dict[Mode, int] = {}
        num_auto = len(self._waiting) + len(self._prefilling)
        if requests.has_pins:
            num_auto = 0
            for request in (*self._waiting, *(item[0] for item in self._prefilling), *self._decoding):
                plan = requests.pinned[request]
                if plan is None:
                    num_auto += 1
                else:
                    pinned[plan.mode] = pinned.get(plan.mode, 0) + 1
            for sequence in self._decoding.values():
                by_mode[sequence.plan.mode] = by_mode.get(sequence.plan.mode, 0) + 1
        else:
            num_auto += len(self._decoding)
            if self._decoding:
                by_mode[self.plan.mode] = len(self._decoding)
        num = len(self._decoding)
        cached = self._cached + self._pace * done
        context = cached / num if num else 0.0
        remaining = None
        if num:
            remaining = max(1.0, min((self._limits - cached) / num, self._meter.mean_output))
        return ReplicaLoad(
            replica_id=self.replica_id,
            num_running=self.num_running,
            num_waiting=len(self._waiting),
            num_auto=num_auto,
            max_running=hardware.max_running,
            pages_used=self._pages,
            num_pages=hardware.num_pages,
            waiting_prompt_tokens=self._waiting_tokens,
            running_by_mode=by_mode,
            tokens_per_s=self._meter.tokens_per_s,
            modes=hardware.modes,
            decode=self.plan,
            decode_held_s=now_s - self.plan_since_s,
            pinned_by_mode=pinned,
            page_size=hardware.page_size,
            max_step_tokens=hardware.max_step_tokens,
            mean_context=context,
            mean_remaining=remaining,
            mean_completion=self._meter.mean_output if self._num_ended else None,
            prefill_per_token=self._meter.prefill_per_token,
            costs=ReplicaCosts(hardware.believed, self._meter.yields, KNOWN_FACTORS),
            num_ended=self._num_ended,
            num_between=self._turnarounds.num_between(now_s),
            turnaround_s=self._turnarounds.mean_s,
        )

    def explore(self, plan: DecodePlan) -> None:
        """Lets some requests try a plan; the cost, 2 % at most, is not modelled."""
        if plan in self.rounds:
            rounds, chance = self.rounds[plan], self.requests.chance
            explored = [chance[item.request] for item in list(self._decoding.values())[:NUM_EXPLORING]]
            self._meter.explored(plan, [(rounds.paces[index], rounds.rows[index]) for index in explored])

    def progress(self) -> Iterator[tuple[int, float, float]]:
        """Each running request, its tokens still to come as of the last event, and its first token's time.

        A request in its prefill may have its first token now.
        """
        for sequence in self._decoding.values():
            left = 1.0 - (self._forwards - sequence.began) / sequence.forwards
            yield sequence.request, sequence.tokens * left, sequence.first_s
        for request, _ in self._prefilling:
            yield request, float(self.requests.output[request] - 1), self._at_s

    # The stretch of steps.

    def _cut(self, now_s: float) -> None:
        """Ends the stretch under way at the next step."""
        done = math.ceil((now_s - self._at_s) / self._step_s - 1e-9)
        if done < self._num_steps:
            self._num_steps = max(1, done)
            self.next_s = self._at_s + self._num_steps * self._step_s
            self.version += 1

    def _begin(self, now_s: float) -> None:
        hardware = self.hardware
        budget = hardware.max_step_tokens
        num, queries = len(self._decoding), self._queries
        most = min(budget, hardware.max_prefill_tokens) if num else budget
        if self._waiting:
            self._admit(most)
        self._at_s = now_s
        self.version += 1
        if self._prefilling:
            room = budget - min(most, budget // PREFILL_SHARE)
            self._share = share = min(1.0, room / queries) if queries else 0.0
            chunk = min(most, budget - share * queries)
            first = self._prefilling[0][1]
            if first <= chunk:
                steps, prefill = 1, 0.0
                for _, to_go in self._prefilling:
                    prefill += to_go
                    if prefill >= chunk:
                        prefill = chunk
                        break
            else:
                steps, prefill = int(first // chunk), chunk
            self._chunk = prefill
            segments = num * share + min(len(self._prefilling), 1 + int(prefill // 256))
        elif num:
            self._share = share = min(1.0, budget / queries)
            self._chunk = prefill = 0.0
            steps, segments = MAX_STRETCH, num * share
        else:
            self._share, self._chunk, self._num_steps, self.next_s = 0.0, 0.0, 0, math.inf
            self._cached = 0.0
            return
        if num:
            until_end = math.ceil((self._ends[0][0] - self._forwards) / share - 1e-9)
            steps = max(1, min(steps, until_end))
        wanted = share * self._wanted + segments - share * num
        ms = hardware.table.ms(segments, share * queries + prefill, self._cached * share, wanted)
        self._num_steps, self._step_s = steps, ms / 1000.0
        self.next_s = now_s + steps * self._step_s

    def _admit(self, most: int) -> None:
        requests, hardware = self.requests, self.hardware
        to_prefill = sum(to_go for _, to_go in self._prefilling)
        while self._waiting and self.num_running < hardware.max_running and to_prefill < most:
            request = self._waiting[0]
            pages = self._pages_of(request)
            if self._pages + pages > hardware.num_pages and self.num_running:
                break
            self._waiting.popleft()
            prompt = requests.prompt[request]
            self._waiting_tokens -= prompt
            self._pages += pages
            to_go = max(1, prompt - self._reused(request))
            self._prefilling.append([request, to_go])
            to_prefill += to_go

    def _reused(self, request: int) -> int:
        """The request's prompt tokens that the prefix cache has; from now on it has them all."""
        if self.requests.reused is not None:
            return self.requests.reused[request]
        prefix = self.requests.prefix[request]
        return self.requests.prefix_tokens if prefix >= 0 and self._prefixes.has(prefix) else 0

    def _pages_of(self, request: int) -> int:
        tokens = self.requests.prompt[request] + self.requests.output[request]
        return -(-tokens // self.hardware.page_size)

    def _prefill(self, tokens: float, now_s: float) -> list[int]:
        """Spends so many tokens on prompts, oldest first; returns the requests of one token, done with it."""
        ended = []
        requests = self.requests
        self._prefilled += tokens
        while self._prefilling and self._prefilling[0][1] <= tokens + 1e-6:
            request, to_go = self._prefilling.popleft()
            tokens -= to_go
            self.first_s.append((request, now_s))
            self._made += 1
            if requests.output[request] <= 1:
                self._pages -= self._pages_of(request)
                ended.append(request)
                continue
            self._cached += requests.prompt[request]
            self._limits += requests.prompt[request] + requests.max_tokens
            self._add(request, requests.pinned[request] or self.plan, requests.output[request] - 1, now_s)
        if self._prefilling and tokens >= 1:
            self._prefilling[0][1] -= int(tokens)
        return ended

    def _add(self, request: int, plan: DecodePlan, tokens: float, first_s: float) -> None:
        requests = self.requests
        rounds = self.rounds[plan]
        if requests.measured is not None:
            forwards, rows = requests.measured[request]
        else:
            chance = requests.chance[request]
            forwards, rows = rounds.forwards(chance, tokens, requests.luck[request]), rounds.rows[chance]
        wanted = rounds.wanted(rows)
        sequence = Decoding(request, plan, tokens, forwards, self._forwards, rows, wanted, first_s)
        self._decoding[request] = sequence
        heapq.heappush(self._ends, (self._forwards + forwards, request))
        self._queries += rows
        self._wanted += sequence.wanted
        self._pace += sequence.pace

    def _take_ended(self) -> list[int]:
        ended = []
        ends, requests = self._ends, self.requests
        limit = self._forwards + 1e-6
        while ends and ends[0][0] <= limit:
            request = heapq.heappop(ends)[1]
            sequence = self._decoding.pop(request)
            self._queries -= sequence.rows
            self._wanted -= sequence.wanted
            self._pace -= sequence.pace
            self.tokens_by_mode[sequence.plan.mode] += sequence.tokens
            self._cached -= requests.prompt[request] + requests.output[request] - 1
            self._limits -= requests.prompt[request] + requests.max_tokens
            self._pages -= self._pages_of(request)
            self._meter.ended(requests.output[request])
            self._num_ended += 1
            ended.append(request)
        if not self._decoding:
            self._queries = self._wanted = self._pace = self._cached = 0.0
        return ended

    def _plan_anew(self) -> None:
        """Moves all `auto` sequences on to the plan, with what is left of their tokens."""
        self._is_planned_anew = False
        sequences = list(self._decoding.values())
        pinned = self.requests.pinned
        self._ends = [item for item in self._ends if pinned[item[1]] is not None]
        heapq.heapify(self._ends)
        for sequence in sequences:
            request = sequence.request
            if pinned[request] is not None:
                continue
            done = sequence.tokens * (self._forwards - sequence.began) / sequence.forwards
            self.tokens_by_mode[sequence.plan.mode] += done
            self._queries -= sequence.rows
            self._wanted -= sequence.wanted
            self._pace -= sequence.pace
            self._add(request, self.plan, max(1.0, sequence.tokens - done), sequence.first_s)
