"""The speed of light of decoding: the fewest forwards in which a checkpoint can say what it says anyway.

An oracle that knows the final text, `ar`'s greedy one, chooses in place of a sampler, as in the
speed-of-light analysis of arXiv 2607.05722. In `diffusion` it fixes, in each denoising forward, exactly
those positions whose most likely token is the final text's; in `self_speculation` it verifies of a draft
just what is right. What lies between a sampler and its oracle is what a better choice could bring: all
else, the model, its blocks, the forwards that begin and commit them, is the same, since the engine itself
decodes.

Diffusion's oracle fixes all that it can at once. For a block of one or two denoisings that is the optimum:
the first forward depends on no choice, so where it is not right everywhere nobody does with one. For more
it need not be, since a fixed position can turn another's guess wrong; but such a block takes two at least,
which gives a bound that no choice passes (`at_most`). Where a forward is right at no position, the oracle
is told the first one's token, so that it goes on.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from policies.modes import DecodePlan, Mode
from replicas.engine.batch import ModelSpec, Runner, ScheduledBatch, Segment, SegmentOutput

BLOCK_LENGTHS = (8, 16, 32)
LEARNED = "diffusion, learned sampler"
ORACLE = "diffusion, oracle"
SPECULATING_ORACLE = "self_speculation, oracle"
WAYS: Mapping[str, Callable[[int], DecodePlan]] = MappingProxyType(
    {
        "diffusion, threshold 0.9": partial(DecodePlan, Mode.DIFFUSION, threshold=0.9),
        "diffusion, threshold 0.99": partial(DecodePlan, Mode.DIFFUSION, threshold=0.99),
        "diffusion, factor 0.5": partial(DecodePlan, Mode.DIFFUSION, factor=0.5),
        "diffusion, factor 0.1": partial(DecodePlan, Mode.DIFFUSION, factor=0.1),
        ORACLE: partial(DecodePlan, Mode.DIFFUSION, threshold=0.5),
        "self_speculation": partial(DecodePlan, Mode.SELF_SPECULATION),
        SPECULATING_ORACLE: partial(DecodePlan, Mode.SELF_SPECULATION),
    }
)
"""The ways of decoding by name: the plan of a block length. An oracle's runs over an Oracle."""
COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "diffusion, threshold 0.9": "#c9b8d6",
        "diffusion, threshold 0.99": "#ad8fc0",
        "diffusion, factor 0.5": "#8a4fa3",
        "diffusion, factor 0.1": "#5c2f70",
        LEARNED: "#2b1040",
        "self_speculation": "#2f8f5b",
    }
)
"""Of a plot's bars; an oracle's are white, with the edge of what it bounds."""


class Decoded(Protocol):
    """An answer: its tokens, an end of text included, and its forwards after the prefill."""

    @property
    def tokens(self) -> tuple[int, ...]: ...

    @property
    def num_forwards(self) -> int: ...


Decode = Callable[[Runner, DecodePlan], Sequence[Decoded]]
"""Answers the same prompts in the same order, by an engine of its own over the runner."""


@dataclass(frozen=True)
class Reached:
    """What a way of decoding reaches at one block length."""

    way: str
    block_length: int
    tokens_per_forward: float
    """Tokens after the first one, which the prefill gives, a forward."""
    same_as_ar: float
    """The share of answers equal to `ar`'s, token for token."""
    at_most: float | None = None
    """The tokens a forward that no choice of positions passes; of diffusion's oracle alone."""
    num_told: int = 0
    """Forwards that were right at no position, so that the oracle was told one."""


class Oracle:
    """A runner that says of each guess, by its probability 1 or 0, whether the final text has it.

    finals: the completion of each of an engine's sequences, in the order in which it numbers them.
    speculates: guesses are drafts, of which it leaves only the beginning that is right. Else they are
    denoisings; of one in which nothing is right, it tells the first position's token.
    """

    def __init__(self, runner: Runner, finals: Sequence[Sequence[int]], *, speculates: bool = False):
        self._runner = runner
        self._finals = finals
        self._speculates = speculates
        self.num_denoisings: Counter[tuple[int, int]] = Counter()
        """Forwards that denoised, by sequence and position of the block's first token."""
        self.num_told = 0

    @property
    def spec(self) -> ModelSpec:
        return self._runner.spec

    def run(self, batch: ScheduledBatch, /) -> list[SegmentOutput]:
        outputs = self._runner.run(batch)
        return [self._judged(*pair) for pair in zip(batch.segments, outputs, strict=True)]

    def _judged(self, segment: Segment, output: SegmentOutput) -> SegmentOutput:
        first = sum(index < segment.num_causal for index in segment.wanted)
        final = self._finals[segment.seq_id]
        # What is past the end of the text is never right, and never wanted either.
        places = [position - segment.prompt_len for position in segment.sampled_positions[first:]]
        truth = [final[place] if place < len(final) else None for place in places]
        if not any(token is not None for token in truth):
            return replace(output, token_ids=output.token_ids[:first], probs=output.probs[:first])
        is_right = [token == guess for token, guess in zip(truth, output.token_ids[first:], strict=True)]
        if self._speculates:
            end = first + (is_right.index(False) if False in is_right else len(is_right))
            return replace(
                output, token_ids=output.token_ids[:end], probs=output.probs[:first] + (1.0,) * (end - first)
            )
        self.num_denoisings[segment.seq_id, segment.start + segment.num_causal] += 1
        tokens = list(output.token_ids)
        if not any(is_right):
            self.num_told += 1
            assert truth[0] is not None
            tokens[first], is_right[0] = truth[0], True
        return replace(
            output, token_ids=tuple(tokens), probs=output.probs[:first] + tuple(map(float, is_right))
        )


