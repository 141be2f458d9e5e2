"""What an engine tells of itself, for those who decide elsewhere."""

import pytest

from policies.modes import Mode
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.errors import TriadError
from replicas.messages import DecodingOptions, SamplingParams
from tests.replicas.engine.scripted import ScriptedRunner
from tests.replicas.engine.test_engine import Clock, drain


def num_ended(engine: Engine) -> int:
    return engine.snapshot("r").num_ended


def test_every_end_is_counted_once_in_whatever_way_it_comes() -> None:
    clock = Clock()
    engine = Engine(ScriptedRunner(), EngineConfig(max_running=2), clock=clock)
    long = SamplingParams(max_tokens=50, ignore_eos=True)
    engine.submit("done", [5], SamplingParams(max_tokens=1))
    engine.submit("late", [5], long, timeout_s=1.0)
    engine.submit("cancelled", [5], long)
    engine.submit("cancelled while it waits", [5], long)
    assert num_ended(engine) == 0
    engine.step()
    assert num_ended(engine) == 1
    engine.cancel("cancelled while it waits")
    engine.cancel("cancelled while it waits")
    assert num_ended(engine) == 2
    clock.now_s += 2.0
    engine.step()
    assert num_ended(engine) == 3
    engine.cancel("cancelled")
    assert num_ended(engine) == 4
    with pytest.raises(TriadError):
        engine.submit("refused", [], long)
    assert num_ended(engine) == 4
    engine.submit("one more", [5], SamplingParams(max_tokens=3))
    drain(engine)
    assert num_ended(engine) == 5
    assert engine.snapshot("r").num_in_flight == 0


@pytest.mark.parametrize(
    ("options", "is_clients"),
    [
        (DecodingOptions(Mode.DIFFUSION), False),
        (DecodingOptions(Mode.DIFFUSION, block_length=8), True),
        (DecodingOptions(Mode.DIFFUSION, threshold=0.77), True),
        (DecodingOptions(Mode.DIFFUSION, max_steps=2), True),
        (DecodingOptions(Mode.SELF_SPECULATION, block_length=5), True),
        (DecodingOptions(Mode.SELF_SPECULATION), False),
    ],
)
def test_rounds_whose_parameters_a_client_has_set_say_so(options, is_clients) -> None:
    assert clients_rounds(SamplingParams(max_tokens=20, ignore_eos=True), options) == {is_clients}


def clients_rounds(sampling: SamplingParams, options: DecodingOptions) -> set[bool]:
    engine = Engine(ScriptedRunner())
    engine.submit("r", [5, 6, 7], sampling, options)
    drain(engine)
    return {made.is_clients for made in engine.scheduler.counters.rounds}


@pytest.mark.parametrize("mode", [Mode.DIFFUSION, Mode.SELF_SPECULATION])
def test_rounds_of_diffusion_that_no_policy_would_choose_say_so(mode: Mode) -> None:
    """With log-probabilities, as with penalties or a form, auto keeps to ar and self-speculation."""
    sampling = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=0)
    assert clients_rounds(sampling, DecodingOptions(mode)) == {mode is Mode.DIFFUSION}
