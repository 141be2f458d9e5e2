"""Sizes, padding and what the device completes: what a graph replays must not depend on what it was captured
with."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from policies.modes import DecodePlan, Mode
from replicas.engine.ahead import Worth, next_start, open_request, settled
from replicas.engine.batch import Segment, SegmentOutput
from replicas.engine.decoders.self_speculation import PROB_ONE
from replicas.kernels.follow import follow, pack
from replicas.kernels.sample_rows import Drawn
from replicas.messages import SamplingParams
from replicas.model.config import ModelConfig
from replicas.model.cuda.choices import Choices
from replicas.model.cuda.graphs import GraphCache
from replicas.model.cuda.inputs import HostStep, StepSize, sections_of
from replicas.model.cuda.opens import opens_of
from replicas.model.cuda.sampling import first_rows
from replicas.model.cuda.sizes import GraphSizes
from replicas.model.cuda.staging import Staging
from replicas.model.runner import spec_of
from tests.replicas.model.conftest import commit_and_masks, segment
from tests.tiny_checkpoint import MASK_TOKEN_ID, tiny_config

CONFIG = ModelConfig.parse(tiny_config())
PAGE = 8
PLACES = (12, 8, 4)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sizes(*counts: int) -> StepSize:
    return StepSize(*counts, num_items=(1, 0, 0), has_adapter=False)


def test_written_sections_are_padded_and_in_place() -> None:
    segments = [
        segment([7, 8, 9], (4, 2), start=6, num_causal=0, adapter=True, wanted=(1, 2)),
        segment([3], (5,), start=2),
    ]
    host = HostStep.pack(segments, CONFIG, PAGE, PLACES)
    size = StepSize(6, 4, 2, 4, (0, 3, 0), True)
    buffer = np.full(host.num_ints(size) + 3, 99, dtype=np.int32)
    used = host.write(buffer, size)
    assert (buffer[used:] == 99).all()
    *places, (_, at, _) = size.places()
    parts = {name: buffer[first:end].tolist() for name, first, end in places}
    assert all(first % 4 == 0 for _, first, _ in places), (
        "kernels are compiled for pointers aligned to 16 bytes"
    )
    assert parts["token_ids"] == [7, 8, 9, 3, 0, 0]
    assert parts["positions"] == [6, 7, 8, 2, 0, 0]
    assert parts["slots"] == [4 * PAGE + 6, 4 * PAGE + 7, 2 * PAGE, 5 * PAGE + 2, -1, -1]
    assert parts["wanted"] == [1, 2, 3, 0]
    assert parts["adapter"] == [0, 1, 2, -1, -1, -1]
    assert parts["wanted_adapter"] == [0, 1, -1, -1]
    assert parts["segments"] == [0, 6, 3, 0, 0, 3, 2, 1, 1, 2, *[0] * 10]
    assert parts["work0"] == []
    assert parts["work1"] == [0, 0, 0, 1, 128, 0, 1, 0, 0, 1, 128, 0, *[-1] * 6]
    assert buffer[at:used].tolist() == [4, 2, 5]


def test_a_commit_and_the_block_behind_it_are_one_segment() -> None:
    segments = [segment([3], (5,), start=2), commit_and_masks([7, 8, 9], 3, (4, 2), start=4)]
    host = HostStep.pack(segments, CONFIG, PAGE, PLACES)
    found = {name: values.tolist() for name, values in host.sections.items()}
    assert found["token_ids"] == [3, 7, 8, 9, *[MASK_TOKEN_ID] * 3]
    assert found["positions"] == [2, 4, 5, 6, 7, 8, 9]
    assert found["slots"][1:] == [*range(4 * PAGE + 4, 5 * PAGE), 2 * PAGE, 2 * PAGE + 1]
    assert found["wanted"] == [0, 3, 5, 6]
    assert found["segments"] == [0, 2, 1, 1, 0, 1, 4, 6, 3, 1]
    assert not host.size.has_adapter


def test_adapter_free_steps_have_no_adapter_sections() -> None:
    host = HostStep.pack([segment([3], (5,), start=2)], CONFIG, PAGE, PLACES)
    assert dict(host.size.sections())["adapter"] == 0
    assert not GraphSizes(CONFIG, PLACES).padded(host.size).has_adapter


def test_graphs_are_captured_once_and_kept() -> None:
    captured, replayed = [], []

    def capture(size: StepSize):
        captured.append(size)
        return lambda: replayed.append(size)

    cache = GraphCache(capture)
    a, b = sizes(1, 1, 0, 1), sizes(2, 2, 0, 2)
    for size in (a, b, a):
        cache.run(size)
    assert captured == [a, b]
    assert replayed == [a, b, a]
    assert len(cache) == 2


def test_a_failed_capture_is_not_kept() -> None:
    def capture(size: StepSize):
        raise RuntimeError("out of memory")

    cache = GraphCache(capture)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.run(sizes(1, 1, 0, 1))
    assert len(cache) == 0


def some_step(rng: random.Random, seq_id: int) -> tuple[Segment, SegmentOutput]:
    """The end of a prompt, a step or a verify, often with a draft behind it, and what it may have given."""
    num_drafted = rng.choice((0, rng.randrange(70)))
    num_causal, num_masks = 1 + num_drafted, rng.choice((0, rng.randrange(2, 70)))
    is_prompt = num_drafted > 0 and rng.random() < 0.3
    tokens = [rng.randrange(90) for _ in range(num_causal)]
    wanted = (num_causal - 1,) if is_prompt else range(num_causal)
    bias = ((11, 1.5),) if rng.random() < 0.3 else ()
    sampling = SamplingParams(
        temperature=rng.choice((0.0, 0.8)), seed=seq_id, top_p=0.9, top_k=20, min_p=0.1, logit_bias=bias
    )
    made = segment(
        [*tokens, *[MASK_TOKEN_ID] * num_masks],
        tuple(rng.sample(range(200), 60)),
        start=rng.randrange(30),
        num_causal=num_causal,
        adapter=num_masks > 0,
        wanted=(*wanted, *range(num_causal + 1, num_causal + num_masks)),
        sampling=sampling,
        seq_id=seq_id,
    )
    own = [] if is_prompt else tokens[1:]
    if own and rng.random() < 0.5:
        own[rng.randrange(len(own))] = 91
    chosen = [*own, *(rng.randrange(90) for _ in range(len(made.wanted) - len(own)))]
    sure = rng.choice((0.5, 0.9, 0.999))
    return made, SegmentOutput(tuple(chosen), tuple(rng.uniform(sure, 1.0) for _ in chosen))


def choices_of(segments: list[Segment]) -> Choices:
    return Choices.of(segments, CONFIG.vocab_size, frozenset({2}))


def as_float32(output: SegmentOutput) -> SegmentOutput:
    return replace(output, probs=tuple(np.array(output.probs, np.float32).astype(float).tolist()))


@pytest.mark.parametrize("seed", range(12))
def test_the_device_completes_what_the_host_would_have_packed(seed: int) -> None:
    """Beside segments that are known; those behind it are padding, which is stored nowhere."""
    rng = random.Random(seed)
    spec = spec_of(CONFIG, num_pages=200, page_size=PAGE, max_context=480)
    befores = [some_step(rng, seq_id) for seq_id in range(5)]
    befores = [(made, as_float32(output)) for made, output in befores]
    opened = [segment([7, 8, 9], (199,), start=2, seq_id=77, wanted=(2,))]
    for made, _ in befores:
        plan = DecodePlan(Mode.AR) if rng.random() < 0.3 else DecodePlan(Mode.SELF_SPECULATION, 40)
        worth = Worth()
        if rng.random() < 0.3:
            worth.note(made, True, 3)
        request = open_request(made, rng.choice((100, 5, 2)), worth, plan, spec)
        assert request is not None
        opened.append(
            replace(
                made,
                start=next_start(made),
                token_ids=request.token_ids,
                num_causal=request.num_causal,
                adapter=request.adapter,
                wanted=request.wanted,
                follows=made,
            )
        )
    rng.shuffle(opened)
    staging = Staging(DEVICE)
    host = HostStep.pack(opened, CONFIG, PAGE, PLACES, choices_of(opened))
    size = GraphSizes(CONFIG, PLACES).padded(host.size)
    assert size is not None
    parts = sections_of(staging.send_step(host, size, None), size)
    tokens = [token for _, output in befores for token in output.token_ids] + [0] * 3
    probs = [prob for _, output in befores for prob in output.probs] + [0.0] * 3
    report = torch.tensor([tokens, probs, [0.0] * len(tokens)], dtype=torch.float64, device=DEVICE)
    rows = first_rows([made for made, _ in befores])
    opens = opens_of(opened, host, rows)
    packed = staging.send(pack(opens, len(tokens)))
    follow(packed, len(opens), Drawn(report[0].long(), report), parts, PAGE, MASK_TOKEN_ID, PROB_ONE)

    outputs = dict(zip((made.seq_id for made, _ in befores), (output for _, output in befores), strict=True))
    found = {name: values.tolist() for name, values in parts.items()}
    at = from_wanted = 0
    for index, one in enumerate(opened):
        came = one if one.follows is None else settled(one, outputs[one.seq_id])
        assert came is not None
        alone = HostStep.pack([came], CONFIG, PAGE, PLACES, choices_of([came]))
        expected = {name: values.tolist() for name, values in alone.sections.items()}
        length, most = len(came.token_ids), len(one.token_ids)
        for name in ("token_ids", "positions", "slots"):
            assert found[name][at : at + length] == expected[name], name
        assert found["slots"][at + length : at + most] == [-1] * (most - length)
        wanted = slice(from_wanted, from_wanted + len(came.wanted))
        assert found["wanted"][wanted] == [at + row for row in came.wanted]
        if size.has_adapter:
            assert found["adapter"][at : at + most] == [
                at + row if came.num_causal <= row < length else -1 for row in range(most)
            ]
            assert found["wanted_adapter"][wanted] == [
                from_wanted + number if came.adapter and row >= came.num_causal else -1
                for number, row in enumerate(came.wanted)
            ]
        assert found["temperatures"][wanted] == expected["temperatures"]
        if one.sampling.logit_bias:
            ruled = [found["slots_ruled"][row] for row in range(wanted.start, wanted.stop)]
            biases = [found["ruled"][6 * slot + 1 : 6 * slot + 3] for slot in ruled]
            assert all(slot >= 0 for slot in ruled)
            assert all(bias == biases[0] for bias in biases)
        if one.sampling.temperature > 0:
            for name in ("uniforms", "top_ks", "top_ps", "min_ps"):
                assert found[name][wanted] == expected[name], name
        assert found["segments"][5 * index : 5 * index + 4] == [at, came.start, length, came.num_causal]
        at, from_wanted = at + most, from_wanted + len(one.wanted)


def test_what_is_not_whole_is_not_followed() -> None:
    before = segment([9, 5], (3,), start=1)
    opened = replace(segment([0], (3,), start=2), follows=before)
    assert settled(opened, SegmentOutput((5,), (1.0,))) is None
    whole = settled(opened, SegmentOutput((5, 4), (1.0, 1.0)))
    assert whole is not None
    assert (whole.start, whole.token_ids, whole.follows) == (3, (4,), None)
    other = settled(opened, SegmentOutput((6, 4), (1.0, 1.0)))
    assert other is not None
    assert (other.start, other.token_ids) == (2, (6,))
