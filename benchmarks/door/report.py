"""The tables of `python -m benchmarks.door`, and which of the aims are met; medians over the turns."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.door.accounting import HAPROXY, INGRESS, RAY, REDIS, REPLICA
from benchmarks.door.windows import (
    ALONE,
    CLIENT,
    ENGINE_PYTHON,
    FORWARD,
    LOOP,
    MAX_TOKENS,
    MODES,
    STACK,
)
from benchmarks.tables import section, table, verdict

EACH_AIM, MEAN_AIM = 0.9, 0.95
CHUNK_AIM_MS = 0.08
REQUEST_AIM_MS = 3.0
FORWARDS_AIM, MORE_AIM_MS = 1.2, 5.0
STACK_AIM_BYTES, REPLICA_AIM_BYTES = 1.2e9, 350e6
OUTSIDE = (HAPROXY, INGRESS, LOOP, ENGINE_PYTHON)
"""The kinds all of whose CPU time is outside forwards."""
Raw = Mapping[str, Any]


def report(rows: Sequence[Raw]) -> str:
    """The Markdown of the rows of one or more runs, which are to be of one machine and one code."""
    runs = {
        (run["processor"], run["cores"], run["avx512"], run["commit"]) for run in (r["run"] for r in rows)
    }
    titles = [
        f"{processor}, {cores:g} cores {'with' if avx512 else 'without'} AVX-512, commit {commit}"
        for processor, cores, avx512, commit in sorted(runs)
    ]
    windows = [row for row in rows if row["what"] == "window"]
    pieces = ["; ".join(titles)]
    if windows:
        pieces += [_rates(windows), _cpu(windows)]
    pieces += [_first_token(row) for row in rows if row["what"] == "first token"]
    pieces += [_memory(row["pss"]) for row in rows if row["what"] == "memory"]
    return "\n\n".join(pieces)


def ratios(windows: Sequence[Raw]) -> dict[tuple[str, int], tuple[float, float, float, float]]:
    """By mode and clients: tokens/s of the engine alone and of the stack, the second over the first, and that
    with the client's CPU time given back, as if it had cores of its own."""
    found = {}
    for mode, clients in _places(windows):
        alone = _median(windows, mode, clients, ALONE, _rate)
        stack = _median(windows, mode, clients, STACK, _rate)
        freed = _median(windows, mode, clients, STACK, lambda row: _rate(row) * _freed(row))
        if alone and stack is not None and freed is not None:
            found[mode, clients] = (alone, stack, stack / alone, freed / alone)
    return found


def outside_ms(windows: Sequence[Raw], mode: str, clients: int) -> dict[str, float]:
    """CPU ms a request of the stack outside forwards, by kind."""
    return {
        kind: _median(windows, mode, clients, STACK, partial(_per_request_ms, kind=kind)) or 0.0
        for kind in OUTSIDE
    }


def chunks_a_request(windows: Sequence[Raw], mode: str, clients: int) -> float:
    found = _median(
        windows, mode, clients, STACK, lambda row: MAX_TOKENS * row["chunks"] / max(1, row["tokens"])
    )
    return found or 0.0


def _rates(windows: Sequence[Raw]) -> str:
    found = ratios(windows)
    lines = [
        [mode, str(clients), f"{alone:,.0f}", f"{stack:,.0f}", f"{ratio:.2f}", f"{freed:.2f}"]
        for (mode, clients), (alone, stack, ratio, freed) in found.items()
    ]
    head = [
        "mode",
        "clients",
        "engine alone",
        "whole stack, tokens/s",
        "ratio",
        "the client's CPU given back",
    ]
    if not lines:
        return "Not measured alone and over HTTP both."
    freed = [entry[3] for entry in found.values()]
    mean = sum(freed) / len(freed)
    num_met = sum(ratio >= EACH_AIM for ratio in freed)
    on_each = f"at least {EACH_AIM:g} each: {num_met} of {len(freed)}, the least {min(freed):.2f}"
    on_mean = f"{MEAN_AIM:g} on average: {mean:.3f}"
    return section(
        table(head, lines), verdict(on_each, num_met == len(freed)), verdict(on_mean, mean >= MEAN_AIM)
    )


