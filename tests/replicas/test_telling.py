"""What a step made becomes text, events and counts: each request by itself, and one count everywhere."""

from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from policies.modes import Mode
from replicas.engine.batch import ModelSpec, ScheduledBatch, SegmentOutput, TokenLogprob
from replicas.engine.engine import Engine
from replicas.engine.lengths import CompletionLengths
from replicas.engine.sequence import Progress, Sequence
from replicas.errors import ErrorCode
from replicas.messages import (
    DecodingOptions,
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    Rejected,
    SamplingParams,
    TextLogprob,
)
from replicas.model.runner import TorchRunner
from replicas.request_state import ChoiceState, RequestState
from replicas.service import ReplicaService
from replicas.text import TextCodec
from replicas.text_stream import TextStream
from replicas.timeline import Timeline
from tests.replicas.codec import byte_codec, tiny_tokenizer
from tests.replicas.engine.scripted import EOS, PINNED, ScriptedRunner, expected
from tests.replicas.test_service import collect, opened, request, serving, settled, text_of
from tests.tiny_checkpoint import (
    BYTE_FALLBACK_KINDS,
    byte_fallback_tokenizer,
    write_byte_fallback_checkpoint,
)

CODEC = byte_codec()


class SickStream(TextStream):
    """Breaks at its fifth token."""

    def _push(self, token_id: int) -> str:
        if self.num_tokens == 4:
            raise ValueError("no such token")
        return super()._push(token_id)


class SickCodec(TextCodec):
    """Breaks for requests with a stop string that says so."""

    def stream(
        self, stop: tuple[str, ...] = (), min_tokens: int = 0, continues_text: bool = False, **more: Any
    ) -> TextStream:
        kind = SickStream if "sick text" in stop else TextStream
        return kind(self._bytes, dict.fromkeys(stop, ""), {}, min_tokens, continues_text)

    def logprob(self, made: TokenLogprob, offset: int, is_first: bool = False) -> TextLogprob:
        raise KeyError(made.token_id)


class WithLogprobs(ScriptedRunner):
    def run(self, batch: ScheduledBatch) -> list[SegmentOutput]:
        outputs = super().run(batch)
        for index, segment in enumerate(batch.segments):
            if segment.sampling.logprobs:
                outputs[index] = replace(outputs[index], top=(((5, -0.5),),) * len(outputs[index].token_ids))
        return outputs


@pytest.mark.parametrize(
    "fault", [{"stop": ("sick text",)}, {"logprobs": 1}, {"stop": ("sick text",), "num_choices": 3}], ids=str
)
@pytest.mark.parametrize("kind", ["ar", "self_speculation"])
async def test_a_fault_in_telling_ends_its_request_alone(
    kind: str, fault: dict, caplog: pytest.LogCaptureFixture
) -> None:
    service = ReplicaService(Engine(WithLogprobs()), SickCodec(tiny_tokenizer()), "replica")
    service.start()
    stream = await opened(service)
    for name in ("before", "sick", "after"):
        more = fault if name == "sick" else {}
        await service.submit(request(name, decoding=PINNED[kind], **more))
    seen = await collect(stream, {"before", "sick", "after"})
    ends = [event for event in seen["sick"] if not isinstance(event, Delta)]
    assert [(end.code if isinstance(end, Failed) else None) for end in ends] == [ErrorCode.INTERNAL]
    for name in ("before", "after"):
        assert isinstance(seen[name][-1], Finished)
        assert text_of(seen[name]) == text_of(seen["before"])
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    service.check()
    load = await settled(service)
    assert (load.num_in_flight, load.pages_used) == (0, 0)
    await service.stop()


