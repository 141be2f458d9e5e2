"""What was learned of costs, kept from one start to the next."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from policies.cost import ForwardStats, ModeFactors, ReplicaCosts, RoundYield, StepCost
from policies.cost_model import CostModelParameters
from policies.modes import DEFAULT_FACTOR, LOSSLESS_MODES, DecodePlan, Mode
from replicas.config import ReplicaConfig
from replicas.cost_cache import FORMAT, MAX_BYTES, MAX_FILES, CostCache, read_pooled, starting_costs
from replicas.sampler_file import read_sampler
from replicas.yields_file import MAX_BYTES as MAX_YIELDS_BYTES
from replicas.yields_file import YIELDS_FILE, read_yields, write_yields
from tests.naive_sampler import SAMPLER
from tests.replicas.test_calibration import TRUE, TimedRunner

EMBEDDED = Path(__file__).parents[2] / "replicas" / "checkpoints" / "triad-5m"
PLAN = DecodePlan(Mode.DIFFUSION, 16, 0.9)
KNOWN = RoundYield(PLAN, 15.0, 2.5, 100.0, 24.0, differing=0.02, right=0.97)
COSTS = ReplicaCosts(
    StepCost((1, 512), (2.0, 30.0)),
    (KNOWN,),
    {Mode.AR: ModeFactors((0.2, 0.3), (0.1, 0.1))},
    rates={Mode.AR: ModeFactors((-0.1,), (0.05,))},
)
SWEEP = (ForwardStats(1, 1, 0, 2.0), ForwardStats(512, 1, 0, 30.0))


def a_config(checkpoint: Path, **changes: object) -> ReplicaConfig:
    return ReplicaConfig(model=str(checkpoint), calibration_s=0.0).model_copy(update=changes)


def test_what_was_saved_is_there_at_the_next_start(tmp_path: Path) -> None:
    cache = CostCache(tmp_path, "a")
    assert cache.begin(SWEEP) == (SWEEP, None)
    cache.save(COSTS)
    faster = (ForwardStats(1, 1, 0, 1.5), ForwardStats(512, 1, 0, 31.0), ForwardStats(8, 1, 0, 4.0))
    sweep, learned = CostCache(tmp_path, "a").begin(faster)
    assert sweep == (faster[0], SWEEP[1], faster[2])
    assert learned is not None
    assert learned.costs == COSTS
    assert CostCache(tmp_path, "b").load() is None


@pytest.mark.parametrize(
    "text", ["", "{", '{"format": 1}', "null", '{"format": 1, "sweep": [[1]], "costs": 3}']
)
def test_a_damaged_file_is_as_none_and_said_once(tmp_path: Path, caplog, text: str) -> None:
    CostCache(tmp_path, "a").save(COSTS)
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert CostCache(tmp_path, "a").load() is None
    assert len(caplog.records) == 1
    assert str(path) in caplog.text


def test_another_format_is_as_none(tmp_path: Path) -> None:
    cache = CostCache(tmp_path, "a")
    cache.save(COSTS)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace(f'"format":{FORMAT}', f'"format":{FORMAT + 1}'))
    assert cache.load() is None


def test_a_file_too_long_is_neither_read_nor_written(tmp_path: Path, caplog) -> None:
    cache = CostCache(tmp_path, "a")
    cache.save(COSTS)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text() + " " * MAX_BYTES)
    assert cache.load() is None
    path.unlink()
    many = tuple(replace(KNOWN, tokens=float(number + 1)) for number in range(5000))
    for _ in range(3):
        cache.save(replace(COSTS, yields=many))
    assert not list(tmp_path.iterdir())
    assert len(caplog.records) == 2


def test_a_machine_without_a_file_begins_with_what_the_cluster_has_learned(tmp_path: Path) -> None:
    elsewhere = CostCache(tmp_path / "elsewhere", "a")
    elsewhere.begin(SWEEP)
    pooled = elsewhere.text(COSTS)
    slower = (ForwardStats(1, 1, 0, 2.5), ForwardStats(512, 1, 0, 29.0))
    here = CostCache(tmp_path / "here", "a")
    sweep, learned = here.begin(slower, pooled)
    assert sweep == (SWEEP[0], slower[1])
    assert learned is not None
    assert learned.costs == COSTS
    here.save(replace(COSTS, yields=()))
    _, learned = CostCache(tmp_path / "here", "a").begin(slower, pooled)
    assert learned is not None
    assert learned.costs.yields == (), "its own comes first"


@pytest.mark.parametrize("pooled", ["", "[]", '{"format": 1}', "x" * (MAX_BYTES + 1)])
def test_what_can_not_be_read_of_the_clusters_knowledge_is_as_none(
    tmp_path: Path, caplog, pooled: str
) -> None:
    assert CostCache(tmp_path, "a").begin(SWEEP, pooled) == (SWEEP, None)
    assert len(caplog.records) == 1
    other = CostCache(tmp_path, "a").text(COSTS).replace(f'"format":{FORMAT}', f'"format":{FORMAT + 1}')
    assert CostCache(tmp_path, "a").begin(SWEEP, other) == (SWEEP, None)


def test_without_redis_a_start_goes_on(caplog) -> None:
    assert read_pooled("redis://127.0.0.1:1", "app", "a") is None
    assert len(caplog.records) == 1


def test_a_folder_that_can_not_be_written_costs_nothing(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    cache = CostCache(tmp_path / "file", "a")
    for _ in range(3):
        cache.save(COSTS)
    assert cache.load() is None
    assert len(caplog.records) == 1


def test_a_save_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    cache = CostCache(tmp_path, "a")
    (tmp_path / "costs-a.json" / "taken").mkdir(parents=True)  # nothing can be moved there
    for _ in range(3):
        cache.save(COSTS)
    assert [path.name for path in tmp_path.iterdir()] == ["costs-a.json"]


def test_files_are_few(tmp_path: Path) -> None:
    for number in range(MAX_FILES + 5):
        CostCache(tmp_path, str(number)).save(COSTS)
        os.utime(tmp_path / f"costs-{number}.json", (number + 1, number + 1))
    CostCache(tmp_path, "last").save(COSTS)
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == MAX_FILES
    assert {"costs-last.json", f"costs-{MAX_FILES + 4}.json"} <= names


def test_a_file_is_for_one_kind_of_replica(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = a_config(tmp_path)
    same = a_config(tmp_path, policy="ar", app="other", calibration_s=9.0, log_format="json")
    others = [
        a_config(tmp_path, model="other"),
        a_config(tmp_path, dtype="bfloat16"),
        a_config(tmp_path, num_threads=1),
        a_config(tmp_path, quantization="int8"),
    ]
    CostCache.of(config).save(COSTS)
    assert CostCache.of(same).load() is not None
    assert all(CostCache.of(other).load() is None for other in others)


def test_a_replica_starts_from_the_checkpoints_file_then_from_what_it_learned(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    config = a_config(checkpoint, calibration_s=30.0)
    runner = TimedRunner()
    first = starting_costs(runner, config, CostCache(tmp_path, "a"))
    assert (first.yields, first.factors) == ((), {})
    cache = CostCache(tmp_path, "a")
    cache.begin(())
    cache.save(COSTS)
    again = starting_costs(runner, config, CostCache(tmp_path, "a"))
    learned = replace(KNOWN, differing=None, right=None)  # what the file said of answers went with it
    assert (again.yields, again.factors, again.rates) == ((learned,), COSTS.factors, COSTS.rates)
    other = replace(KNOWN, tokens=9.0)
    write_yields(checkpoint, [other], "a test")
    assert starting_costs(runner, config, CostCache(tmp_path, "a")).yields == (other,)
    assert first.step.ms(1) <= 1.5 * TRUE.ms(1) * 1000


def test_yields_of_a_sampler_that_is_gone_are_left_out(tmp_path: Path) -> None:
    sampled = replace(KNOWN, plan=DecodePlan(Mode.DIFFUSION, 16, risk=0.02))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    config = a_config(checkpoint, calibration_s=30.0)
    write_yields(checkpoint, [KNOWN, sampled], "a test")
    for sampler, expected in ((SAMPLER, (KNOWN, sampled)), (None, (KNOWN,))):
        runner = TimedRunner()
        runner._spec = replace(runner.spec, sampler=sampler)
        assert starting_costs(runner, config, CostCache(tmp_path, "a")).yields == expected


@pytest.mark.parametrize("text", ["[", '{"yields": 3}', '{"source": "", "yields": [{"plan": 1}]}'])
def test_yields_that_can_not_be_read_are_none(tmp_path: Path, caplog, text: str) -> None:
    (tmp_path / YIELDS_FILE).write_text(text)
    assert read_yields(tmp_path) == ()
    assert YIELDS_FILE in caplog.text
    (tmp_path / YIELDS_FILE).write_text(" " * (MAX_YIELDS_BYTES + 1))
    assert read_yields(tmp_path) == ()


def test_the_embedded_checkpoint_has_yields_of_all_plans_that_the_policy_considers() -> None:
    yields = read_yields(EMBEDDED)
    sampler = read_sampler(EMBEDDED)
    assert sampler is not None
    considered = CostModelParameters(quality="any").candidates(tuple(Mode), risk=sampler.risk)
    assert set(considered) <= {entry.plan for entry in yields}
    assert all(entry.num_rounds >= 100 for entry in yields if entry.plan.mode is not Mode.AR)


def test_the_default_factor_keeps_the_embedded_checkpoints_right_answers_and_a_larger_one_does_not() -> None:
    known = {entry.plan: entry for entry in read_yields(EMBEDDED)}
    ar = known[DecodePlan(Mode.AR)]
    assert ar.right is not None
    assert all(entry.differing == 0.0 for plan, entry in known.items() if plan.mode in LOSSLESS_MODES)
    lost = {
        plan.factor: max(ar.right - known[replace(plan, block_length=block)].right for block in (8, 16, 32))
        for plan in known
        if plan.factor is not None
    }
    assert max(factor for factor, points in lost.items() if points <= 0.01) == DEFAULT_FACTOR
    assert max(lost) > DEFAULT_FACTOR


def test_by_the_embedded_checkpoints_sampler_no_fewer_are_right_than_by_the_default_factor_and_sooner():
    known = {entry.plan: entry for entry in read_yields(EMBEDDED)}
    sampler = read_sampler(EMBEDDED)
    assert sampler is not None
    for block in (8, 16, 32):
        by_factor = known[DecodePlan(Mode.DIFFUSION, block)]
        by_sampler = known[DecodePlan(Mode.DIFFUSION, block, risk=sampler.risk)]
        assert by_factor.right is not None
        assert by_sampler.right is not None
        assert by_sampler.right >= by_factor.right
        assert by_sampler.tokens_per_forward > by_factor.tokens_per_forward
