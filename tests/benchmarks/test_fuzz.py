"""What the barrage sends is what it says, and what it takes for wrong is wrong."""

import json
from typing import Any

import pytest

from benchmarks.fuzz import Found, cases_of, grown, verdict
from benchmarks.fuzz_cases import CHAT, TEXT, Case, Raw, at_bounds, encoded, fields, kinds
from router.api import create_app
from tests.router.fakes import MODEL
from tests.router.stack import a_stack

CASE = Case("a", CHAT, b"{}")
STREAM = "text/event-stream; charset=utf-8"


async def document() -> dict[str, Any]:
    async with a_stack() as stack:
        return create_app(stack.door).openapi()


def error(code: str = "x", **more: Any) -> bytes:
    return json.dumps({"error": {"message": "m", "type": "t", "param": None, "code": code} | more}).encode()


async def test_each_field_of_both_endpoints_meets_each_number() -> None:
    served = await document()
    cases = at_bounds(MODEL, served)
    for path in (CHAT, TEXT):
        assert {"top_k", "seed", "n", "priority", "timeout_s", "min_p"} <= set(fields(served, path))
        sent = {case.content for case in cases if case.path == path}
        for name in fields(served, path):
            assert any(f'"{name}":9223372036854775808'.encode() in content for content in sent), name
            assert any(f'"{name}":NaN'.encode() in content for content in sent), name


async def test_a_barrage_has_all_kinds_and_as_many_cases_as_were_asked_for() -> None:
    served = await document()
    cases = cases_of(MODEL, served, 300, 1)
    assert len(cases) == 300
    assert {case.name for case in kinds(MODEL)} <= {case.name for case in cases}
    assert not any(case.path.startswith("/v1/triad/policy") and case.method != "GET" for case in cases)
    assert [case.name for case in cases_of(MODEL, served, 300, 2)] != [case.name for case in cases]


def test_what_json_does_not_have_is_sent_as_it_is() -> None:
    sent = encoded({"a": Raw("1e999"), "b": [Raw("NaN"), "\ud800", 1.5], "é": None})
    assert sent == b'{"a":1e999,"b":[NaN,"\\ud800",1.5],"\\u00e9":null}'


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (200, "application/json", b"{}"),
        (400, "application/json", error()),
        (429, "application/json", error("rate_limit_exceeded")),
        (504, "application/json", error("deadline_exceeded")),
        (400, "text/html", b"<html>"),
        (200, STREAM, b'data: {"choices":[]}\n\ndata: [DONE]\n\n'),
        (200, STREAM, b"data: " + error("deadline_exceeded") + b"\n\n"),
    ],
)
def test_answers_that_are_right(status: int, kind: str, body: bytes) -> None:
    assert verdict(CASE, status, kind, body) is None


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (500, "application/json", error("internal_error")),
        (503, "application/json", error("unavailable")),
        (504, "application/json", error("unavailable")),
        (500, "text/plain", b"Internal Server Error"),
        (400, "application/json", b'{"detail": []}'),
        (400, "application/json", error(message="")),
        (400, "application/json", b""),
        (200, STREAM, b'data: {"choices":[]}\n\n'),
        (200, STREAM, b"data: [DONE]"),
        (200, STREAM, b"data: " + error("internal_error") + b"\n\n"),
    ],
)
def test_answers_that_are_wrong(status: int, kind: str, body: bytes) -> None:
    assert verdict(CASE, status, kind, body)


def test_growth_is_counted_from_the_first_half_on() -> None:
    found = Found(memory_mb=[{"a 0": 500.0, "b 0": 400.0}, {"a 0": 560.0, "b 0": 480.0}])
    grown(found)
    assert found.problems == ["b 0 has grown from 400 to 480 MB"]
