"""Triad's metrics, under OpenTelemetry's GenAI names, and its own under `triad.`.

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/ has the names and the buckets.
Counted once a request, at its end; what replicas publish is looked at when somebody reads.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Observation
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as open_metrics
from prometheus_client.registry import Collector

from policies.control.store import ClusterView
from policies.modes import Mode
from policies.replica_load import LOST_S, ReplicaLoad
from replicas.messages import DecodingReport, Finished
from router.latencies import RecentLatencies
from telemetry.setup import SCOPE, meter_provider

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPEN_METRICS = "application/openmetrics-text"

DURATION_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST_TOKEN_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
)
PER_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
TOKENS_PER_FORWARD_BUCKETS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0)

INGRESS = "ingress"
UNKNOWN = "unknown"
Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request that has come to its end."""

    operation: str
    duration_s: float
    first_token_s: float | None
    finished: Finished | None
    """None where the request broke off; error_type says why."""
    error_type: str | None


@dataclass(slots=True)
class Seen:
    """The cluster as last read, for the gauges."""

    view: ClusterView | None = None
    store_available: bool = True
    num_in_flight: Callable[[], int] = field(default=lambda: 0)
    """This router's own requests."""


class _Count:
    """A counter that is summed up here and read when somebody reads: OpenTelemetry's own takes some 7 µs an
    addition.

    common: labels of each of its series
    labels: the names of those that tell them apart
    """

    def __init__(self, common: Labels, labels: tuple[str, ...]):
        self._common = common
        self._labels = labels
        self._totals: dict[tuple[str, ...], int] = {}

    def add(self, amount: int, *values: str) -> None:
        """values: of the labels, in their order"""
        self._totals[values] = self._totals.get(values, 0) + amount

    def observed(self, options: CallbackOptions) -> list[Observation]:
        """The totals so far. From any thread."""
        return [
            Observation(total, {**self._common, **dict(zip(self._labels, values, strict=True))})
            for values, total in tuple(self._totals.items())
        ]


