"""The replica that takes many steps at once against one that takes each by itself."""

import math
import random

import pytest

from loadtest.simulator.cost import StepTable
from loadtest.simulator.load import Requests
from loadtest.simulator.oracle import clairvoyant, truth
from loadtest.simulator.parts import Hardware
from loadtest.simulator.replica import SimulatedReplica
from loadtest.simulator.yields import Rounds
from policies.cost import prior_yield
from policies.modes import DecodePlan, Mode

AR, DRAFT = DecodePlan(Mode.AR), DecodePlan(Mode.SELF_SPECULATION, 8)
PLANS = (AR, DRAFT)
FLAT = StepTable(
    [
        {"sequences": count, "query_tokens": count * query, "cached_tokens": count * 100, "ms": ms}
        for count in (1, 64)
        for query, ms in ((1, 10.0), (64, 10.0))
    ]
)
RISING = StepTable(
    [
        {
            "sequences": count,
            "query_tokens": count * query,
            "cached_tokens": count * cached,
            "ms": 5 + 0.1 * count * query + 0.2 * count + 0.001 * count * cached,
        }
        for count in (1, 2, 4, 8, 16)
        for query in (1, 8, 16)
        for cached in (10, 100)
    ]
)


def test_it_publishes_the_clients_between_two_requests():
    """Two requests of two tokens in ar after a prompt: each has forwards of 10 ms for prompt and token."""
    requests = Requests(
        [0.0, 0.05], [8, 8], [2, 2], [0, 0], [1000] * 2, [0.0] * 2, [None] * 2, [-1] * 2, 0, 8
    )
    replica = a_replica(requests, FLAT, AR)
    replica.submit(0, 0.0)
    while replica.num_in_flight:
        ended_s = replica.next_s
        replica.advance()
    assert replica.load(ended_s + 0.001).num_between == 1
    replica.submit(1, 0.05)
    load = replica.load(0.05)
    assert load.num_between == 0
    assert load.turnaround_s == pytest.approx(0.05 - ended_s)


def some_requests(num, rng, pinned=(None,), max_output=40):
    return Requests(
        arrival_s=sorted(rng.uniform(0.0, num * 0.02) for _ in range(num)),
        prompt=[rng.randint(1, 150) for _ in range(num)],
        output=[rng.randint(1, max_output) for _ in range(num)],
        category=[0] * num,
        chance=[rng.randrange(800, 1900) for _ in range(num)],
        luck=[rng.gauss(0.0, 1.0) for _ in range(num)],
        pinned=[rng.choice(pinned) for _ in range(num)],
        prefix=[-1] * num,
        prefix_tokens=0,
        max_tokens=64,
        has_pins=len(pinned) > 1,
    )


def a_replica(requests, table=RISING, plan=DRAFT, **limits):
    limits = {"max_running": 6, "max_step_tokens": 128, "num_pages": 10_000, **limits}
    hardware = Hardware(table, table.fitted, **limits)
    rounds = {plan: Rounds(plan, 2.0) for plan in PLANS}
    return SimulatedReplica("r", hardware, requests, rounds, plan, {p: prior_yield(p) for p in PLANS})


def play(replica, requests, until=math.inf):
    """(first, finish) by request."""
    first, finish = {}, {}
    upcoming = list(range(len(requests)))
    while True:
        arrival_s = requests.arrival_s[upcoming[0]] if upcoming else math.inf
        if min(arrival_s, replica.next_s) >= until:
            return first, finish
        if arrival_s <= replica.next_s:
            replica.submit(upcoming.pop(0), arrival_s)
            continue
        now_s = replica.next_s
        ended = replica.advance()
        first.update(replica.first_s)
        replica.first_s.clear()
        finish.update((request, now_s) for request in ended)


