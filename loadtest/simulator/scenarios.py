"""Scenarios to simulate, the policies that run them, and the outcomes."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy

from loadtest.simulator.cluster import Cluster, Failure, Outage, Record, Setting, needed_rounds
from loadtest.simulator.cost import StepTable
from loadtest.simulator.load import Mix, Requests, generate
from loadtest.simulator.oracle import RELIEFS, clairvoyant
from loadtest.simulator.parts import Hardware
from loadtest.simulator.yields import DATA, NUM_CHANCES, Acceptance, load_acceptance
from policies.cost import RoundYield, StepCost
from policies.modes import DecodePlan, Mode
from policies.registry import POLICIES, create_policy
from policies.threshold import ThresholdParameters
from router.config import AdmissionConfig

PUBLISHED_THRESHOLD = 0.9
"""Diffusion's threshold in the published figures, and so here."""
PLANS = (
    DecodePlan(Mode.AR),
    DecodePlan(Mode.SELF_SPECULATION, 8),
    DecodePlan(Mode.SELF_SPECULATION, 16),
    DecodePlan(Mode.SELF_SPECULATION, 32),
    DecodePlan(Mode.DIFFUSION, 32, PUBLISHED_THRESHOLD),
)
"""The plans that have published figures."""
_ALSO_RUN = (
    DecodePlan(Mode.DIFFUSION, 16, PUBLISHED_THRESHOLD),
    DecodePlan(Mode.DIFFUSION, 8, PUBLISHED_THRESHOLD),
    DecodePlan(Mode.SELF_SPECULATION, 4),
)
ORACLE = "oracle"
"""The name of loadtest.simulator.oracle's contender: the best of its parts, with hindsight."""
_CLAIRVOYANT = "clairvoyant"
AS_GOOD = 0.999
"""The ratio of goodputs above which they count as equal; the oracle then has the better pace."""


@dataclass(frozen=True, slots=True)
class Slo:
    """Latency targets of a request in seconds; one that meets both is good."""

    ttft_s: float = 1.0
    """The most until the first token."""
    tpot_s: float = 0.015
    """The most for each further token, on average."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One load on one cluster, and what goes wrong in it."""

    name: str
    num_replicas: int
    rate: float
    """Requests a second and replica, on average."""
    profile: str = "poisson"
    mix: Mix = field(default_factory=Mix)
    failing: float = 0.0
    """The share of replicas that fail, in turn through the run's middle half, each for a tenth of the run."""
    outage: float = 0.0
    """The share of the run without Redis, from its middle."""
    cost_error: float = 1.0
    """The cost of a query token that replicas believe in, as a multiple of the true one."""
    yield_error: float = 1.0
    """The yield of a round that replicas believe in at the start, as a multiple of the true one."""


PINNED = Mix(pinned=((DecodePlan(Mode.AR), 0.3),), prefix_share=0.7)

RATES = {"poisson": 25.0, "bursty": 16.0, "diurnal": 16.0, "flash_crowd": 10.0}
"""Requests a second and replica by profile; those that vary peak above what can be served in time."""
SIZES = (1, 8, 64)

SCENARIOS = (
    *(
        Scenario(f"{num} replica{'s' * (num > 1)}, {profile}", num, rate, profile)
        for num in SIZES
        for profile, rate in RATES.items()
    ),
    Scenario("1 replica, quiet", 1, 2.0),
    Scenario("8 replicas, overloaded", 8, 45.0),
    Scenario("8 replicas, writing only", 8, 22.0, mix=Mix(weights={"writing": 1.0})),
    Scenario("8 replicas, multilingual only", 8, 22.0, mix=Mix(weights={"multilingual": 1.0})),
    Scenario("8 replicas, 30 % pin ar, 70 % share prompts", 8, 25.0, mix=PINNED),
    Scenario("8 replicas, a quarter fail", 8, 16.0, failing=0.25),
    Scenario("64 replicas, a quarter fail", 64, 16.0, failing=0.25),
    Scenario("8 replicas, no Redis for a fifth", 8, 16.0, "bursty", outage=0.2),
    Scenario("64 replicas, no Redis for a fifth", 64, 16.0, "bursty", outage=0.2),
    Scenario("8 replicas, query tokens believed at a quarter", 8, 16.0, "bursty", cost_error=0.25),
    Scenario("8 replicas, query tokens believed at four times", 8, 16.0, "bursty", cost_error=4.0),
    Scenario("8 replicas, yields believed doubled", 8, 16.0, "bursty", yield_error=2.0),
)


