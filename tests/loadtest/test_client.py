"""The client against a real server on loopback: every kind of failure by its own name, honest times."""

import asyncio
import itertools
import random
import socket
import time

import pytest

from loadtest.arrivals import Arrival, fixed_rate, poisson
from loadtest.client import Client, Progress, Stage, Target
from loadtest.metrics import e2e_s, inter_chunk_s, tpot_s, ttft_s
from loadtest.records import ErrorKind
from loadtest.workloads import Ask, Workload
from tests.loadtest.openai_server import ANSWER, OpenAiServer

STAGE = Stage("test", 1.0)
TEXT = "".join(ANSWER)


def ask(content: str = "Hello", **more: object) -> Ask:
    return Ask("test", "chat", ({"role": "user", "content": content},), **more)  # type: ignore[arg-type]


def target(url: str, **more: object) -> Target:
    return Target("auto", url, "small", **more)  # type: ignore[arg-type]


HELLO = Workload("test", "", lambda rng, arrival: ask())


async def test_a_good_answer_is_recorded_whole(openai_server: OpenAiServer) -> None:
    async with Client() as client:
        due = client.now_s()
        its_target = target(openai_server.url, extra={"decoding": {"mode": "ar"}}, api_key="k")
        record, text = await client.send(its_target, STAGE, ask(check=lambda t: t == TEXT), due)
    assert text == TEXT
    assert (record.error, record.status, record.finish_reason) == (None, 200, "stop")
    assert record.correct is True
    assert (record.prompt_tokens, record.cached_tokens, record.output_tokens) == (5, 2, 7)
    assert record.decoding is not None
    assert record.decoding["tokens"] == {"ar": 1, "self_speculation": 6}
    assert [chunk.num_chars for chunk in record.chunks] == [len(part) for part in ANSWER]
    assert {chunk.num_tokens for chunk in record.chunks} == {None}  # this server does not say
    times = [due, record.sent_s, *(c.at_s for c in record.chunks), record.end_s]
    assert times == sorted(times)  # type: ignore[type-var]
    (body,) = openai_server.bodies
    assert body["stream_options"] == {"include_usage": True}
    assert body["decoding"] == {"mode": "ar"}
    assert openai_server.headers[0]["authorization"] == "Bearer k"


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("429", ErrorKind.RATE_LIMITED),
        ("503", ErrorKind.UNAVAILABLE),
        ("418", ErrorKind.STATUS),
        ("error_event", ErrorKind.ERROR_EVENT),
        ("truncated", ErrorKind.TRUNCATED),
        ("cut", ErrorKind.TRUNCATED),
        ("missing_done", ErrorKind.MISSING_DONE),
        ("malformed", ErrorKind.MALFORMED),
        ("hang", ErrorKind.TIMEOUT),
        ("hang_before", ErrorKind.TIMEOUT),
    ],
)
async def test_failures_are_kept_apart(openai_server: OpenAiServer, fault: str, kind: ErrorKind) -> None:
    async with Client(timeout_s=1.0 if "hang" in fault else 30.0) as client:
        record, _ = await client.send(
            target(openai_server.url), STAGE, ask(f"fault: {fault}"), client.now_s()
        )
    assert record.error is kind, record.message
    assert record.end_s is not None
    assert record.correct is None


async def test_a_text_that_differs_from_the_expected_one_is_wrong(openai_server: OpenAiServer) -> None:
    async with Client() as client:
        right, _ = await client.send(target(openai_server.url), STAGE, ask(expected=TEXT), client.now_s())
        wrong, _ = await client.send(target(openai_server.url), STAGE, ask(expected="No"), client.now_s())
    assert right.error is None
    assert wrong.error is ErrorKind.WRONG_TEXT


async def test_nobody_listening_is_a_connection_error() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        async with Client() as client:
            record, _ = await client.send(target(url), STAGE, ask(), client.now_s())
    assert record.error is ErrorKind.CONNECTION


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    """30 requests in 0.15 s at a server that takes 0.8 s for each: all are in flight together."""
    server = OpenAiServer(gap_s=0.2)
    with server.running_on_loopback() as url:
        progress = Progress()
        async with Client() as client:
            arrivals = fixed_rate(200.0, 0.15)
            records = await client.open_loop(target(url), STAGE, HELLO, arrivals, progress=progress)
    assert len(records) == 30
    assert {record.error for record in records} == {None}
    assert server.peak == 30
    assert (progress.sent, progress.ended, progress.failed) == (30, 30, 0)
    gaps = [b.intended_s - a.intended_s for a, b in itertools.pairwise(records)]
    assert gaps == pytest.approx([0.005] * 29, abs=1e-6)  # due times are the schedule's, not the loop's


async def test_a_late_client_counts_from_the_intended_send(openai_server: OpenAiServer) -> None:
    """The event loop is held up for 0.3 s: the requests due meanwhile have waited, and it shows."""

    async def hold_up() -> None:
        await asyncio.sleep(0.1)
        time.sleep(0.3)  # noqa: ASYNC251  what a client too slow for its load does

    async with Client() as client:
        held = asyncio.create_task(hold_up())
        arrivals = fixed_rate(50.0, 0.3)
        records = await client.open_loop(target(openai_server.url), STAGE, HELLO, arrivals)
        await held
    waited = [ttft_s(record) for record in records]
    assert max(w for w in waited if w is not None) > 0.25
    assert all(r.sent_s is not None and r.sent_s >= r.intended_s for r in records)


async def test_times_are_those_of_the_chunks() -> None:
    server = OpenAiServer(gap_s=0.1)
    with server.running_on_loopback() as url:
        async with Client() as client:
            record, _ = await client.send(target(url), STAGE, ask(), client.now_s())
    assert all(gap >= 0.09 for gap in inter_chunk_s(record))
    assert len(inter_chunk_s(record)) == 3
    whole, first, each = e2e_s(record), ttft_s(record), tpot_s(record)
    assert whole is not None
    assert first is not None
    assert each == pytest.approx((whole - first) / 6)


async def test_a_closed_loop_keeps_its_users_busy_and_no_more() -> None:
    server = OpenAiServer(gap_s=0.01)
    with server.running_on_loopback() as url:
        async with Client() as client:
            records = await client.closed_loop(target(url), STAGE, HELLO, 3, 0.5)
    assert server.peak == 3
    assert len(records) > 6
    assert all(record.error is None for record in records)


async def test_the_same_seed_asks_the_same() -> None:
    numbered = Workload("test", "", lambda rng, arrival: ask(str(rng.random())))
    asked = []
    for _ in range(2):
        server = OpenAiServer(gap_s=0.0)
        with server.running_on_loopback() as url:
            async with Client() as client:
                arrivals = poisson(100.0, 0.2, seed=5)
                await client.open_loop(target(url), STAGE, numbered, arrivals, seed=9)
        asked.append(sorted(body["messages"][0]["content"] for body in server.bodies))
    assert asked[0] == asked[1]
    assert numbered.draw(random.Random(9), Arrival(0.0)).messages[0]["content"] in asked[0]