class Metrics:
    """All metrics of one ingress.

    model: the name clients ask for
    instance: tells the ingresses of one cluster apart, as the label `ingress` on what each counts by itself;
    what replicas publish every ingress reads alike
    """

    def __init__(self, model: str, instance: str):
        self.seen = Seen()
        self.latencies = RecentLatencies()
        self._own = {INGRESS: instance}
        self._common = self._own | {"gen_ai.provider.name": "triad", "gen_ai.request.model": model}
        self._registry = CollectorRegistry()
        reader = PrometheusMetricReader(registry=self._registry, scope_info_enabled=False)
        self._provider = meter_provider("ingress", instance, reader)
        meter = self._provider.get_meter(SCOPE)

        def histogram(name: str, unit: str, buckets: tuple[float, ...], what: str):  # type: ignore[no-untyped-def]
            return meter.create_histogram(name, unit, what, explicit_bucket_boundaries_advisory=list(buckets))

        self._duration = histogram(
            "gen_ai.server.request.duration", "s", DURATION_BUCKETS, "From request to last token"
        )
        self._first_token = histogram(
            "gen_ai.server.time_to_first_token", "s", FIRST_TOKEN_BUCKETS, "From request to first token"
        )
        self._per_token = histogram(
            "gen_ai.server.time_per_output_token", "s", PER_TOKEN_BUCKETS, "After the first, a token"
        )
        self._tokens_per_forward = histogram(
            "triad.request.tokens_per_forward",
            "1",
            TOKENS_PER_FORWARD_BUCKETS,
            "Of a request, after its first token",
        )

        def counter(name: str, unit: str, what: str, *labels: str) -> _Count:
            count = _Count(self._own, labels)
            meter.create_observable_counter(name, [count.observed], unit, what)
            return count

        self._tokens = counter(
            "triad.tokens", "{token}", "Tokens generated, by mode, whatever became of their requests", "mode"
        )
        self._cancelled = counter(
            "triad.cancelled.tokens",
            "{token}",
            "Of these, tokens of requests that were not finished, by why",
            "error.type",
        )
        self._reused = counter(
            "triad.reused.tokens", "{token}", "Prompt tokens that the prefix cache had, of finished requests"
        )
        self._used = counter("triad.key.tokens", "{token}", "Tokens used, by API key and kind", "key", "kind")
        self._forwards = counter("triad.request.forwards", "{forward}", "Forwards of requests' rounds")
        self._switches = counter("triad.mode.switches", "{switch}", "Mode changes inside requests")
        self._http = counter(
            "triad.http.requests", "{request}", "Answers, by route and status", "route", "status"
        )

        def gauge(name: str, unit: str, what: str, read: Callable[[], Iterable[Observation]]) -> None:
            def callback(options: CallbackOptions) -> Iterable[Observation]:
                return read()

            meter.create_observable_gauge(name, [callback], unit, what)

        def of_load(name: str, unit: str, what: str, value: Callable[[ReplicaLoad], float]) -> None:
            gauge(name, unit, what, lambda: self._of_loads(value))

        of_load(
            "triad.requests.running", "{request}", "Requests that a replica runs", lambda x: x.num_running
        )
        of_load("triad.requests.waiting", "{request}", "Depth of a replica's queue", lambda x: x.num_waiting)
        of_load("triad.pages.used", "{page}", "K/V pages in use", lambda x: x.pages_used)
        of_load("triad.pages.capacity", "{page}", "K/V pages there are", lambda x: x.num_pages)
        of_load(
            "triad.tokens.rate", "{token}/s", "Tokens a replica generates a second", lambda x: x.tokens_per_s
        )
        of_load("triad.tasks", "{task}", "asyncio tasks in a replica's process", lambda x: x.num_tasks)
        of_load(
            "triad.plan.version", "1", "Grows with each plan a replica is given", lambda x: x.plan_version
        )
        of_load("triad.plan.held", "s", "For how long a replica has run its plan", lambda x: x.decode_held_s)
        meter.create_observable_counter(
            "triad.replica.tokens",
            [lambda options: self._generated()],
            "{token}",
            "All tokens that a replica has generated since it started, by mode",
        )
        meter.create_observable_counter(
            "triad.replica.host",
            [lambda options: self._of_loads(lambda x: x.host_s)],
            "s",
            "CPU time that the engine's thread has taken beside forwards since the replica started",
        )
        gauge("triad.tokens_per_forward", "1", "Recent average, by mode", self._by_mode)
        gauge(
            "triad.acceptance_length",
            "{token}",
            "Tokens a verify commits, its own included",
            self._acceptance,
        )
        gauge("triad.plan.mode", "1", "1 for the mode that a replica's plan says", self._modes)
        gauge("triad.plan.age", "s", "Since the leader last confirmed a replica's plan", self._plan_ages)
        gauge("triad.load.age", "s", "Of what a replica last published", self._load_ages)
        gauge(
            "triad.redis.up",
            "1",
            "Whether Redis answered",
            lambda: [Observation(int(self.seen.store_available), self._own)],
        )
        gauge(
            "triad.requests.in_flight",
            "{request}",
            "This ingress's requests",
            lambda: [Observation(self.seen.num_in_flight(), self._own)],
        )

    def close(self) -> None:
        self._provider.shutdown()

    def families(self) -> list[Metric]:
        """All metrics as of now."""
        return list(self._registry.collect())

    def own_families(self) -> list[Metric]:
        """The metrics that this ingress counts by itself."""
        return [family for family in self.families() if any(INGRESS in s.labels for s in family.samples)]

    def exposition(self, others: Iterable[Metric] = (), is_open_metrics: bool = False) -> bytes:
        """The metrics in Prometheus's text format or as OpenMetrics, with those of the cluster's other
        ingresses."""
        merged = {family.name: family for family in self.families()}
        for other in others:
            family = merged.setdefault(other.name, other)
            if family is not other:
                family.samples.extend(other.samples)
        families = _Families(tuple(merged.values()))
        if not is_open_metrics:
            return generate_latest(families)
        return bytes(open_metrics(families, version="1.0.0"))  # type: ignore[no-untyped-call]

    def answered(self, route: str, status: int) -> None:
        self._http.add(1, route, str(status))

    def ended(self, outcome: Outcome) -> None:
        common = self._common | {"gen_ai.operation.name": outcome.operation}
        error = {} if outcome.error_type is None else {"error.type": outcome.error_type}
        self._duration.record(outcome.duration_s, common | error)
        if outcome.first_token_s is not None:
            self._first_token.record(outcome.first_token_s, common)
        finished = outcome.finished
        if finished is None:
            return
        report = finished.report
        tokens_per_choice = finished.num_completion_tokens / report.num_choices
        if outcome.first_token_s is not None:
            tpot_s = None
            if tokens_per_choice > 1:
                tpot_s = (outcome.duration_s - outcome.first_token_s) / (tokens_per_choice - 1)
                self._per_token.record(tpot_s, common)
            self.latencies.note(report.replica_id, outcome.first_token_s, tpot_s)
        ratio = report.tokens_per_forward
        if ratio is not None:
            self._tokens_per_forward.record(ratio, self._own | {"rule": report.rule})

    def made(self, report: DecodingReport | None, num_tokens: int) -> None:
        """Counts the tokens that a replica made for a request, complete or not.

        report: None where the replica was lost before it could say; then the num_tokens that had come have
        the mode `unknown`
        """
        if report is None:
            if num_tokens:
                self._tokens.add(num_tokens, UNKNOWN)
            return
        for mode, num in report.tokens_by_mode.items():
            self._tokens.add(num, mode.value)
        if report.num_forwards:
            self._forwards.add(report.num_forwards)
        if report.num_switches:
            self._switches.add(report.num_switches)

    def cancelled(self, why: str, num_tokens: int) -> None:
        """Counts the tokens that were made for a request that was not finished.

        why: an error's code
        """
        if num_tokens:
            self._cancelled.add(num_tokens, why)

    def reused(self, num_tokens: int) -> None:
        """Counts prompt tokens that cost nothing."""
        self._reused.add(num_tokens)

    def used(self, key_name: str | None, num_prompt: int, num_completion: int) -> None:
        """Counts a request's tokens under the name of its API key."""
        self._used.add(num_prompt, key_name or "", "prompt")
        self._used.add(num_completion, key_name or "", "completion")

    def _loads(self) -> list[ReplicaLoad]:
        view = self.seen.view
        return [] if view is None else [seen.load for seen in view.loads.replicas if seen.age_s <= LOST_S]

    def _of_loads(self, value: Callable[[ReplicaLoad], float]) -> list[Observation]:
        return [Observation(value(load), _labels(load)) for load in self._loads()]

    def _by_mode(self) -> list[Observation]:
        return [
            Observation(ratio, _labels(load) | {"mode": mode.value})
            for load in self._loads()
            for mode, ratio in load.tokens_per_forward.items()
        ]

    def _generated(self) -> list[Observation]:
        return [
            Observation(num, _labels(load) | {"mode": mode.value})
            for load in self._loads()
            for mode, num in load.tokens_total_by_mode.items()
        ]

    def _acceptance(self) -> list[Observation]:
        # A round is one forward.
        return [
            Observation(load.tokens_per_forward[Mode.SELF_SPECULATION], _labels(load))
            for load in self._loads()
            if Mode.SELF_SPECULATION in load.tokens_per_forward
        ]

    def _modes(self) -> list[Observation]:
        return [
            Observation(
                int(load.decode is not None and load.decode.mode is mode),
                _labels(load) | {"mode": mode.value},
            )
            for load in self._loads()
            for mode in load.modes
        ]

    def _plan_ages(self) -> list[Observation]:
        plans = {} if self.seen.view is None else self.seen.view.plans
        return [Observation(plan.age_s, {"replica": replica_id}) for replica_id, plan in plans.items()]

    def _load_ages(self) -> list[Observation]:
        view = self.seen.view
        loads = () if view is None else view.loads.replicas
        return [Observation(seen.age_s, _labels(seen.load)) for seen in loads]


@dataclass(frozen=True, slots=True)
class _Families(Collector):
    all: tuple[Metric, ...]

    def collect(self) -> Iterable[Metric]:
        return self.all


def _labels(load: ReplicaLoad) -> dict[str, str]:
    return {"replica": load.replica_id}