@dataclass(frozen=True, slots=True)
class Machine:
    """One model on one kind of replica. Policies are told which blocks there are figures for."""

    name: str
    table: StepTable
    acceptance: Acceptance
    max_running: int = 128
    max_step_tokens: int = 4096
    max_prefill_tokens: int = 1024

    @classmethod
    def b200(cls, model: str, scale: float = 1.0) -> "Machine":
        """The published model on a B200. Raises ValueError.

        model: 8b or 14b; scale: factor on the acceptance
        """
        if model not in ("8b", "14b"):
            raise ValueError(f"public figures are there for 8b and 14b, not {model!r}; give a table")
        table = StepTable.load(DATA / f"step-cost-b200-{model}.json")
        return cls(f"{model.upper()} on a B200", table, load_acceptance(model, scale=scale))


@dataclass(frozen=True, slots=True)
class Contender:
    """A policy with its parameters, a fixed mode, or the oracle."""

    name: str
    """The policy, the mode, or ORACLE, whose outcome is made from those of its parts."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    """The name in tables; `name` where it is empty."""
    start: DecodePlan = PLANS[0]

    @property
    def title(self) -> str:
        return self.label or self.name


def fixed(plan: DecodePlan) -> Contender:
    label = plan.mode.value if plan.block_length == 1 else f"{plan.mode.value}/{plan.block_length}"
    parameters = {"block_length": plan.block_length, **_bound(plan.mode)}
    return Contender(plan.mode.value, parameters, label, plan)


def _bound(mode: Mode) -> dict[str, float]:
    """The parameters by which a mode has the published threshold, where it has one."""
    return {"threshold": PUBLISHED_THRESHOLD} if mode is Mode.DIFFUSION else {}


def contenders(slo: Slo) -> tuple[Contender, ...]:
    """Every fixed plan, every policy there is, with its defaults but free to run diffusion, and the oracle.

    Those that choose among blocks are kept to the ones with published figures, as all are to their threshold;
    `slo` knows its targets.
    """
    published = {
        "quality": "any",
        "speculation_blocks": [8, 16, 32],
        "diffusion_blocks": [32],
        "threshold": PUBLISHED_THRESHOLD,
    }
    levels = ThresholdParameters().levels
    parameters: dict[str, dict[str, Any]] = {
        "cost_model": published,
        "slo": {**published, "ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s},
        "threshold": {"levels": [dict(level) | _bound(level.mode) for level in levels]},
    }
    adaptive = [Contender(name, parameters.get(name, {})) for name in POLICIES if name != "fixed"]
    return (*(fixed(plan) for plan in PLANS), *adaptive, Contender(ORACLE))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The figures of one policy in one scenario."""

    scenario: str
    policy: str
    tokens_per_s: float
    """Tokens a second to the end of the last request."""
    goodput: float
    """Requests within the SLO, for each second in which requests came."""
    good_share: float
    """The share within the SLO of all requests that came."""
    ttft_s: tuple[float, float, float]
    """p50, p95 and p99."""
    tpot_s: tuple[float, float, float]
    """p50, p95 and p99."""
    shifts: float
    """Changes of plan, a replica and minute."""
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
    """Runs one policy through one scenario. The same seed gives the same requests to every policy.

    Raises PolicyError, ValueError.
    """
    return next(run_each(scenario, machine, (contender,), num_requests, seed, slo))


def run_each(
    scenario: Scenario,
    machine: Machine,
    contenders: Sequence[Contender],
    num_requests: int,
    seed: int = 0,
    slo: Slo = Slo(),
) -> Iterator[Outcome]:
    """Runs several policies; a fixed plan that is among them isn't run again for an oracle after it."""
    rate = scenario.rate * scenario.num_replicas
    requests = generate(num_requests, rate, scenario.profile, scenario.mix, machine.acceptance, seed)
    known: dict[str, Outcome] = {}

    def outcome(contender: Contender) -> Outcome:
        if contender.title not in known:
            record = simulate(scenario, machine, contender, requests, seed, slo)
            known[contender.title] = summarise(
                scenario.name, contender.title, scenario.num_replicas, requests, record, slo
            )
        return known[contender.title]

    for contender in contenders:
        if contender.name == ORACLE:
            yield replace(best_of([outcome(part) for part in oracle_parts()]), policy=contender.title)
        else:
            yield outcome(contender)


