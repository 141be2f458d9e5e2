"""The sweep as the simulator reads it: `python -m loadtest.simulator run --costs <table>`. Pure."""

from collections.abc import Mapping, Sequence

Row = Mapping[str, object]


def step_cost_table(
    model: str, about: Row, sweep: Sequence[Row], overhead: Sequence[Row]
) -> dict[str, object]:
    """One model's table (loadtest.simulator.cost): the mean of draft and verify, and what the engine adds.

    overhead: rounds of `ar`, one step each, at two concurrencies; measured on one model, the same for all.
    """
    rows = []
    for row in sweep:
        if row["model"] != model:
            continue
        times = [_number(row[key]) for key in ("draft_ms", "verify_ms") if row[key] is not None]
        concurrency = _number(row["concurrency"])
        rows.append(
            {
                "sequences": concurrency,
                "query_tokens": row["query_tokens"],
                "cached_tokens": concurrency * _number(row["mean_history"]),
                "ms": round(sum(times) / len(times), 4),
            }
        )
    return {
        "what": "latency of a forward, mean of draft and verify; query and cached tokens of all sequences",
        "model": f"{model}, {about['dtype']}, {about['weights']} weights",
        "machine": about["device"],
        "source": "python -m benchmarks.gpu",
        "rows": rows,
        "overhead_ms": _overhead([row for row in overhead if row["mode"] == "ar"]),
    }


def _overhead(rows: Sequence[Row]) -> dict[str, float]:
    """The engine's overhead: the line through the least and the largest concurrency, none of it below 0."""
    by_concurrency = {_number(row["concurrency"]): _number(row["overhead_ms"]) for row in rows}
    if not by_concurrency:
        return {}
    least, most = min(by_concurrency), max(by_concurrency)
    slope = 0.0
    if most > least:
        slope = max(0.0, (by_concurrency[most] - by_concurrency[least]) / (most - least))
    step = max(0.0, by_concurrency[least] - slope * least)
    return {"step": round(step, 4), "sequence": round(slope, 5)}


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)