def measure(runner: Runner, decode: Decode, block_lengths: Sequence[int] = BLOCK_LENGTHS) -> list[Reached]:
    """What each of WAYS, and the checkpoint's own sampler where it has one, reaches at each block length."""
    by_ar = decode(runner, DecodePlan(Mode.AR))
    finals = [answer.tokens for answer in by_ar]
    reached = []
    ways = dict(WAYS)
    if runner.spec.risk is not None:
        ways[LEARNED] = partial(DecodePlan, Mode.DIFFUSION, risk=runner.spec.risk)
    for block_length in block_lengths:
        for way, plan_of in ways.items():
            plan = plan_of(block_length)
            if way not in (ORACLE, SPECULATING_ORACLE):
                reached.append(_reached(way, block_length, decode(runner, plan), finals))
                continue
            oracle = Oracle(runner, finals, speculates=way == SPECULATING_ORACLE)
            reached.append(_reached(way, block_length, decode(oracle, plan), finals, oracle))
    return reached


def _reached(
    way: str,
    block_length: int,
    answers: Sequence[Decoded],
    finals: Sequence[tuple[int, ...]],
    oracle: Oracle | None = None,
) -> Reached:
    num_tokens = sum(len(answer.tokens) - 1 for answer in answers)
    num_forwards = sum(answer.num_forwards for answer in answers)
    same = sum(answer.tokens == final for answer, final in zip(answers, finals, strict=True))
    row = Reached(way, block_length, num_tokens / max(1, num_forwards), same / len(finals))
    if oracle is None or not oracle.num_denoisings:
        return row
    saved = sum(max(0, count - 2) for count in oracle.num_denoisings.values())
    return replace(row, at_most=num_tokens / max(1, num_forwards - saved), num_told=oracle.num_told)


def table(reached: Sequence[Reached]) -> str:
    """A Markdown table: a row a way; by block, tokens a forward and the share of answers that are `ar`'s."""
    blocks = sorted({row.block_length for row in reached})
    lines = [
        "| | " + " | ".join(f"block {block}" for block in blocks) + " |",
        "| --- |" + " ---: |" * len(blocks),
    ]
    for way in dict.fromkeys(row.way for row in reached):
        cells = [
            f"{row.tokens_per_forward:.2f} ({100 * row.same_as_ar:.1f} %)"
            for row in reached
            if row.way == way
        ]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
        bounds = [row for row in reached if row.way == way and row.at_most is not None]
        if bounds:
            lines.append(
                "| no choice of positions passes | "
                + " | ".join(f"{row.at_most:.2f}" for row in bounds)
                + " |"
            )
            lines.append(
                "| forwards right nowhere | " + " | ".join(str(row.num_told) for row in bounds) + " |"
            )
    return "\n".join(lines)


def plot(reached: Sequence[Reached], path: Path) -> None:
    """Tokens a forward by way, a group of bars a block, the oracles' hatched."""
    from matplotlib.figure import Figure

    blocks = sorted({row.block_length for row in reached})
    ways = list(dict.fromkeys(row.way for row in reached))
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(ways)
    for number, way in enumerate(ways):
        found = [row.tokens_per_forward for row in reached if row.way == way]
        places = [group + (number - (len(ways) - 1) / 2) * width for group in range(len(blocks))]
        is_oracle = way in (ORACLE, SPECULATING_ORACLE)
        colour = COLOURS.get(way, "#ffffff")
        edge = "#5c2f70" if way == ORACLE else "#2f8f5b" if is_oracle else colour
        bars = axes.bar(
            places,
            found,
            0.9 * width,
            color=colour,
            edgecolor=edge,
            hatch="///" if is_oracle else "",
            label=way,
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_xticks(range(len(blocks)), labels=[f"block {block}" for block in blocks])
    axes.set_ylabel("tokens a forward")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
