"""`python -m loadtest.simulator`: the cluster as a discrete-event simulation. Its figures are simulated.

The policies, `stabilise`, placement and admission are the project's own code; the replicas are a model of
the engine's batching over a table of step costs and published acceptance. No server is started.

    python -m loadtest.simulator run --replicas 8 --rate 25 --policy threshold --requests 20000
    python -m loadtest.simulator scenarios --json scenarios.jsonl
    python -m loadtest.simulator validate benchmarks/results/step-cost-cpu.json
    python -m loadtest.simulator page --outcomes scenarios.jsonl
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

from loadtest.simulator import capacity
from loadtest.simulator.cost import StepTable, TableError
from loadtest.simulator.load import PROFILES
from loadtest.simulator.page import check_places, update
from loadtest.simulator.scenarios import (
    SCENARIOS,
    Contender,
    Machine,
    Outcome,
    Scenario,
    Slo,
    contenders,
    load_outcomes,
    run,
    run_all,
)
from loadtest.simulator.tables import summary_lines, table_lines
from loadtest.simulator.validate import lines, validate
from loadtest.simulator.yields import load_acceptance
from policies.registry import PolicyError, policy_names

PAGE = Path("docs") / "capacity.md"
SCENARIO_PAGE = Path("docs") / "capacity-scenarios.md"
SLOS = (Slo(1.0, 0.01), Slo(1.0, 0.02), Slo(1.0, 0.05))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m loadtest.simulator", description=(__doc__ or "").partition("\n")[0]
    )
    commands = parser.add_subparsers(required=True)

    one = commands.add_parser("run", help="one policy through one load")
    _machine_options(one)
    one.add_argument("--replicas", type=int, default=8)
    one.add_argument("--rate", type=float, default=20.0, help="requests a second and replica, on average")
    one.add_argument("--requests", type=int, default=20_000)
    one.add_argument("--arrivals", choices=tuple(PROFILES), default="poisson")
    one.add_argument(
        "--policy", default="threshold", help=f"{', '.join(policy_names())}, oracle, or a dotted name"
    )
    one.add_argument(
        "--params",
        default="{}",
        help="a JSON object, over the parameters that the policy has in `scenarios`: plans with figures",
    )
    one.add_argument("--failing", type=float, default=0.0, help="share of the replicas that fail on the way")
    one.add_argument("--outage", type=float, default=0.0, help="share of the run without Redis")
    one.set_defaults(command=_run)

    many = commands.add_parser("scenarios", help="every policy through every scenario, as Markdown tables")
    _machine_options(many)
    _size_options(many)
    many.add_argument("--only", help="scenarios whose name has this in it")
    many.add_argument("--policies", nargs="+", default=[], help="these alone, as they are called in tables")
    many.add_argument("--json", type=Path, help="append the outcomes to this file too, one a line")
    many.set_defaults(command=_scenarios)

    check = commands.add_parser("validate", help="rates predicted and measured on one machine")
    check.add_argument("table", type=Path, help="what `python -m benchmarks.step_cost --json` wrote")
    check.set_defaults(command=_validate)

    page = commands.add_parser("page", help=f"make the tables and plots of {PAGE} and its scenarios anew")
    _machine_options(page)
    _size_options(page)
    page.add_argument("--only", help="tables whose name has this in it")
    page.add_argument(
        "--outcomes", type=Path, nargs="+", help="what `scenarios --json` wrote, so as not to run them again"
    )
    page.add_argument("--table", type=Path, default=Path("benchmarks/results/step-cost-cpu.json"))
    page.set_defaults(command=_page)

    options = parser.parse_args(arguments)
    try:
        options.command(options)
    except (TableError, PolicyError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _machine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="8b", help="8b or 14b: on a B200, from public figures")
    parser.add_argument("--costs", type=Path, help="a table of step costs in place of the B200's")
    parser.add_argument("--acceptance", type=float, default=1.0, help="scale of what a round brings over 1")
    parser.add_argument("--max-running", type=int, default=128)
    parser.add_argument("--max-step-tokens", type=int, default=4096)
    parser.add_argument("--max-prefill-tokens", type=int, default=1024)
    parser.add_argument("--ttft", type=float, default=Slo().ttft_s, help="SLO, seconds")
    parser.add_argument("--tpot", type=float, default=Slo().tpot_s, help="SLO, seconds")
    parser.add_argument("--seed", type=int, default=0)


def _size_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=60.0, help="of traffic a scenario")
    parser.add_argument("--least", type=int, default=6000, help="requests a scenario at least")
    parser.add_argument("--most", type=int, default=100_000, help="requests a scenario at most")


def _machine(options: argparse.Namespace) -> Machine:
    limits = options.max_running, options.max_step_tokens, options.max_prefill_tokens
    if min(limits) < 1:
        raise ValueError("--max-running, --max-step-tokens and --max-prefill-tokens must be at least 1")
    if options.costs is not None:
        table, acceptance = StepTable.load(options.costs), load_acceptance("8b", scale=options.acceptance)
        return Machine(str(options.costs), table, acceptance, *limits)
    found = Machine.b200(options.model, options.acceptance)
    return Machine(found.name, found.table, found.acceptance, *limits)


def _run(options: argparse.Namespace) -> None:
    scenario = Scenario(
        f"{options.replicas} replicas, {options.arrivals}",
        options.replicas,
        options.rate,
        options.arrivals,
        failing=options.failing,
        outage=options.outage,
    )
    if options.replicas < 1:
        raise ValueError("--replicas must be at least 1")
    slo = Slo(options.ttft, options.tpot)
    usual = {contender.name: contender.parameters for contender in contenders(slo)}
    parameters = {**usual.get(options.policy, {}), **json.loads(options.params)}
    contender = Contender(options.policy, parameters)
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    outcome = run(
        scenario,
        _machine(options),
        contender,
        options.requests,
        options.seed,
        slo,
    )
    took_s = time.perf_counter() - began_s
    print("Simulated.", file=sys.stderr)
    for key, value in asdict(outcome).items():
        print(f"{key:<16} {value}")
    cpu_s = time.process_time() - began_cpu_s
    print(f"{'took':<16} {took_s:.0f} s, of them {cpu_s:.0f} s of CPU time", file=sys.stderr)


def _scenarios(options: argparse.Namespace) -> None:
    chosen = [scenario for scenario in SCENARIOS if not options.only or options.only in scenario.name]
    if not chosen:
        raise ValueError(f"no scenario has {options.only!r} in its name")
    machine = _machine(options)
    print(f"Simulated: {machine.name}, SLO of TTFT {options.ttft:g} s and TPOT {1000 * options.tpot:g} ms.\n")
    for scenario in chosen:
        found = list(_outcomes([scenario], machine, options, options.policies))
        print("\n".join(table_lines(found)), flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.writelines(json.dumps(asdict(outcome)) + "\n" for outcome in found)


def _outcomes(
    scenarios: Sequence[Scenario],
    machine: Machine,
    options: argparse.Namespace,
    titles: Sequence[str] = (),
) -> Iterator[Outcome]:
    """titles: of the contenders; all by default. Raises ValueError for one that there is not."""
    slo = Slo(options.ttft, options.tpot)
    all_contenders = {contender.title: contender for contender in contenders(slo)}
    if unknown := set(titles) - all_contenders.keys():
        raise ValueError(f"no policy {', '.join(sorted(unknown))}; there are {', '.join(all_contenders)}")
    return run_all(
        scenarios,
        machine,
        [contender for title, contender in all_contenders.items() if not titles or title in titles],
        options.seconds,
        options.least,
        options.most,
        options.seed,
        slo,
    )


def _validate(options: argparse.Namespace) -> None:
    print("\n".join(lines(validate(options.table))))


def _page(options: argparse.Namespace) -> None:
    """Writes one table after the other, each as soon as it is made."""
    machines = [Machine.b200("8b", options.acceptance), Machine.b200("14b", options.acceptance)]
    small, large = machines
    known = load_outcomes(options.outcomes or ())

    @cache
    def outcomes(scenario: str) -> Sequence[Outcome]:
        mine = [outcome for outcome in known if outcome.scenario == scenario]
        chosen = [entry for entry in SCENARIOS if entry.name == scenario]
        return mine or list(_outcomes(chosen, _machine(options), options))

    tables: dict[str, Callable[[], Iterable[str]]] = {
        "modes-8b": lambda: capacity.modes_lines(small),
        "modes-14b": lambda: capacity.modes_lines(large),
        "split-8b": lambda: capacity.split_lines(small),
        "split-14b": lambda: capacity.split_lines(large),
        "crossover-8b": lambda: capacity.crossover_lines(small),
        "crossover-14b": lambda: capacity.crossover_lines(large),
        "validation": lambda: lines(validate(options.table)),
        "carried-8b": lambda: capacity.carried_lines(small, SLOS, options.least, options.seed),
        "carried-14b": lambda: capacity.carried_lines(large, SLOS, options.least, options.seed),
        "summary": lambda: summary_lines([o for scenario in SCENARIOS for o in outcomes(scenario.name)]),
    }
    scenarios = {
        f"scenario-{number}": lambda name=scenario.name: table_lines(outcomes(name))
        for number, scenario in enumerate(SCENARIOS, start=1)
    }
    check_places(PAGE, tables)
    check_places(SCENARIO_PAGE, scenarios)
    capacity.plot_modes(machines, str(PAGE.parent / "capacity-modes.png"))
    capacity.plot_crossover(machines, str(PAGE.parent / "capacity-crossover.png"))
    for page, made in ((PAGE, tables), (SCENARIO_PAGE, scenarios)):
        for name, table in made.items():
            if not options.only or options.only in name:
                update(page, name, list(table()))
                print(name, flush=True)


if __name__ == "__main__":
    sys.exit(main())
