"""The best way to decode by concurrency and acceptance, from a sweep of forwards. Pure.

A round of self-speculation with block B commits y tokens in a draft and a verify, of diffusion y in so many
forwards, of AR one in one: tokens a second are C y / time. With each drafted token accepted with chance a,
independently, y(B) = 1 + a + ... + a^(B-1) (Leviathan et al., arXiv 2211.17192, equation 1). a is set so that
y(32) is the published accepted length of a kind of text, and y at shorter blocks follows.
"""

from collections.abc import Iterable, Mapping, Sequence

Row = Mapping[str, object]


def accepted(chance: float, block: int) -> float:
    """Tokens a round of self-speculation commits."""
    return sum(chance**index for index in range(block))


def chance_of(accepted_tokens: float, block: int = 32) -> float:
    """The chance of acceptance at which a round of that block commits so many tokens."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if accepted(middle, block) < accepted_tokens else (low, middle)
    return low


def rates(rows: Iterable[Row], chance: float, diffusion_tokens: float) -> dict[str, float]:
    """Tokens a second of every way to decode, from the rows of one model and concurrency.

    diffusion_tokens: committed by a denoising forward at block 32
    """
    found: dict[str, float] = {}
    for row in rows:
        concurrency, block = _number(row["concurrency"]), int(_number(row["block"]))
        verify_ms = _number(row["verify_ms"])
        if block == 1:
            found["ar"] = concurrency / verify_ms * 1e3
        elif row["draft_ms"] is not None:
            draft_ms = _number(row["draft_ms"])
            tokens = concurrency * accepted(chance, block)
            found[f"self_speculation {block}"] = tokens / (draft_ms + verify_ms) * 1e3
            if block == 32:
                found["diffusion 32"] = concurrency * diffusion_tokens / draft_ms * 1e3
    return found


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
                if "ar" not in made or len(made) < 2:
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