async def test_a_lost_timeline_ends_no_request(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever takes it can't bear it."""

    def broken(timeline: Timeline) -> None:
        raise OSError("no collector")

    service = ReplicaService(Engine(ScriptedRunner()), CODEC, "replica", on_timeline=broken)
    service.start()
    stream = await opened(service)
    await service.submit(request("r"))
    assert isinstance((await collect(stream, {"r"}))["r"][-1], Finished)
    await settled(service)
    assert ["timeline" in record.getMessage() for record in caplog.records] == [True]
    service.check()
    await service.stop()


class ByteRunner:
    """Says, whatever it is asked, the same broken characters to the second sequence."""

    def __init__(self) -> None:
        tokenizer = byte_fallback_tokenizer()
        names = ["▁a", "<0xC3>", "<0xA9>", "<0xE2>", "b"]
        self._ids = tokenizer.convert_tokens_to_ids(names)
        self._plain = tokenizer.convert_tokens_to_ids("c")
        self.spec = ModelSpec((Mode.AR,), None, frozenset({2}), 96, 64, 4, len(tokenizer))

    def run(self, batch: ScheduledBatch) -> Seq[SegmentOutput]:
        outputs = []
        for segment in batch.segments:
            at = segment.start + len(segment.token_ids) - segment.prompt_len
            token = self._ids[at % 5] if segment.seq_id == 1 else self._plain
            outputs.append(SegmentOutput((token,) * len(segment.wanted), (1.0,) * len(segment.wanted)))
        return outputs


async def test_broken_characters_hurt_nobody() -> None:
    service = ReplicaService(Engine(ByteRunner()), TextCodec(byte_fallback_tokenizer()), "replica")
    service.start()
    stream = await opened(service)
    for name in ("innocent", "broken"):
        sampling = SamplingParams(max_tokens=10)
        await service.submit(GenerateRequest(name, "c", ((6, 7, 8),), sampling))
    seen = await collect(stream, {"innocent", "broken"})
    assert text_of(seen["innocent"]) == "c" * 10
    assert text_of(seen["broken"]) == " aé\ufffdb aé\ufffdb"
    assert isinstance(seen["broken"][-1], Finished)
    await service.stop()


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.STOP])
@pytest.mark.parametrize("includes_stop", [False, True])
@pytest.mark.parametrize("tokens_per_delta", [None, 1])
def test_a_stop_string_that_the_texts_end_completes_is_the_reason(
    reason: FinishReason, includes_stop: bool, tokens_per_delta: int | None
) -> None:
    sampling = SamplingParams(max_tokens=2, stop=("\ufffd",), includes_stop=includes_stop)
    text = CODEC.completion(sampling, frozenset({EOS}), continues_text=True)
    sequence = Sequence(0, "r#0", [5], 2, sampling, DecodingOptions(), text=text)
    taken, _ = sequence.append((CODEC.encode("a")[0], CODEC.encode("é")[0]), Mode.AR, frozenset({EOS}))
    asked = GenerateRequest("r", "c", ((5,),), sampling, tokens_per_delta=tokens_per_delta)
    choice = ChoiceState(RequestState(asked), 0, sequence, text)
    deltas = choice.take(Progress(sequence, taken, (), reason, mode=Mode.AR), CODEC, 0.0)
    assert "".join(delta.text for delta in deltas) == ("a\ufffd" if includes_stop else "a")
    assert (deltas[-1].reason, deltas[-1].stop_reason) == (FinishReason.STOP, "\ufffd")
    assert sum(delta.num_tokens for delta in deltas) == 2


def whole_text(kind: str, text: str, max_tokens: int) -> tuple[list[int], str]:
    """Tokens of an undisturbed completion, up to its end, and its text."""
    tokens = expected(kind, CODEC.encode(text), max_tokens, 96)
    stream = CODEC.stream()
    return tokens, stream.push(tuple(tokens)) + stream.finish()


def ended_by(tokens: list[int], stop: str, min_tokens: int = 0) -> tuple[str, int]:
    """The text and the tokens that count, by going over them one by one."""
    stream = CODEC.stream((stop,), min_tokens)
    text = "".join(stream.push((token,)) for token in tokens)
    return text + stream.finish(), stream.num_tokens


@pytest.mark.parametrize("kind", PINNED)
async def test_tokens_count_up_to_the_one_that_completes_a_stop(kind: str) -> None:
    """In usage, by mode, in the load's figures and in the lengths it learns; with an end behind it too."""
    runner = ScriptedRunner(num_pages=200)
    engine = Engine(runner)
    service = ReplicaService(engine, CODEC, "replica")
    service.start()
    stream = await opened(service)
    sampling = {"max_tokens": 40, "ignore_eos": False, "decoding": PINNED[kind]}
    num_expected = num_ended_behind = 0
    lengths = []
    for number in range(40):
        prompt = f"prompt {number}"
        tokens, whole = whole_text(kind, prompt, 40)
        if len(whole) < 6:
            continue
        stop = whole[3:5]
        text, num_tokens = ended_by(tokens, stop)
        name = f"r{number}"
        await service.submit(request(name, prompt, stop=(stop,), **sampling))
        events = (await collect(stream, {name}))[name]
        last = events[-1]
        assert isinstance(last, Finished)
        assert text_of(events) == text
        assert events[-2].reason is FinishReason.STOP
        assert sum(event.num_tokens for event in events if isinstance(event, Delta)) == num_tokens
        assert last.num_completion_tokens == sum(last.report.tokens_by_mode.values()) == num_tokens
        num_expected += num_tokens
        num_ended_behind += num_tokens < len(tokens) <= num_tokens + 8
        lengths.append(num_tokens)
    await settled(service)
    assert engine.scheduler.counters.num_tokens == num_expected
    assert num_ended_behind, "some end by themselves in the block of the stop string"
    learned = CompletionLengths()
    for length in lengths:
        learned.note(length, is_whole=True)
    assert engine._lengths.remaining(0, 40) == learned.remaining(0, 40)
    made = sum(round_.tokens for round_ in engine.scheduler.counters.rounds)
    assert made <= num_expected
    await service.stop()


