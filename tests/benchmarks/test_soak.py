"""What the soak calls an end, and what it does not."""

import asyncio
import json
import random

import httpx
import pytest

from benchmarks.soak_figures import Row, allowed
from benchmarks.soak_load import Clients, Plan, Tally, draw

BODY = {"stream": True, "messages": []}
CHUNK = json.dumps({"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]})
LAST = json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})


def error(code: str) -> str:
    return json.dumps({"error": {"code": code, "message": "m"}})


def verdict(plan: Plan, status: int, content: str, excused: bool = False) -> Tally:
    tally = Tally()

    async def ask() -> None:
        transport = httpx.MockTransport(lambda request: httpx.Response(status, text=content))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            await Clients(http, tally, lambda began_s: excused).ask(plan)

    asyncio.run(ask())
    assert sum(tally.ends.values()) + tally.num_broken == 1
    return tally


def events(*data: str) -> str:
    return "".join(f"data: {item}\n\n" for item in data)


@pytest.mark.parametrize(
    ("content", "excused", "is_fine"),
    [
        (events(CHUNK, LAST, "[DONE]"), False, True),
        (events(CHUNK, LAST), False, False),
        (events(CHUNK), False, False),
        ("", False, False),
        (events(CHUNK, "[DONE]"), False, False),
        (events(CHUNK, error("unavailable")), True, True),
        (events(CHUNK, error("unavailable")), False, False),
        (events(CHUNK, error("internal_error")), True, False),
        (events(CHUNK, error("deadline_exceeded")), True, False),
    ],
)
def test_a_stream_ends_with_done_or_an_error_that_a_fault_explains(
    content: str, excused: bool, is_fine: bool
) -> None:
    assert (verdict(Plan(BODY), 200, content, excused).num_broken == 0) == is_fine


@pytest.mark.parametrize(
    ("status", "is_fine"), [(429, True), (503, True), (500, False), (400, False), (504, False)]
)
def test_a_refusal_is_fine_where_it_is_for_want_of_room(status: int, is_fine: bool) -> None:
    assert (verdict(Plan(BODY), status, error("x")).num_broken == 0) == is_fine


def test_a_request_that_is_wrong_must_be_refused() -> None:
    assert verdict(Plan(BODY, is_bad=True), 400, error("invalid_value")).num_broken == 0
    assert verdict(Plan(BODY, is_bad=True), 200, events(LAST, "[DONE]")).num_broken == 1


def test_the_same_seed_draws_the_same_requests() -> None:
    first, second = random.Random(3), random.Random(3)
    assert [draw(first) for _ in range(50)] == [draw(second) for _ in range(50)]


def test_what_grew_is_not_back_where_it_was() -> None:
    assert not Row("pages used", 0, 1, allowed("pages used", 0)).is_fine
    assert not Row("tasks: Ingress", 14, 20, allowed("tasks: Ingress", 14)).is_fine
    assert not Row("MiB: Replica 1", 100, 135, allowed("MiB: Replica 1", 100)).is_fine
    assert not Row("MiB: Ingress 1", 100, 119, allowed("MiB: Ingress 1", 100)).is_fine
    assert Row("MiB: Replica 1", 100, 105, allowed("MiB: Replica 1", 100)).is_fine