def oracle_parts() -> tuple[Contender, ...]:
    clairvoyants = (
        Contender(_CLAIRVOYANT, {"relief": relief}, f"{_CLAIRVOYANT}/{relief:g}") for relief in RELIEFS
    )
    return (*map(fixed, PLANS), *clairvoyants)


def best_of(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of the highest goodput; of those as good, the one with the lowest median time a token."""
    most = max(outcome.goodput for outcome in outcomes)
    return min((o for o in outcomes if o.goodput >= AS_GOOD * most), key=lambda o: o.tpot_s[0])


def simulate(
    scenario: Scenario,
    machine: Machine,
    contender: Contender,
    requests: Requests,
    seed: int = 0,
    slo: Slo = Slo(),
) -> Record:
    rounds = needed_rounds((*PLANS, *_ALSO_RUN), machine.acceptance)
    counts = numpy.bincount(requests.chance, minlength=NUM_CHANCES)
    believed = {
        # Each request runs for as long as its tokens take.
        plan: _believed(of_plan.mean_of(counts / numpy.array(of_plan.paces)), scenario.yield_error)
        for plan, of_plan in rounds.items()
    }
    duration_s = requests.arrival_s[-1]
    setting = Setting(
        num_replicas=scenario.num_replicas,
        hardware=Hardware(
            machine.table,
            _distorted(machine.table.fitted, scenario.cost_error),
            max_running=machine.max_running,
            max_step_tokens=machine.max_step_tokens,
            max_prefill_tokens=machine.max_prefill_tokens,
        ),
        admission=AdmissionConfig(max_running=machine.max_running),
        start=contender.start,
        believed_yields=believed,
        failures=_failures(scenario, duration_s),
        outages=(Outage(duration_s / 2, duration_s * scenario.outage),) if scenario.outage else (),
    )
    if contender.name == _CLAIRVOYANT:
        decide = clairvoyant(PLANS, slo.tpot_s, contender.parameters["relief"])
        return Cluster(setting, requests, rounds, None, seed, decide=decide).run()
    policy = create_policy(contender.name, contender.parameters)
    return Cluster(setting, requests, rounds, policy, seed).run()


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


def load_outcomes(paths: Iterable[Path]) -> list[Outcome]:
    """Reads what `scenarios --json` wrote; of a scenario and policy that is there twice, the last.

    Raises ValueError, OSError.
    """
    found = {}
    for path in paths:
        for line in path.read_text().splitlines():
            try:
                outcome = Outcome(**json.loads(line))
            except TypeError as error:
                raise ValueError(
                    f"{path}: not the outcomes of this simulator ({error}); make them anew"
                ) from error
            found[outcome.scenario, outcome.policy] = outcome
    return list(found.values())


def run_all(
    scenarios: Sequence[Scenario],
    machine: Machine,
    contenders: Sequence[Contender],
    seconds: float,
    least: int,
    most: int,
    seed: int = 0,
    slo: Slo = Slo(),
) -> Iterator[Outcome]:
    for scenario in scenarios:
        num = min(most, max(least, round(seconds * scenario.rate * scenario.num_replicas)))
        yield from run_each(scenario, machine, contenders, num, seed, slo)


def _percentiles(values: Any) -> tuple[float, float, float]:
    if not len(values):
        return math.nan, math.nan, math.nan
    p50, p95, p99 = numpy.percentile(values, (50, 95, 99))
    return float(p50), float(p95), float(p99)


def _believed(mean: RoundYield, error: float) -> RoundYield:
    if mean.plan.mode is Mode.AR:
        return mean
    tokens = min(float(mean.plan.block_length), max(1.0, mean.tokens * error))
    return replace(mean, tokens=tokens, num_rounds=50.0)


def _distorted(cost: StepCost, error: float) -> StepCost:
    """A step cost that is right at one token, and wrong by this factor in the cost of each further one."""
    if error == 1.0:
        return cost
    first = cost.knot_ms[0]
    return replace(cost, knot_ms=tuple(first + error * (ms - first) for ms in cost.knot_ms))


def _failures(scenario: Scenario, duration_s: float) -> tuple[Failure, ...]:
    num = round(scenario.failing * scenario.num_replicas)
    return tuple(
        Failure(number, duration_s * (0.25 + 0.5 * number / num), duration_s / 10) for number in range(num)
    )