def test_what_remains_is_learned_from_texts_that_a_stop_string_ends() -> None:
    engine = Engine(ScriptedRunner())
    prompt = CODEC.encode("hello")
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    _, whole = whole_text("ar", "hello", 12)
    for number in range(60):
        engine.submit(str(number), prompt, sampling, text=CODEC.stream((whole[7:9],)))
        while engine.has_work:
            engine.step()
    engine.submit("next", prompt, sampling)
    engine.step()
    assert engine.snapshot("r").mean_remaining == 8  # of 9, one is there


@pytest.mark.parametrize("kind", ["ar", "diffusion", "self_speculation"])
async def test_a_stop_string_leaves_min_tokens_alone(kind: str) -> None:
    async with serving() as service:
        stream = await opened(service)
        text = next(
            text
            for text in (f"text {k}" for k in range(99))
            if len(tokens := whole_text(kind, text, 30)[0]) == 30 and EOS not in tokens
        )
        tokens, whole = whole_text(kind, text, 30)
        stop = whole[3]
        expected_text, num_tokens = ended_by(tokens, stop, 20)
        await service.submit(
            request("r", text, stop=(stop,), min_tokens=20, ignore_eos=False, decoding=PINNED[kind])
        )
        events = (await collect(stream, {"r"}))["r"]
        assert text_of(events) == expected_text
        assert len(expected_text) > 15
        assert events[-1].num_completion_tokens == num_tokens > 20


async def test_the_mask_among_a_prompts_ids_is_refused() -> None:
    async with serving() as service:
        stream = await opened(service)
        mask = service._engine.spec.mask_token_id
        for prompts, is_good in ((((5, mask, 6),), False), (((5, EOS, 6),), True), (((4,), (mask,)), False)):
            answer = await service.submit(GenerateRequest("r", "c", prompts, SamplingParams(max_tokens=3)))
            if is_good:
                await collect(stream, {"r"})
                continue
            assert isinstance(answer, Rejected)
            assert (answer.code, answer.param) == (ErrorCode.INVALID_REQUEST, "prompt")
            assert "mask" in answer.message


@pytest.mark.parametrize("kind", BYTE_FALLBACK_KINDS)
async def test_a_byte_fallback_models_texts_are_whole_in_every_mode(kind: str, tmp_path: Path) -> None:
    """Bytes split over steps, blocks and choices; where asked for, the tokens' bytes are the text."""
    folder = write_byte_fallback_checkpoint(tmp_path / "model", kind=kind)
    runner = TorchRunner.load(str(folder), num_pages=200, num_threads=1)
    codec = TextCodec.load(str(folder))
    service = ReplicaService(Engine(runner), codec, "replica")
    service.start()
    stream = await opened(service)
    plans = {
        "ar": DecodingOptions(Mode.AR),
        "self_speculation": DecodingOptions(Mode.SELF_SPECULATION, block_length=8),
        "diffusion": DecodingOptions(Mode.DIFFUSION, block_length=8, threshold=0.1),
    }
    chat = ({"role": "user", "content": "the language of tokens ü"},)
    asked = {
        f"{name} {number} {is_chat}": GenerateRequest(
            f"{name} {number} {is_chat}",
            "c",
            (chat if is_chat else "the language",),
            SamplingParams(
                max_tokens=50,
                temperature=1.0,
                seed=10 * number,
                ignore_eos=number % 2 == 0,
                logprobs=None if name == "diffusion" else 2,
            ),
            decoding,
            num_choices=2,
        )
        for name, decoding in plans.items()
        for number in range(5)
        for is_chat in (False, True)
    }
    for each in asked.values():
        await service.submit(each)
    seen = await collect(stream, set(asked))
    for name, events in seen.items():
        last = events[-1]
        assert isinstance(last, Finished), last
        assert last.num_completion_tokens == sum(last.report.tokens_by_mode.values())
        for index in range(2):
            check_choice(codec, [e for e in events if isinstance(e, Delta) and e.index == index])
        other = seen[name.replace("self_speculation", "ar")]
        assert texts(events) == texts(other)
    assert "\ufffd" in "".join(text for events in seen.values() for text in texts(events))
    service.check()
    await service.stop()


def texts(events: Seq[Event]) -> list[str]:
    return [text_of([e for e in events if isinstance(e, Delta) and e.index == index]) for index in range(2)]


def check_choice(codec: TextCodec, events: Seq[Delta]) -> None:
    text = text_of(list(events))
    entries = [entry for event in events for entry in event.logprobs]
    if not entries:
        return
    names = {codec.token_bytes(token_id) for token_id in range(5)}  # the special ones, which are no text
    said = [entry for entry in entries if entry.bytes not in names]
    raw = b"".join(entry.bytes for entry in said)
    assert raw.decode(errors="replace") == text
    at = 0
    for entry in said:
        assert len(raw[:at].decode(errors="ignore")) <= entry.offset < len(text)
        if entry.bytes and entry.bytes.isascii():
            assert text[entry.offset :].startswith(entry.bytes.decode())
        at += len(entry.bytes)
