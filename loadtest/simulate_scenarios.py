"""What to simulate: scenarios, the policies that run them, and what came of it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy

from loadtest.simulate_cluster import Cluster, Decide, Failure, Outage, Record, Setting, needed_rounds
from loadtest.simulate_cost import StepTable
from loadtest.simulate_load import Mix, Requests, generate
from loadtest.simulate_replica import Hardware, SimulatedReplica
from loadtest.simulate_yields import DATA, Acceptance, load_acceptance
from policies.admission import QueueLimits
from policies.cost import StepCost, Yield
from policies.load import ReplicaLoad
from policies.modes import DecodePlan, Mode
from policies.registry import POLICIES, create_policy

PLANS = (
    DecodePlan(Mode.AR),
    DecodePlan(Mode.SELF_SPECULATION, 8),
    DecodePlan(Mode.SELF_SPECULATION, 16),
    DecodePlan(Mode.SELF_SPECULATION, 32),
    DecodePlan(Mode.DIFFUSION, 32),
)
"""Those that have published figures."""
_ALSO_RUN = (
    DecodePlan(Mode.DIFFUSION, 16),
    DecodePlan(Mode.DIFFUSION, 8),
    DecodePlan(Mode.SELF_SPECULATION, 4),
)
ORACLE = "oracle"


@dataclass(frozen=True, slots=True)
class Slo:
    """A request is good when its first token comes within ttft_s and each further one, on average,
    within tpot_s."""

    ttft_s: float = 1.0
    tpot_s: float = 0.015


@dataclass(frozen=True, slots=True)
class Scenario:
    """rate: requests a second and replica, on average. failing: the share of the replicas that fail, one
    after another through the middle half of the run, each for a tenth of it. outage: the share of the run
    without Redis, from its middle. cost_error: what the replicas believe a query token costs, as a multiple
    of the truth; yield_error: likewise what they believe at the start that a round brings.
    """

    name: str
    num_replicas: int
    rate: float
    profile: str = "poisson"
    mix: Mix = field(default_factory=Mix)
    failing: float = 0.0
    outage: float = 0.0
    cost_error: float = 1.0
    yield_error: float = 1.0


PINNED = Mix(pinned=((DecodePlan(Mode.AR), 0.3),), prefix_share=0.7)

SCENARIOS = (
    Scenario("one replica, quiet", 1, 2.0),
    Scenario("one replica, busy", 1, 25.0),
    Scenario("8 replicas", 8, 25.0),
    Scenario("8 replicas, bursty", 8, 16.0, "bursty"),
    Scenario("8 replicas, overloaded", 8, 45.0),
    Scenario("8 replicas, writing only", 8, 22.0, mix=Mix(weights={"writing": 1.0})),
    Scenario("8 replicas, multilingual only", 8, 22.0, mix=Mix(weights={"multilingual": 1.0})),
    Scenario("8 replicas, 30 % pin ar, 70 % share prompts", 8, 25.0, mix=PINNED),
    Scenario("8 replicas, no Redis for a fifth", 8, 16.0, "bursty", outage=0.2),
    Scenario("8 replicas, query tokens believed at a quarter", 8, 16.0, "bursty", cost_error=0.25),
    Scenario("8 replicas, yields believed doubled", 8, 16.0, "bursty", yield_error=2.0),
    Scenario("64 replicas, two days", 64, 16.0, "diurnal"),
    Scenario("64 replicas, flash crowd", 64, 10.0, "flash_crowd"),
    Scenario("64 replicas, a quarter fail", 64, 16.0, failing=0.25),
    Scenario("512 replicas, bursty", 512, 16.0, "bursty"),
)


@dataclass(frozen=True, slots=True)
class Machine:
    """One model on one kind of replica. Policies are told which blocks there are figures for."""

    name: str
    table: StepTable
    acceptance: Acceptance
    max_running: int = 128
    max_step_tokens: int = 4096

    @classmethod
    def b200(cls, model: str, scale: float = 1.0) -> "Machine":
        """model: 8b or 14b. scale: of the acceptance. Raises ValueError."""
        if model not in ("8b", "14b"):
            raise ValueError(f"public figures are there for 8b and 14b, not {model!r}; give a table")
        table = StepTable.load(DATA / f"step-cost-b200-{model}.json")
        return cls(f"{model.upper()} on a B200", table, load_acceptance(model, scale=scale))


@dataclass(frozen=True, slots=True)
class Contender:
    """name: of a policy, a mode, or ORACLE. label: how tables call it."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    start: DecodePlan = PLANS[0]

    @property
    def title(self) -> str:
        return self.label or self.name


