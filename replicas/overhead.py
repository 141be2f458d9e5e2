"""What a step takes on the host beside its forward: scheduling, commit, text and events.

Measured with a runner that computes nothing, so that nothing but this is in it.
"""

import time
from collections.abc import Callable, Iterator

import numpy as np

from policies.cost_fit import MIN_MS, nonnegative_least_squares
from policies.modes import Mode
from replicas.calibration import NO_OVERHEAD, StepOverhead
from replicas.config import EngineConfig
from replicas.engine.batch import ModelSpec, ScheduledBatch, SegmentOutput
from replicas.engine.engine import Engine
from replicas.messages import DecodingOptions, GenerateRequest, SamplingParams
from replicas.preparation import Prepared
from replicas.requests import RequestTable
from replicas.stats import EngineSnapshot
from replicas.text import TextCodec

NUM_SEQUENCES = (1, 4, 16, 64)
NUM_TOKENS = 96
"""The tokens of each answer."""


class _IdleRunner:
    """A Runner that computes nothing: every row is sure of one token, so that every draft is accepted."""

    def __init__(self, spec: ModelSpec, token_id: int):
        self.spec = spec
        self.batch = ScheduledBatch(())
        self._token_id = token_id

    def run(self, batch: ScheduledBatch) -> tuple[SegmentOutput, ...]:
        self.batch = batch
        return tuple(
            SegmentOutput((self._token_id,) * len(segment.wanted), (1.0,) * len(segment.wanted))
            for segment in batch.segments
        )


def measure_overhead(
    spec: ModelSpec,
    config: EngineConfig,
    codec: TextCodec,
    clock: Callable[[], float] = time.perf_counter,
) -> StepOverhead:
    """Measures steps of a scratch engine, and what is made of them, in each mode with few and many requests;
    the least of each shape.

    None where steps are begun ahead of their turn, since the device works meanwhile, nor where a context has
    no room for more than a prompt and a token.
    clock: seconds
    """
    if spec.runs_ahead:
        return NO_OVERHEAD
    least: dict[tuple[int, int], float] = {}
    for mode in spec.modes:
        for num_sequences in NUM_SEQUENCES:
            if num_sequences <= config.max_running:
                for *shape, ms in _steps(spec, config, codec, mode, num_sequences, clock):
                    least[shape[0], shape[1]] = min(ms, least.get((shape[0], shape[1]), ms))
    if not least:
        return NO_OVERHEAD
    relative = np.array([(1.0, *shape) for shape in least]) / np.array([*least.values()])[:, None]
    found = nonnegative_least_squares(relative.T @ relative, relative.sum(axis=0), np.zeros(3))
    return StepOverhead(*(float(ms) for ms in found))


def _steps(
    spec: ModelSpec,
    config: EngineConfig,
    codec: TextCodec,
    mode: Mode,
    num_sequences: int,
    clock: Callable[[], float],
) -> Iterator[tuple[int, int, float]]:
    """Yields the segments, the rows and the milliseconds of each step that is no prompt's."""
    prompt, token_id = _tokens(spec, codec)
    runner = _IdleRunner(spec, token_id)
    engine = Engine(runner, config, clock=clock)
    requests = RequestTable(engine, codec, "", clock, lambda channel_id: True, lambda events: None)
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for number in range(num_sequences):
        request = GenerateRequest(str(number), "", (tuple(prompt),), sampling, DecodingOptions(mode=mode))
        requests.submit(request, Prepared([prompt], [None], [None]))
    while engine.has_work:
        began_s = clock()
        progress = engine.step()
        requests.publish(progress)
        EngineSnapshot.read(engine, "")
        ms = 1000.0 * (clock() - began_s)
        segments = runner.batch.segments
        if runner.batch.mode is mode:
            yield len(segments), sum(len(segment.wanted) for segment in segments), max(ms, MIN_MS)


def _tokens(spec: ModelSpec, codec: TextCodec) -> tuple[list[int], int]:
    """Returns a prompt, and a token to answer with that is text and no end."""
    prompt = codec.encode("1 2 3 4 5 6 7 8", adds_special_tokens=False)
    return prompt[: max(1, spec.max_context // 2)], prompt[-1]
