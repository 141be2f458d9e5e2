"""The best way to decode by concurrency and acceptance, from a sweep of forwards. Pure.

Rounds are the simulator's (loadtest.simulator.yields): a round of self-speculation is one forward of up to
two blocks of rows, a block of diffusion begins in the commit of the one before. With each drafted token
accepted with chance a, independently, a verified draft of block B brings 1 + a + ... + a^(B-1) tokens
(Leviathan et al., arXiv 2211.17192, equation 1). a is set so that at block 32 this is the published accepted
length of a kind of text; shorter blocks follow.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy

from loadtest.simulator.yields import NUM_CHANCES, Rounds
from policies.modes import DecodePlan, Mode

Row = Mapping[str, object]


def accepted(chance: float, block: int) -> float:
    """Tokens that a verified draft of self-speculation brings."""
    return sum(chance**index for index in range(block))


def chance_of(accepted_tokens: float, block: int = 32) -> float:
    """The chance of acceptance at which a verified draft of that block brings so many tokens."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if accepted(middle, block) < accepted_tokens else (low, middle)
    return low


def rates(rows: Iterable[Row], chance: float, diffusion_tokens: float) -> dict[str, float]:
    """Tokens a second of every way to decode, from the rows of one model and concurrency.

    A forward of a number of rows that was not measured takes what the line between its neighbours says, the
    mean of a draft's and a verify's; plans whose forwards may be longer than any measured are left out.

    diffusion_tokens: of a forward as published, of blocks of 32, one after the other
    """
    by_block = {int(_number(row["block"])): row for row in rows}
    if 1 not in by_block:
        return {}
    concurrency = _number(by_block[1]["concurrency"])
    blocks = sorted(by_block)
    ms = [_forward_ms(by_block[block]) for block in blocks]
    plans = [DecodePlan(Mode.AR), DecodePlan(Mode.DIFFUSION, 32)]
    plans += [DecodePlan(Mode.SELF_SPECULATION, block) for block in blocks if block > 1]
    found: dict[str, float] = {}
    for plan in plans:
        most = plan.block_length if plan.mode is Mode.AR else 2 * plan.block_length
        if most <= blocks[-1]:
            made = Rounds(plan, diffusion_tokens).mean(min(int(chance * NUM_CHANCES), NUM_CHANCES - 1))
            took_ms = float(numpy.interp(made.rows_per_forward, blocks, ms))
            name = "ar" if plan.mode is Mode.AR else f"{plan.mode} {plan.block_length}"
            found[name] = concurrency * made.tokens_per_forward / took_ms * 1e3
    return found


def _forward_ms(row: Row) -> float:
    times = [_number(row[key]) for key in ("draft_ms", "verify_ms") if row[key] is not None]
    return sum(times) / len(times)


def crossovers(rows: Sequence[Row], figures: Mapping[str, object]) -> list[dict[str, object]]:
    """The best way for each model, concurrency and published acceptance, and its gain over AR.

    figures: benchmarks/data/acceptance.json

    Diffusion may change the text; so the best lossless way is given too.
    """
    lengths = figures["acceptance_length_8B_draft_31_with_lora_by_category"]
    yields = figures["tokens_per_forward_10_tasks"]
    assert isinstance(lengths, Mapping)
    assert isinstance(yields, Mapping)
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        diffusion_tokens = float(yields.get(model, yields["8B"])["diffusion"])
        of_model = [row for row in rows if row["model"] == model]
        for concurrency in sorted({int(_number(row["concurrency"])) for row in of_model}):
            some = [row for row in of_model if row["concurrency"] == concurrency]
            best: dict[str, str] = {}
            for kind in ("qa", "average", "multilingual"):
                made = rates(some, chance_of(float(lengths[kind])), diffusion_tokens)
                if len(made) < 2:
                    continue
                for name, ways in (
                    (kind, made),
                    (f"{kind}, lossless", {w: r for w, r in made.items() if not w.startswith("diffusion")}),
                ):
                    way = max(ways, key=lambda key: ways[key])
                    best[name] = f"{way} x{ways[way] / made['ar']:.2f}"
            found.append({"model": model, "concurrency": concurrency, **best})
    return found


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)
