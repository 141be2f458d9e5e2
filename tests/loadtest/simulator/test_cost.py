import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.simulator.cost import StepTable, TableError
from loadtest.simulator.yields import DATA

B200 = {model: StepTable.load(DATA / f"step-cost-b200-{model}.json") for model in ("8b", "14b")}


def linear(sequences, query_tokens, cached_tokens):
    return 5 + 0.02 * query_tokens + 0.1 * sequences + 0.001 * cached_tokens


def rows(cost=linear, counts=(1, 2, 4, 8), queries=(1, 8, 32), contexts=(10, 100)):
    return [
        {
            "sequences": count,
            "query_tokens": count * query,
            "cached_tokens": count * context,
            "ms": cost(count, count * query, count * context),
        }
        for count in counts
        for query in queries
        for context in contexts
    ]


@given(st.integers(1, 8), st.floats(1, 32), st.floats(10, 100))
def test_a_linear_cost_comes_back(count, query, context):
    table = StepTable(rows())
    got = table.ms(count, count * query, count * context)
    assert got == pytest.approx(linear(count, count * query, count * context), rel=1e-6)


def test_past_the_table_the_last_slope_goes_on():
    table = StepTable(rows())
    assert table.ms(1, 1000, 10) == pytest.approx(linear(1, 1000, 10), rel=1e-6)
    assert table.ms(16, 16, 160) == pytest.approx(linear(8, 16, 160), rel=0.2)


def test_a_sweep_without_single_tokens_says_what_one_would_cost():
    table = StepTable(rows(queries=(8, 16, 32)))
    assert table.ms(4, 4, 200) == pytest.approx(linear(4, 4, 200), rel=1e-6)


def test_a_prefill_goes_on_every_curve():
    prefill = {"sequences": 1, "query_tokens": 400, "cached_tokens": 0, "ms": 30.0}
    assert StepTable([*rows(), prefill]).ms(1, 400, 0) == pytest.approx(30.0, rel=0.05)


def test_overhead_is_a_step_a_sequence_and_a_query_token():
    plain = StepTable(rows())
    more = StepTable(rows(), {"step": 1.0, "sequence": 0.5, "query_token": 0.25})
    assert more.ms(4, 8, 100) == pytest.approx(plain.ms(4, 8, 100) + 5.0)


def test_logits_past_the_first_of_each_sequence_cost_extra():
    plain, more = StepTable(rows()), StepTable.parse({"rows": rows(), "logits_ms": 0.5}, "t.json")
    assert more.ms(4, 32, 100, wanted=20) == pytest.approx(plain.ms(4, 32, 100) + 8.0)
    assert more.ms(4, 4, 100, wanted=4) == plain.ms(4, 4, 100)


@pytest.mark.parametrize("model", ["8b", "14b"])
def test_the_public_sweep_comes_back_and_costs_never_fall_with_length(model):
    table = B200[model]
    assert len(table.rows) == 384
    for row in table.rows:
        got = table.ms(row["sequences"], row["query_tokens"], row["cached_tokens"])
        assert got == pytest.approx(row["ms"], rel=1e-6)
    for count in (1, 12, 64, 128):
        costs = [table.ms(count, count * query, count * 800) for query in (1, 4, 8, 16, 32, 100)]
        assert costs == sorted(costs)


@pytest.mark.parametrize("model", ["8b", "14b"])
def test_what_a_replica_would_have_learned_is_near_the_truth(model):
    table = B200[model]
    cost = table.fitted
    errors = [
        abs(cost.ms(row["query_tokens"], row["sequences"], row["cached_tokens"]) / row["ms"] - 1.0)
        for row in table.rows
    ]
    assert sum(errors) / len(errors) < 0.06


@pytest.mark.parametrize(
    "table", [{}, [], {"rows": []}, {"rows": [{"ms": 1}]}, {"rows": rows(lambda *_: -1.0)}, None]
)
def test_a_table_that_is_none_is_refused(table):
    with pytest.raises(TableError):
        StepTable.parse(table, "t.json")
