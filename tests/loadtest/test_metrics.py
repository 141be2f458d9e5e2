"""Figures by hand and by brute force."""

import random
from dataclasses import replace

import numpy as np
import pytest

from loadtest.gates import GateError, parse_gates
from loadtest.metrics import (
    Distribution,
    e2e_s,
    inter_chunk_s,
    meets,
    mode_shares,
    summarise,
    tokens_per_forward,
    tpot_s,
    ttft_s,
    ttst_s,
)
from loadtest.records import Chunk, ErrorKind, Record
from loadtest.slo import Slo

REPORT = {"tokens": {"ar": 2, "diffusion": 7}, "forwards": 4, "switches": 1}


def record(
    due_s: float = 100.0, times: tuple[float, ...] = (100.4, 100.5, 101.2), tokens: int | None = 9
) -> Record:
    """By default: due at 100, sent at 100.1, three chunks of nine tokens."""
    return Record(
        setting="auto",
        stage="1/s",
        workload="tasks",
        class_name="tasks",
        intended_s=due_s,
        sent_s=due_s + 0.1,
        end_s=(times[-1] if times else due_s) + 0.05,
        chunks=[Chunk(at_s, 4) for at_s in times],
        output_tokens=tokens,
        finish_reason="stop",
        decoding=REPORT,
    )


def test_one_request_by_hand() -> None:
    r = record()
    assert ttft_s(r) == pytest.approx(0.4)  # from 100.0, when it was due, not from 100.1, when it was sent
    assert ttst_s(r) == pytest.approx(0.1)
    assert e2e_s(r) == pytest.approx(1.2)
    assert tpot_s(r) == pytest.approx((1.2 - 0.4) / 8)
    assert inter_chunk_s(r) == pytest.approx([0.1, 0.7])


def test_what_a_stream_does_not_show_is_not_made_up() -> None:
    nothing = record(times=())
    assert (ttft_s(nothing), ttst_s(nothing), e2e_s(nothing), tpot_s(nothing)) == (None,) * 4
    one_chunk = record(times=(100.4,))
    assert (ttst_s(one_chunk), tpot_s(one_chunk), inter_chunk_s(one_chunk)) == (None, None, [])
    uncounted = record(tokens=None)
    assert tpot_s(uncounted) is None
    assert tpot_s(record(tokens=1)) is None


def test_a_summary_by_hand() -> None:
    failed = record(due_s=101.0, times=())
    failed.fail(ErrorKind.RATE_LIMITED, "429")
    failed.fail(ErrorKind.TIMEOUT, "a later fault does not count")
    right, wrong = replace(record(), correct=True), replace(record(due_s=100.2), correct=False)
    s = summarise([right, wrong, failed], {"tasks": Slo(ttft_s=0.3)})
    assert (s.num_requests, s.num_good, s.errors) == (3, 2, {ErrorKind.RATE_LIMITED: 1})
    assert s.duration_s == pytest.approx(1.25)  # 100.0 to 101.25
    assert s.requests_per_s == pytest.approx(2 / 1.25)
    assert s.tokens_per_s == pytest.approx(18 / 1.25)
    assert s.goodput == pytest.approx(1 / 1.25)  # the second: 0.2 s to its first token
    assert s.attained == pytest.approx(1 / 3)
    assert s.correct == 0.5
    assert s.error_share == pytest.approx(1 / 3)
    assert s.tokens_per_s_per_user == pytest.approx(10.0)
    assert s.tokens_per_forward == pytest.approx(2.0)
    assert s.tokens_by_mode == {"ar": 4, "diffusion": 14}
    assert s.num_switches == 2
    assert s.late_p99_s == pytest.approx(0.1)


def test_turns_count_without_what_lay_between() -> None:
    later = replace(record(due_s=500.0, times=(500.4, 501.2)), turn=1)
    assert summarise([record(), later], {}).duration_s == pytest.approx(2.5)


@pytest.mark.parametrize("seed", range(20))
def test_percentiles_against_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    values = [rng.expovariate(3.0) for _ in range(rng.randint(1, 200))]
    found = Distribution.of(values)
    ordered = sorted(values)
    for percentile in (50, 90, 95, 99):
        place = percentile / 100 * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        expected = ordered[low] + (place - low) * (ordered[high] - ordered[low])
        assert found.p(percentile) == pytest.approx(expected)
    assert found.mean == pytest.approx(sum(values) / len(values))


def test_no_values_are_no_figures() -> None:
    assert Distribution.of([]).p(50) is None
    with pytest.raises(ValueError, match="no records"):
        summarise([], {})


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (None, True),
        (Slo(ttft_s=0.41, tpot_s=0.11, e2e_s=1.21), True),
        (Slo(ttft_s=0.39), False),
        (Slo(tpot_s=0.09), False),
        (Slo(e2e_s=1.19), False),
    ],
)
def test_slos(slo: Slo | None, met: bool) -> None:
    assert meets(record(), slo) is met


def test_tokens_per_forward_leave_out_each_first_token_and_need_forwards() -> None:
    no_forward = replace(record(), decoding={"tokens": {"ar": 1}, "forwards": 0, "switches": 0})
    assert tokens_per_forward([record(), no_forward]) == pytest.approx(8 / 4)
    assert tokens_per_forward([no_forward]) is None


@pytest.mark.parametrize("seed", range(10))
def test_mode_shares_against_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    records = []
    for _ in range(50):
        tokens = {mode: rng.randint(0, 9) for mode in ("ar", "diffusion")}
        r = record()
        r.end_s, r.decoding = rng.uniform(0, 10), {"tokens": tokens, "forwards": 1, "switches": 0}
        records.append(r)
    edges = [0.0, 2.0, 5.0, 10.0, 12.0]
    shares = mode_shares(records, edges)
    for k in range(3):
        its = [
            r.decoding["tokens"] for r in records if r.decoding and edges[k] <= (r.end_s or 0) < edges[k + 1]
        ]
        total = sum(sum(t.values()) for t in its)
        assert shares["ar"][k] == pytest.approx(sum(t["ar"] for t in its) / total)
        assert shares["ar"][k] + shares["diffusion"][k] == pytest.approx(1.0)
    assert np.isnan(shares["ar"][3])


def test_gates() -> None:
    s = summarise([record()], {})
    broken = [g.broken_by(s) for g in parse_gates("ttft_p95<=0.41, ttft_p50<=0.3,errors<=0,correct>=0.9")]
    assert broken == [None, "ttft_p50 is 0.4, wanted <= 0.3", None, "correct is not measured, wanted >= 0.9"]


@pytest.mark.parametrize("text", ["ttft<=1", "ttft_p50<1", "ttft_p42<=1", "errors<=many", "latency_p50<=1"])
def test_a_bad_gate_says_how_to_write_it(text: str) -> None:
    with pytest.raises(GateError, match=r"write figure<=number or >=, of: errors, .*ttft_p50"):
        parse_gates(text)
