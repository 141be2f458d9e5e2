"""Everything measured on a GPU in one run: `python -m benchmarks.gpu [--json PATH] [--budget-s N]`.

Ceilings of the device; each kernel against them and against torch; milliseconds a forward of the 8B and 14B
architectures (random weights, made on the device) by concurrency and query tokens; what the engine adds to a
round; from these, the best mode by concurrency and acceptance. It needs torch, Triton and a CUDA device, no
Ray. Results are written as they come, so a run that is cut short leaves what it had found.

`--smoke` runs all of it at tiny sizes in Triton's interpreter on the CPU; its times mean nothing.
"""

import argparse
import csv
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.costs import step_cost_table

if TYPE_CHECKING:
    from benchmarks.gpu.model import Work
    from benchmarks.gpu.timing import Clock, Report

ROOT = Path(__file__).parents[1]
ACCEPTANCE = ROOT / "data" / "acceptance.json"
BUDGET_S = 510.0


class Bench:
    """The whole run. Later sections are left out, and named, when the budget runs out."""

    def __init__(self, report: "Report", clock: "Clock", path: Path, *, smoke: bool):
        self._report = report
        self._clock = clock
        self._path = path
        self._smoke = smoke

    def run(self) -> None:
        from benchmarks.gpu.timing import Ceilings

        ceilings = Ceilings.measure(self._clock, 256 if self._smoke else 8192)
        self._report.ceilings = dataclasses.asdict(ceilings)
        self._say(f"ceilings: copy {ceilings.copy_gb_s:.0f} GB/s, bf16 {ceilings.bf16_tflop_s:.0f} TFLOP/s")
        works = self._works()
        self._section(f"{works[0].name} model", 0.0, lambda: self._model(works[0]))
        self._section("kernels", 0.0, self._kernels)
        for work in works[1:]:
            self._section(f"{work.name} model", 40.0, partial(self._model, work))
        self._conclude()

    def _works(self) -> "list[Work]":
        from benchmarks.gpu.model import Work
        from benchmarks.gpu.sweep import QUERIES

        if self._smoke:
            tiny = Work(
                "tiny", 16, num_cached=5, max_concurrency=1, max_queries=4, num_rounds=2, dtype=torch.float32
            )
            return [tiny]
        return [Work("8B", max_queries=QUERIES[-1]), Work("14B", max_queries=QUERIES[-1])]

    def _section(self, name: str, needs_s: float, run: Callable[[], None]) -> None:
        """Runs a section; one that fails is reported, and the others go on."""
        if self._clock.left_s < needs_s or self._clock.left_s <= 0:
            self._report.cut.append(name)
            return
        began_s = time.monotonic()
        try:
            run()
        except Exception as error:
            if self._smoke:
                raise
            self._report.failures.append(f"{name}: {type(error).__name__}: {error}")
        self._say(f"-- {name}: {time.monotonic() - began_s:.0f} s, {self._clock.left_s:.0f} s left")
        self._write()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _take(
        self, name: str, rows: Iterable[dict[str, object]], into: list[dict[str, object]], keep_s: float
    ) -> None:
        """Takes rows as they come, and writes after each; stops when fewer than keep_s seconds are left."""
        for row in rows:
            into.append(row)
            self._say("  " + "  ".join(f"{key} {value}" for key, value in row.items() if value is not None))
            self._write()
            if self._clock.left_s < keep_s:
                self._report.cut.append(f"the rest of {name}")
                return

    def _kernels(self) -> None:
        from benchmarks.gpu.kernels import KernelBench, Shapes
        from benchmarks.gpu.model import published_config
        from benchmarks.gpu.timing import Ceilings

        if self._smoke:
            shapes = Shapes(published_config("tiny"), 16, 1, (20,), 4, (1,), 4, (2,), False, torch.float32)
        else:
            rows = (1, 32, 512, 2048)
            shapes = Shapes(
                published_config("8B"), 64, 32, (4096, 16384), 32, (1, 8, 32), 512, rows, True, torch.bfloat16
            )
        ceilings = Ceilings(**self._report.ceilings)
        bench = KernelBench(shapes, self._clock, ceilings)
        self._take("kernels", bench.rows(), self._report.kernels, 130.0 if not self._smoke else 0.0)

    def _model(self, work: "Work") -> None:
        from benchmarks.gpu.model import make_runner
        from benchmarks.gpu.sweep import forward_rows, overhead_row
        from policies.modes import Mode
        from replicas.model.cuda.runner import Options

        keep_s = {"8B": 200.0, "14B": 10.0, "tiny": 0.0}[work.name]
        runner = make_runner(work, self._clock.device, Options())
        sweep = forward_rows(runner, work, self._clock, keep_s)
        self._take(f"{work.name} sweep", sweep, self._report.sweep, keep_s)
        for mode in (Mode.AR, Mode.SELF_SPECULATION):
            for concurrency in sorted({1, min(64, work.max_concurrency)}):
                if work.name == "14B" or self._clock.left_s < keep_s:
                    continue
                row = overhead_row(runner, work, self._clock, mode, concurrency)
                self._take("overhead", [row], self._report.overhead, 0.0)

    def _conclude(self) -> None:
        from benchmarks.crossover import crossovers
        from benchmarks.gpu.targets import targets

        figures = json.loads(ACCEPTANCE.read_text())
        self._report.crossovers = crossovers(self._report.sweep, figures)
        self._report.targets = targets(self._report)
        self._write()
        for row in self._report.crossovers:
            self._say("  " + "  ".join(f"{key}: {value}" for key, value in row.items()))
        for row in self._report.targets:
            self._say("  " + "  ".join(str(value) for value in row.values()))
        for name, values in (("cut", self._report.cut), ("failed", self._report.failures)):
            if values:
                self._say(f"{name}: {'; '.join(values)}")

    def _write(self) -> None:
        """Writes the report whole or not at all, and the sweep in the public form and the simulator's."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self._report), indent=1) + "\n")
        partial.replace(self._path)
        if self._report.sweep:
            with self._path.with_suffix(".csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(self._report.sweep[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(self._report.sweep)
        for model in dict.fromkeys(str(row["model"]) for row in self._report.sweep):
            table = step_cost_table(model, self._report.about, self._report.sweep, self._report.overhead)
            path = self._path.with_name(f"{self._path.stem}-step-cost-{model.lower()}.json")
            path.write_text(json.dumps(table, indent=1) + "\n")

    def _say(self, line: str) -> None:
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=ROOT / "results" / "gpu.json", help="where results go")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for everything")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU, to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    elif not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: torch sees no CUDA device; --smoke runs it at tiny sizes on the CPU")
    import triton

    from benchmarks.gpu.timing import Clock, Report

    device = torch.device("cpu" if options.smoke else "cuda")
    about: dict[str, object] = {
        "device": "CPU, interpreted: times mean nothing" if options.smoke else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": "float32" if options.smoke else "bfloat16",
        "weights": "random",
    }
    print("  ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    bench = Bench(Report(about), Clock(device, options.budget_s), options.json, smoke=options.smoke)
    torch.manual_seed(0)
    with torch.inference_mode():
        bench.run()


if __name__ == "__main__":
    main()
