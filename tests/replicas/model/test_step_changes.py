"""What is decoded of a step's changes is the step, whatever the steps before it were. Pure."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from policies.modes import Mode
from replicas.config import EngineConfig
from replicas.engine.batch import ScheduledBatch, Segment, SegmentOutput
from replicas.engine.engine import Engine
from replicas.engine.history import NO_TOKENS, History
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.step_changes import KEPT_STEPS, Step, StepDecoder, StepEncoder
from tests.replicas.engine.scripted import (
    Device,
    ScriptedGrammar,
    ScriptedRunner,
    ScriptedStep,
    naive_ar,
    tokens_of,
)


class Channel:
    """Both ends, in one process."""

    def __init__(self) -> None:
        self.encoder, self.decoder = StepEncoder(), StepDecoder()
        self.num_bytes: list[int] = []

    def send(self, batch: ScheduledBatch, follows: bool = False) -> ScheduledBatch:
        message = self.encoder.encode(Step(batch, follows))
        self.num_bytes.append(len(message))
        received = self.decoder.decode(message)
        assert received == Step(batch, follows)
        for sent, came in zip(batch.segments, received.batch.segments, strict=True):
            if len(sent.history):
                # As penalties see them, whatever was counted on this side before.
                for mine, theirs in zip(counts(sent), counts(came), strict=True):
                    assert mine.tolist() == theirs.tolist()
        return received.batch


def counts(segment: Segment):
    found = segment.history.counts
    return found.ids, found.times


class Sent:
    """A runner that is told of its steps over a channel."""

    def __init__(self, runner: ScriptedRunner | Device):
        self._runner = runner
        self.channel = Channel()
        self.spec = runner.spec

    def run(self, batch: ScheduledBatch) -> Sequence[SegmentOutput]:
        return self._runner.run(self.channel.send(batch))

    def begin(self, batch: ScheduledBatch, before: ScriptedStep | None) -> ScriptedStep:
        return self._runner.begin(self.channel.send(batch, before is not None), before)

    def can_be_followed(self, segment: Segment) -> bool:
        return self._runner.can_be_followed(segment)


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_an_engine_whose_steps_are_sent_makes_the_same_tokens(seed: int, runs_ahead: bool) -> None:
    """Any requests, arriving at any time, with too few pages for all of them."""
    rng = random.Random(seed)
    scripted = ScriptedRunner(num_pages=rng.choice((24, 200)), page_size=rng.choice((4, 16)))
    runner = Sent(Device(scripted) if runs_ahead else scripted)
    engine = Engine(runner, EngineConfig(max_running=6, max_step_tokens=192))
    wanted, made = {}, {}
    for number in range(40):
        prompt = [rng.randrange(3, 50) for _ in range(rng.randint(1, 40))]
        mode = rng.choice((Mode.AR, Mode.DIFFUSION, Mode.SELF_SPECULATION))
        options = DecodingOptions(mode, None if mode is Mode.AR else 4)
        penalty = rng.choice((0.0, 0.0, 0.3))
        sampling = SamplingParams(max_tokens=rng.randint(1, 20), frequency_penalty=penalty)
        grammar = None
        if mode is not Mode.DIFFUSION and rng.random() < 0.2:
            grammar = ScriptedGrammar(6)
        sequence = engine.submit(str(number), prompt, sampling, options, grammar=grammar)
        made[sequence.seq_id] = []
        if grammar is None and mode is not Mode.DIFFUSION:
            wanted[sequence.seq_id] = naive_ar(prompt, sampling.max_tokens)
        for _ in range(rng.randint(0, 8)):
            note(engine, made)
    while engine.has_work:
        note(engine, made)
    for seq_id, tokens in wanted.items():
        assert made[seq_id] == tokens
    assert len(runner.channel.num_bytes) > 100


def note(engine: Engine, made: dict[int, list[int]]) -> None:
    for progress in engine.step():
        made[progress.sequence.seq_id] += tokens_of([progress])


def some_batch(rng: random.Random, last: dict[int, Segment], histories: dict[int, History]) -> ScheduledBatch:
    """Segments of which any field may be as before or not, whether or not that makes sense."""
    segments = []
    for seq_id in rng.sample(range(12), rng.randint(0, 8)):
        before = last.get(seq_id)
        if before is None or rng.random() < 0.1:
            before = Segment(seq_id, 0, (1,), (), 1, False, (0,), SamplingParams(seed=seq_id))
        changes = {
            "start": before.start + rng.randint(0, 3),
            "token_ids": tuple(rng.choices(range(99), k=rng.randint(1, 4))),
            "pages": rng.choice((before.pages, before.pages[:-1], (*before.pages, 7), (9,) * 5)),
            "num_causal": rng.randint(0, 2),
            "adapter": rng.random() < 0.5,
            "wanted": rng.choice(((), (0,), (0, 1))),
            "sampling": rng.choice((before.sampling, SamplingParams(temperature=rng.random()))),
            "prompt_len": rng.randint(0, 3),
            "fixed": rng.choice(((), (3, 4))),
            "allowed": rng.choice(((), (None, bytes(rng.choices(range(256), k=3))))),
            "follows": rng.choice((None, before, replace(before, token_ids=(5,), start=before.start + 1))),
        }
        changed = rng.sample(sorted(changes), rng.randint(0, len(changes)))
        made = replace(before, **{"follows": None} | {name: changes[name] for name in changed})
        if rng.random() < 0.3:
            history = histories.get(seq_id)
            if history is None or rng.random() < 0.2:
                history = histories[seq_id] = History(rng.choices(range(99), k=rng.randint(1, 9)), 4)
            for _ in range(rng.randint(0, 3)):
                history.append(rng.randrange(99))
            made = replace(made, history=history.first(rng.randint(0, len(history))))
        elif rng.random() < 0.3:
            made = replace(made, history=NO_TOKENS)
        last[seq_id] = made
        segments.append(made)
    return ScheduledBatch(tuple(segments), rng.choice((None, *Mode)))


@pytest.mark.parametrize("seed", range(10))
def test_any_change_arrives(seed: int) -> None:
    rng = random.Random(seed)
    channel = Channel()
    last: dict[int, Segment] = {}
    histories: dict[int, History] = {}
    for _ in range(300):
        channel.send(some_batch(rng, last, histories), rng.random() < 0.5)


def steady(number: int, step: int, num_pages: int = 200, **fields: object) -> Segment:
    pages = tuple(range(1000 * number, 1000 * number + num_pages))
    return Segment(number, 3000 + step, (step,), pages, 1, False, (0,), SAMPLING[number % 64], **fields)


SAMPLING = [SamplingParams(max_tokens=9, seed=number) for number in range(64)]


def test_a_token_more_takes_few_bytes_whatever_the_context() -> None:
    channel = Channel()
    histories = [History(range(3000), 3000) for _ in SAMPLING]
    for step in range(4):
        for history in histories:
            history.append(step)
        segments = [
            steady(number, step, 200 + step, history=history.first(3001 + step))
            for number, history in enumerate(histories)
        ]
        channel.send(ScheduledBatch(tuple(segments), Mode.AR))
    first, *others = channel.num_bytes
    assert first > 64 * 4000
    assert max(others) < 64 * 60


def test_who_has_not_come_for_long_is_forgotten_on_both_sides() -> None:
    channel = Channel()
    for number in range(3 * KEPT_STEPS):
        channel.send(ScheduledBatch((steady(0, number), steady(1 + number, 0))))
    for side in (channel.encoder, channel.decoder):
        assert len(side._memory) < KEPT_STEPS + 2
    channel = Channel()
    channel.send(ScheduledBatch((steady(0, 0),)))
    for step in range(KEPT_STEPS + 2):
        channel.send(ScheduledBatch((steady(1, step),)))
        channel.send(ScheduledBatch(()))
    assert len(channel.encoder._memory) == len(channel.decoder._memory) == 1
    channel.send(ScheduledBatch((steady(0, 1),)))
    assert channel.num_bytes[-1] > channel.num_bytes[2] + 200, "sent whole"
