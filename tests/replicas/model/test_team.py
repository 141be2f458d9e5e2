"""How many threads take part in the native forward's runs, by paces that a test makes up."""

import ctypes
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from replicas.model.native import build
from tests.replicas.model.conftest import LogitsProbe, Pages, poisoned_runner, prompt, segment

HARNESS = """
#include "team.h"
using triad::Team;
extern "C" {
void* team_open(int64_t num_threads) { return new Team((int)num_threads); }
void team_close(void* team) { delete static_cast<Team*>(team); }
int64_t team_size(void* team) { return static_cast<Team*>(team)->size(); }
void team_note(void* team, double wall_s, double cpu_s, double waited_s, int64_t num_own, int64_t num_tasks) {
  static_cast<Team*>(team)->note(wall_s, cpu_s, waited_s, num_own, num_tasks);
}
}
"""
Pace = Callable[[int], float]
"""The wall time of a unit of work, by the size of the team."""


class MadeUp:
    """A Team whose runs are made up. It is told the CPU time of a leading thread that did its share."""

    def __init__(self, library: ctypes.CDLL, num_threads: int):
        self._library = library
        self._team = ctypes.c_void_p(library.team_open(ctypes.c_int64(num_threads)))

    @property
    def size(self) -> int:
        return int(self._library.team_size(self._team))

    def run(
        self, pace: Pace, seconds: float, *, work_s: float = 0.0006, cpu_is_known: bool = True
    ) -> Counter[int]:
        """Runs for so many seconds of wall time -> those that each size ran."""
        spent: Counter[int] = Counter()
        microseconds = int(1e6 * seconds)
        while spent.total() < microseconds:
            size = self.size
            wall_s = work_s * pace(size)
            waited_s = 0.1 * work_s
            cpu_s = work_s / size + waited_s if cpu_is_known else 0.0
            doubles = map(ctypes.c_double, (wall_s, cpu_s, waited_s))
            self._library.team_note(self._team, *doubles, ctypes.c_int64(60), ctypes.c_int64(60 * size))
            spent[size] += max(1, round(1e6 * wall_s))
        return spent

    def close(self) -> None:
        self._library.team_close(self._team)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("team")
    (folder / "team.cpp").write_text(HARNESS)
    made = folder / "team.so"
    flags = ("-O1", "-std=c++20", "-shared", "-fPIC", f"-I{build.SOURCES}")
    build._run(build._compiler(), *flags, str(folder / "team.cpp"), "-o", str(made))
    library = ctypes.CDLL(str(made))
    library.team_open.restype = ctypes.c_void_p
    library.team_size.restype = ctypes.c_int64
    return library


@pytest.fixture
def team_of(library: ctypes.CDLL) -> Iterator[Callable[[int], MadeUp]]:
    teams: list[MadeUp] = []

    def make(num_threads: int) -> MadeUp:
        teams.append(MadeUp(library, num_threads))
        return teams[-1]

    yield make
    for team in teams:
        team.close()


def by_size(*paces: float) -> Pace:
    return lambda size: paces[size - 1]


QUIET, DISTURBED, SMALL = by_size(1.0, 0.6), by_size(1.0, 4.0), by_size(1.0, 1.6)


@pytest.mark.parametrize("work_s", [0.0001, 0.0006, 0.03, 0.5])
@pytest.mark.parametrize(("pace", "best"), [(QUIET, 2), (DISTURBED, 1), (SMALL, 1)])
def test_the_faster_team_runs_but_for_trials(
    team_of: Callable[[int], MadeUp], pace: Pace, best: int, work_s: float
) -> None:
    team = team_of(2)
    team.run(pace, 2.0 + 20 * work_s, work_s=work_s)
    spent = team.run(pace, 60.0, work_s=work_s)
    longest_s = max(0.03, 2 * work_s) * max(pace(1), pace(2))
    assert spent[best] > (1 - 1.1 * longest_s / 1.0) * spent.total()
    assert len(spent) == 2  # the other one is tried all the same


def test_a_neighbour_that_comes_and_goes_is_followed(team_of: Callable[[int], MadeUp]) -> None:
    team = team_of(2)
    for _ in range(3):
        team.run(QUIET, 20.0)
        assert team.run(DISTURBED, 1.0)[1] > 0.6e6
        assert team.run(DISTURBED, 20.0)[1] > 19e6
        team.run(QUIET, 3.5)
        assert team.run(QUIET, 5.0)[2] > 4.8e6


def test_the_best_of_many_sizes_is_found(team_of: Callable[[int], MadeUp]) -> None:
    team = team_of(8)
    pace = by_size(1.0, 0.6, 0.45, 0.36, 0.33, 0.37, 0.45, 0.6)
    team.run(pace, 5.0)
    assert team.run(pace, 30.0)[5] > 0.97 * 30e6


@pytest.mark.parametrize("best", [1, 2])
def test_noise_seldom_misleads(team_of: Callable[[int], MadeUp], best: int) -> None:
    rng = random.Random(best)
    means = by_size(1.0, 1.4) if best == 1 else by_size(1.0, 0.7)
    team = team_of(2)
    spent = team.run(lambda size: means(size) * rng.lognormvariate(0, 0.6), 60.0)
    assert spent[best] > 0.9 * spent.total()


def test_without_cpu_times_the_team_stays_whole(team_of: Callable[[int], MadeUp]) -> None:
    assert set(team_of(4).run(by_size(1.0, 1.0, 1.0, 1.0), 5.0, cpu_is_known=False)) == {4}


@pytest.mark.parametrize("num_threads", [2, 3])
def test_results_are_the_same_by_teams_of_any_size(tiny_folder: Path, num_threads: int) -> None:
    """Steps go on until teams of two sizes have run them."""
    tokens, pages = prompt(60, seed=3), Pages(60, 16).table(60)
    torch.set_num_threads(num_threads)
    try:
        runner = poisoned_runner(tiny_folder, "native", page_size=16, num_pages=60)
    finally:
        torch.set_num_threads(1)
    model, probe = runner._model, LogitsProbe(runner)
    step = segment(tokens, pages)
    expected = probe(step)[0]
    sizes = set()
    while len(sizes) < 2:
        sizes.add(model._library.triad_team_size(ctypes.c_void_p(model._context), ctypes.c_int64(60)))
        assert torch.equal(probe(step)[0], expected)