class StepByStep:
    """The same rules, a step at a time: every decoding sequence one forward, prompts with what is left."""

    def __init__(self, requests, replica):
        self.requests, self.hardware, self.rounds = requests, replica.hardware, replica.rounds
        self.plan = replica.plan

    def play(self):
        requests, hardware = self.requests, self.hardware
        now_s, first, finish = 0.0, {}, {}
        upcoming, waiting = list(range(len(requests))), []
        prefilling, decoding = [], {}  # [request, to go]; request -> [forwards to go, pace, rows, context]
        while upcoming or waiting or prefilling or decoding:
            if not (waiting or prefilling or decoding):
                now_s = max(now_s, requests.arrival_s[upcoming[0]])
            while upcoming and requests.arrival_s[upcoming[0]] <= now_s:
                waiting.append(upcoming.pop(0))
            most = hardware.max_step_tokens
            if decoding:
                most = min(most, hardware.max_prefill_tokens)
            while (
                waiting
                and len(prefilling) + len(decoding) < hardware.max_running
                and sum(to_go for _, to_go in prefilling) < most
            ):
                request = waiting.pop(0)
                prefilling.append([request, requests.prompt[request]])
            queries = sum(rows for _, _, rows, _ in decoding.values())
            room = hardware.max_step_tokens
            if prefilling:
                room -= min(room // 4, most)
            share = min(1.0, room / queries) if queries else 0.0
            chunk = min(
                sum(to_go for _, to_go in prefilling), most, hardware.max_step_tokens - share * queries
            )
            segments = share * len(decoding) + min(len(prefilling), 1 + int(chunk // 256))
            cached = share * sum(context for *_, context in decoding.values())
            now_s += hardware.table.ms(segments, share * queries + chunk, cached) / 1000.0
            for request in list(decoding):
                state = decoding[request]
                state[0] -= share
                state[3] += share * state[1]
                if state[0] <= 1e-6:
                    del decoding[request]
                    finish[request] = now_s
            while prefilling and prefilling[0][1] <= chunk + 1e-6:
                request, to_go = prefilling.pop(0)
                chunk -= to_go
                first[request] = now_s
                tokens = requests.output[request] - 1
                if not tokens:
                    finish[request] = now_s
                    continue
                plan = requests.pinned[request] or self.plan
                rounds, chance = self.rounds[plan], requests.chance[request]
                forwards = rounds.forwards(chance, tokens, requests.luck[request])
                rows = rounds.rows[chance]
                decoding[request] = [forwards, tokens / forwards, rows, requests.prompt[request]]
            if prefilling and chunk >= 1:
                prefilling[0][1] -= int(chunk)
        return first, finish


@pytest.mark.parametrize("seed", range(25))
def test_stretches_are_what_steps_one_by_one_would_be(seed):
    rng = random.Random(seed)
    pinned = rng.choice([(None,), (None, AR), (None, AR, DRAFT)])
    requests = some_requests(40, rng, pinned)
    limits = {
        "max_running": rng.choice([1, 4, 16]),
        "max_step_tokens": rng.choice([32, 64, 256]),
        "max_prefill_tokens": rng.choice([8, 48, 1024]),
    }
    replica = a_replica(requests, plan=rng.choice(PLANS), **limits)
    expected_first, expected_finish = StepByStep(requests, replica).play()
    first, finish = play(replica, requests)
    assert set(finish) == set(expected_finish) == set(range(len(requests)))
    for request in finish:
        # The cache's growth within a stretch is not looked at: a few per mille of the time.
        assert first[request] == pytest.approx(expected_first[request], rel=0.03, abs=0.02)
        assert finish[request] == pytest.approx(expected_finish[request], rel=0.03, abs=0.02)
    assert max(finish.values()) == pytest.approx(max(expected_finish.values()), rel=0.01)


def test_one_request_in_ar_takes_a_step_a_token():
    requests = some_requests(1, random.Random(0))
    requests.output[0], requests.arrival_s[0] = 21, 3.0
    first, finish = play(a_replica(requests, FLAT, AR, max_step_tokens=512), requests)
    assert first == {0: pytest.approx(3.010)}
    assert finish == {0: pytest.approx(3.210)}


def test_truth_is_what_comes_of_a_plan():
    """Steps of 10 ms: in ar 100 tokens a second, in time where a token may take 11 ms, not where 9."""
    requests = some_requests(1, random.Random(0))
    requests.output[0], requests.arrival_s[0] = 21, 0.0
    replica = a_replica(requests, FLAT, AR, max_step_tokens=512)
    play(replica, requests, until=0.02)
    assert truth(replica, AR, 0.011, 0.02) == (pytest.approx(100.0), 1)
    assert truth(replica, AR, 0.009, 0.02)[1] == 0
    assert truth(replica, DRAFT, 0.011, 0.02)[0] > 100.0


def test_a_clairvoyant_keeps_to_the_target_until_it_is_pressed():
    rng = random.Random(2)
    requests = some_requests(8, rng)
    requests.arrival_s[:], requests.chance[:], requests.output[:] = [0.0] * 8, [900] * 8, [40] * 8
    replica = a_replica(requests, RISING, AR, max_running=8, max_step_tokens=2000)
    play(replica, requests, until=0.2)
    load = replica.load(0.2)
    rates = {plan: truth(replica, plan, 1.0, 0.2)[0] for plan in PLANS}
    fastest = max(PLANS, key=lambda plan: rates[plan])
    assert clairvoyant(PLANS, 1.0, 0.0)(replica, load, 0.2) == fastest
    most = max(PLANS, key=lambda plan: (truth(replica, plan, 0.02, 0.2)[1], rates[plan]))
    assert clairvoyant(PLANS, 0.02, 100.0)(replica, load, 0.2) == most


def test_a_change_of_plan_takes_effect_and_loses_no_token():
    rng = random.Random(3)
    requests = some_requests(6, rng, max_output=400)
    requests.arrival_s[:], requests.chance[:] = [0.0] * 6, [1800] * 6
    _, before = play(a_replica(requests, FLAT, AR), requests)
    replica = a_replica(requests, FLAT, AR)
    _, finish = play(replica, requests, until=0.3)
    remaining = list(range(len(requests)))
    assert replica.num_in_flight == 6 - len(finish)
    replica.set_plan(DRAFT, 0.3)
    while replica.next_s < math.inf:
        now_s = replica.next_s
        finish.update((request, now_s) for request in replica.advance())
    assert sorted(finish) == remaining
    assert max(finish.values()) < 0.8 * max(before.values())
    made = sum(replica.tokens_by_mode.values())
    assert made == pytest.approx(sum(requests.output) - len(requests), rel=0.01)
    assert replica.tokens_by_mode[Mode.AR] > 0 < replica.tokens_by_mode[Mode.SELF_SPECULATION]


@pytest.mark.parametrize("seed", range(10))
def test_its_load_is_what_runs_and_nothing_is_left_at_the_end(seed):
    rng = random.Random(seed)
    requests = some_requests(30, rng, (None, AR))
    replica = a_replica(requests)
    _, finish = play(replica, requests, until=0.2)
    load = replica.load(0.2)
    arrived = sum(at_s < 0.2 for at_s in requests.arrival_s)
    assert load.num_in_flight == arrived - len(finish)
    assert load.num_auto + sum(load.pinned_by_mode.values()) == load.num_in_flight
    assert load.num_running <= 6
    play(replica, requests, until=-1.0)
    requests.arrival_s[:] = [0.2] * len(requests)
    while replica.next_s < math.inf:
        replica.advance()
    rest = replica.load(100.0)
    assert (rest.num_in_flight, rest.pages_used, rest.waiting_prompt_tokens) == (0, 0, 0)


def test_a_killed_replica_gives_everything_up():
    requests = some_requests(20, random.Random(1))
    replica = a_replica(requests)
    _, finish = play(replica, requests, until=0.15)
    arrived = [request for request, at_s in enumerate(requests.arrival_s) if at_s < 0.15]
    assert sorted([*replica.kill(), *finish]) == arrived
    assert replica.next_s == math.inf
    replica.submit(19, 1.0)
    assert replica.next_s > 1.0