def fixed(plan: DecodePlan) -> Contender:
    label = plan.mode.value if plan.block_length == 1 else f"{plan.mode.value}/{plan.block_length}"
    return Contender(plan.mode.value, {"block_length": plan.block_length}, label, plan)


def contenders(slo: Slo) -> tuple[Contender, ...]:
    """Every fixed plan, every policy there is, with its defaults, and the oracle.

    Those that choose among blocks are kept to the ones with published figures; `slo` knows its targets.
    """
    blocks = {"speculation_blocks": [8, 16, 32], "diffusion_blocks": [32]}
    parameters: dict[str, dict[str, Any]] = {
        "cost_model": blocks,
        "slo": {**blocks, "ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s},
    }
    adaptive = [Contender(name, parameters.get(name, {})) for name in POLICIES if name != "fixed"]
    return (*(fixed(plan) for plan in PLANS), *adaptive, Contender(ORACLE))


@dataclass(frozen=True, slots=True)
class Outcome:
    """Latencies in seconds at p50, p95, p99. tokens_per_s: to the end of the last request.

    goodput: requests within the SLO for each second in which requests came. good_share: of all that
    came. shifts: a replica and minute.
    """

    scenario: str
    policy: str
    tokens_per_s: float
    goodput: float
    good_share: float
    ttft_s: tuple[float, float, float]
    tpot_s: tuple[float, float, float]
    shifts: float
    num_requests: int
    num_finished: int
    num_shed: int
    num_lost: int
    num_retried: int
    tokens_by_mode: Mapping[str, float]


def run(
    scenario: Scenario,
    machine: Machine,
    contender: Contender,
    num_requests: int,
    seed: int = 0,
    slo: Slo = Slo(),
) -> Outcome:
    """One policy through one scenario. The same seed gives the same requests to every policy.

    Raises PolicyError, ValueError.
    """
    rate = scenario.rate * scenario.num_replicas
    requests = generate(num_requests, rate, scenario.profile, scenario.mix, machine.acceptance, seed)
    record = simulate(scenario, machine, contender, requests, seed, slo)
    return summarise(scenario.name, contender.title, scenario.num_replicas, requests, record, slo)


def simulate(
    scenario: Scenario,
    machine: Machine,
    contender: Contender,
    requests: Requests,
    seed: int = 0,
    slo: Slo = Slo(),
) -> Record:
    rounds = needed_rounds((*PLANS, *_ALSO_RUN), machine.acceptance)
    mean_chance = numpy.bincount(requests.chance, minlength=1)
    believed = {
        plan: _believed_yield(plan, float(_mean_pace(rounds[plan].pace, mean_chance)), scenario.yield_error)
        for plan in rounds
    }
    duration_s = requests.arrival_s[-1]
    setting = Setting(
        num_replicas=scenario.num_replicas,
        hardware=Hardware(
            machine.table,
            _distorted(machine.table.fitted, scenario.cost_error),
            max_running=machine.max_running,
            max_step_tokens=machine.max_step_tokens,
        ),
        limits=QueueLimits(256, 131_072),
        start=contender.start,
        believed_yields=believed,
        failures=_failures(scenario, duration_s),
        outages=(Outage(duration_s / 2, duration_s * scenario.outage),) if scenario.outage else (),
    )
    if contender.name == ORACLE:
        return Cluster(setting, requests, rounds, None, seed, decide=oracle(slo)).run()
    policy = create_policy(contender.name, contender.parameters)
    return Cluster(setting, requests, rounds, policy, seed).run()


def oracle(slo: Slo) -> Decide:
    """Knows what no policy can: the true costs, and of the very requests there the acceptance that each is
    going to have. Takes the plan that keeps most of them within the SLO's pace, and of such plans the
    fastest; where requests wait for a place, the fastest. Five times a second, without delay or dwell."""

    def decide(replica: SimulatedReplica, load: ReplicaLoad, now_s: float) -> DecodePlan:
        best, best_worth = replica.plan, (-1, -1.0)
        for plan in PLANS:
            rate, num_good = replica.truth(plan, slo.tpot_s)
            worth = (0 if replica.num_waiting else num_good, rate * (1.01 if plan == replica.plan else 1.0))
            if worth > best_worth:
                best, best_worth = plan, worth
        return best

    return decide


def summarise(
    name: str, policy: str, num_replicas: int, requests: Requests, record: Record, slo: Slo
) -> Outcome:
    arrival, output = numpy.array(requests.arrival_s), numpy.array(requests.output)
    first, finish = numpy.array(record.first_s), numpy.array(record.finish_s)
    done = ~numpy.isnan(finish)
    ttft = (first - arrival)[done]
    tpot = ((finish - first) / numpy.maximum(1, output - 1))[done]
    good = int(((ttft <= slo.ttft_s) & (tpot <= slo.tpot_s)).sum())
    duration_s = max(record.end_s, 1e-9)
    # Over the time in which requests came: the last ones' way to their end would count as idle else.
    offered_s = max(requests.arrival_s[-1], 1e-9)
    return Outcome(
        scenario=name,
        policy=policy,
        tokens_per_s=float(output[done].sum()) / duration_s,
        goodput=good / offered_s,
        good_share=good / len(requests),
        ttft_s=_percentiles(ttft),
        tpot_s=_percentiles(tpot),
        shifts=record.shifts / num_replicas / (duration_s / 60.0),
        num_requests=len(requests),
        num_finished=int(done.sum()),
        num_shed=record.shed + record.unavailable,
        num_lost=record.lost,
        num_retried=record.retried,
        tokens_by_mode=record.tokens_by_mode,
    )


def run_all(
    scenarios: Sequence[Scenario],
    machine: Machine,
    contenders: Sequence[Contender],
    requests_a_replica: int,
    least: int,
    most: int,
    seed: int = 0,
    slo: Slo = Slo(),
) -> Iterator[Outcome]:
    for scenario in scenarios:
        num = min(most, max(least, requests_a_replica * scenario.num_replicas))
        for contender in contenders:
            yield run(scenario, machine, contender, num, seed, slo)


def table_lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A Markdown table a scenario, each policy against the best fixed plan and the oracle by tokens/s and
    by goodput."""
    for name in dict.fromkeys(outcome.scenario for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.scenario == name]
        titles = {contender.title for contender in map(fixed, PLANS)}
        best = max(
            (o for o in mine if o.policy in titles), key=lambda o: (o.goodput, o.tokens_per_s), default=None
        )
        oracle = next((o for o in mine if o.policy == ORACLE), None)
        yield f"**{name}** ({mine[0].num_requests:,} requests)"
        yield ""
        yield (
            "| policy | tokens/s | goodput/s | within SLO | of best fixed | of oracle "
            "| TTFT p50 / p95 / p99, ms | TPOT p50 / p95 / p99, ms | shifts/min | shed | lost |"
        )
        yield "|" + "---|" * 11
        for o in mine:
            mark = " (best fixed)" if o is best else ""
            ttft = " / ".join(f"{1000 * value:.0f}" for value in o.ttft_s)
            tpot = " / ".join(f"{1000 * value:.1f}" for value in o.tpot_s)
            yield (
                f"| {o.policy}{mark} | {o.tokens_per_s:,.0f} | {o.goodput:,.1f} | {o.good_share:.1%} | "
                f"{_ratio(o, best)} | {_ratio(o, oracle)} | {ttft} | {tpot} | "
                f"{o.shifts:.1f} | {o.num_shed:,} | {o.num_lost:,} |"
            )
        yield ""


def _ratio(outcome: Outcome, other: Outcome | None) -> str:
    if other is None or other.goodput == 0:
        return "-"
    return f"{outcome.goodput / other.goodput:.2f}"


def _percentiles(values: Any) -> tuple[float, float, float]:
    if not len(values):
        return math.nan, math.nan, math.nan
    p50, p95, p99 = numpy.percentile(values, (50, 95, 99))
    return float(p50), float(p95), float(p99)


def _mean_pace(pace: Any, counts: Any) -> float:
    """Tokens a forward of the whole mix: each request's weighted by the forwards it takes for its tokens."""
    present = numpy.flatnonzero(counts)
    paces = numpy.array([pace(int(index)) for index in present])
    return float(counts[present].sum() / (counts[present] / paces).sum())


def _believed_yield(plan: DecodePlan, pace: float, error: float) -> Yield:
    if plan.mode is Mode.AR:
        return Yield(plan, 1.0, 1.0)
    forwards = 2.0 if plan.mode is Mode.SELF_SPECULATION else plan.block_length / pace
    return Yield(plan, min(float(plan.block_length), max(1.0, pace * forwards * error)), forwards, 50.0)


def _distorted(cost: StepCost, error: float) -> StepCost:
    """Right at one token, and wrong by this factor in what each further one costs."""
    if error == 1.0:
        return cost
    first = cost.knot_ms[0]
    return replace(cost, knot_ms=tuple(first + error * (ms - first) for ms in cost.knot_ms))


def _failures(scenario: Scenario, duration_s: float) -> tuple[Failure, ...]:
    num = round(scenario.failing * scenario.num_replicas)
    return tuple(
        Failure(number, duration_s * (0.25 + 0.5 * number / num), duration_s / 10) for number in range(num)
    )
