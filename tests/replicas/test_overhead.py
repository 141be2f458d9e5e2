"""What steps take beside their forwards, by a clock that counts what is done."""

import time

import pytest

from policies.cost import ForwardStats
from policies.modes import Mode
from replicas.calibration import NO_OVERHEAD, StepOverhead, merged, sweep
from replicas.config import EngineConfig, ReplicaConfig
from replicas.engine.batch import ModelSpec
from replicas.overhead import measure_overhead
from replicas.text import TextCodec
from tests.replicas.test_calibration import TimedRunner

MODES = (Mode.AR, Mode.SELF_SPECULATION, Mode.DIFFUSION)
OVERHEAD = StepOverhead(5.0, 0.5, 0.05)


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec.load(ReplicaConfig().checkpoint)


def a_spec(modes: tuple[Mode, ...] = MODES, max_context: int = 512, runs_ahead: bool = False) -> ModelSpec:
    return ModelSpec(modes, 3, frozenset({2}), max_context, 1024, 16, 2048, runs_ahead=runs_ahead)


def test_it_is_that_of_the_processor_time_of_steps(codec: TextCodec) -> None:
    found = measure_overhead(a_spec(), EngineConfig(), codec, time.process_time)
    assert found.step_ms > 0
    assert found.segment_ms > 0
    assert 64 * found.segment_ms + 64 * found.row_ms > found.step_ms  # it is per sequence, for the most part
    assert found.ms(64, 64) > 4 * found.ms(4, 4)


@pytest.mark.parametrize(
    ("spec", "max_running"), [(a_spec((Mode.AR,)), 64), (a_spec(), 1), (a_spec(max_context=10), 4)]
)
def test_it_keeps_to_modes_places_and_context(spec: ModelSpec, max_running: int, codec: TextCodec) -> None:
    found = measure_overhead(spec, EngineConfig(max_running=max_running), codec)
    assert found.ms(1, 1) > 0


def test_where_a_context_has_room_for_one_token_there_is_none(codec: TextCodec) -> None:
    assert measure_overhead(a_spec(max_context=2), EngineConfig(), codec) == NO_OVERHEAD


def test_where_steps_are_begun_ahead_the_device_works_meanwhile(codec: TextCodec) -> None:
    assert measure_overhead(a_spec(runs_ahead=True), EngineConfig(), codec) == NO_OVERHEAD


def test_a_sweep_has_it_beside_each_forward() -> None:
    def swept(overhead: StepOverhead) -> dict[tuple[int, int, int], ForwardStats]:
        runner = TimedRunner()
        found = sweep(
            runner, max_running=64, max_step_tokens=512, budget_s=30.0, overhead=overhead, clock=runner.clock
        )
        return {forward[:3]: forward for forward in merged(found)}

    alone, whole = swept(NO_OVERHEAD), swept(OVERHEAD)
    assert alone.keys() == whole.keys()
    beside = {shape: whole[shape].ms - alone[shape].ms for shape in alone}
    assert beside[64, 64, 64 * 64] == pytest.approx(OVERHEAD.ms(64, 64))
    assert beside[256, 16, 16 * 64] == pytest.approx(OVERHEAD.ms(16, 256))
    assert beside[512, 1, 0] == pytest.approx(OVERHEAD.ms(1, 1))  # of a prompt's rows the last is sampled