def _cpu(windows: Sequence[Raw]) -> str:
    lines, chunk_ms, request_ms = [], [], []
    for mode, clients in _places(windows):
        spent = outside_ms(windows, mode, clients)
        total, chunks = sum(spent.values()), chunks_a_request(windows, mode, clients)
        if not chunks:
            continue
        if mode == "ar":
            chunk_ms.append(total / chunks)
        if mode.startswith("diffusion"):
            request_ms.append(total)
        others = [
            _median(windows, mode, clients, STACK, partial(_cores, kind=kind))
            for kind in (CLIENT, FORWARD, REDIS, RAY)
        ]
        figures = [
            *(f"{ms:.2f}" for ms in (*spent.values(), total)),
            f"{chunks:.1f}",
            f"{total / chunks:.3f}",
        ]
        lines.append([mode, str(clients), *figures, *(f"{cores or 0.0:.2f}" for cores in others)])
    head = ["mode", "clients", *OUTSIDE, "together, ms a request", "chunks a request"]
    head += ["ms a chunk", "cores: client", FORWARD, REDIS, RAY]
    verdicts = []
    if chunk_ms:
        what = f"at most {CHUNK_AIM_MS:g} ms a chunk in `ar`: {min(chunk_ms):.3f} to {max(chunk_ms):.3f}"
        verdicts.append(verdict(what, max(chunk_ms) <= CHUNK_AIM_MS))
    if request_ms:
        what = f"at most {REQUEST_AIM_MS:g} ms a request in `diffusion`: {min(request_ms):.2f} to "
        verdicts.append(verdict(f"{what}{max(request_ms):.2f}", max(request_ms) <= REQUEST_AIM_MS))
    return (
        "CPU outside forwards, ms a request by kind:\n\n" + table(head, lines) + "\n\n" + "\n".join(verdicts)
    )


def _first_token(row: Raw) -> str:
    wanted_ms = FORWARDS_AIM * row["forward_ms"] + MORE_AIM_MS
    what = (
        f"first token after {row['ttft_ms']:g} ms, at most {wanted_ms:.1f} wanted, {FORWARDS_AIM:g} forwards "
    )
    return verdict(f"{what}of {row['forward_ms']:g} ms and {MORE_AIM_MS:g} ms", row["ttft_ms"] <= wanted_ms)


def _memory(pss: Mapping[str, int]) -> str:
    total = sum(pss.values())
    kinds = [f"{kind} {size / 1e6:,.0f}" for kind, size in pss.items()]
    return "\n".join(
        (
            f"memory of the idle stack, MB of proportional set size: {', '.join(kinds)}",
            "",
            verdict(f"at most {STACK_AIM_BYTES / 1e6:,.0f} MB: {total / 1e6:,.0f}", total <= STACK_AIM_BYTES),
            verdict(
                f"the replica at most {REPLICA_AIM_BYTES / 1e6:,.0f} MB: {pss[REPLICA] / 1e6:,.0f}",
                pss[REPLICA] <= REPLICA_AIM_BYTES,
            ),
        )
    )


def _places(windows: Iterable[Raw]) -> list[tuple[str, int]]:
    found = {(row["mode"], row["clients"]) for row in windows}
    return sorted(found, key=lambda place: (list(MODES).index(place[0]), place[1]))


def _median(
    windows: Iterable[Raw], mode: str, clients: int, where: str, figure: Callable[[Raw], float]
) -> float | None:
    wanted = (where, mode, clients)
    found = [figure(row) for row in windows if (row["where"], row["mode"], row["clients"]) == wanted]
    return statistics.median(found) if found else None


def _rate(row: Raw) -> float:
    return float(row["tokens"] / row["seconds"])


def _freed(row: Raw) -> float:
    """How much more time all but the client would have had with the client's CPU time."""
    cores = row["run"]["cores"]
    return float(cores / (cores - _cores(row, CLIENT)))


def _cores(row: Raw, kind: str) -> float:
    return float(row["cpu_s"][kind] / row["seconds"])


def _per_request_ms(row: Raw, kind: str) -> float:
    """CPU ms by the tokens of a request, so that what is under way at a window's ends counts as it should."""
    return float(1e3 * row["cpu_s"][kind] / max(1, row["tokens"]) * MAX_TOKENS)
