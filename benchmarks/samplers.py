"""Samplers that learn which guesses to trust, beside Fast-dLLM's factor: `python -m benchmarks.samplers`.

Counts, not times. A sampler is fitted on training prompts of the embedded checkpoint, never on the held-out
ones that it is measured on: how likely is a guess of a denoising forward to be what `ar` says? It then fixes,
the surest first, as many positions as leave the expected number of wrong ones within a budget. The engine
decodes as ever; it is only told other confidences.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from policies.modes import DecodePlan, Mode
from replicas.config import EngineConfig
from replicas.engine.batch import ModelSpec, Runner, ScheduledBatch, Segment, SegmentOutput
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec
from training.evaluate import DEFAULT_CHECKPOINT, score
from training.sampler import Guesses, Matrix, Prompts, fit, training_tasks
from training.tasks.registry import FAMILIES, held_out_tasks

BUDGETS = (0.02, 0.04)
"""Wrong guesses expected of a forward, at most."""
NUM_FEATURES = 12
PLACE = 10
"""The feature that is log(1 + the place in the block)."""
OF_PROBABILITIES = (0, 1, 4, 5, 6, 7, 8, 9, 10, 11)
"""The features that need no more of a guess than its probability: no entropy and no runner-up."""
NUM_TOP = 20
ROOM = EngineConfig(max_running=32, max_step_tokens=16384, max_prefill_tokens=8192)
SUREST = 16.0
"""The log-odds of what is fixed, and the most that a guess has."""
Sure = Callable[[torch.Tensor], torch.Tensor]
"""How likely each guess is right, [W], from its features [W, F]."""


def features(segment: Segment, output: SegmentOutput) -> torch.Tensor:
    """Of each masked position that a denoising forward guessed, features [W, F], first its log-odds."""
    first = segment.num_checked
    length = len(segment.token_ids) - segment.num_causal
    places = torch.tensor([index - segment.num_causal for index in segment.wanted[first:]])
    top = torch.tensor([[logprob for _, logprob in row] for row in output.top[first:]], dtype=torch.float64)
    doubt = 1.0 - torch.tensor(output.probs[first:], dtype=torch.float64)
    odds = torch.log((1.0 - doubt) / doubt.clamp_min(1e-7)).clamp(-SUREST, SUREST)
    entropy = -(top.exp() * top).sum(1)
    around = torch.full((length + 2,), SUREST, dtype=torch.float64)
    around[places + 1] = odds
    is_fixed = torch.ones(length, dtype=torch.bool)
    is_fixed[places] = False
    if segment.num_causal or segment.token_ids[0] == segment.token_ids[places[0]]:
        is_fixed[0] = False  # the first denoising, its seed masked
    at = torch.arange(length)
    last_fixed = torch.where(is_fixed, at, -1).cummax(0).values[places]
    columns = (
        odds,
        odds.clamp(max=6.0),
        torch.log(entropy + 1e-6),
        (top[:, 0] - top[:, 1]).clamp(max=SUREST),
        around[places],
        around[places + 2],
        around[1:-1].cummin(0).values[places],
        odds.min().expand_as(odds),
        torch.log(doubt.sum() + 1e-6).expand_as(odds),
        torch.log1p((places - last_fixed).double()),
        torch.log1p(places.double()),
        torch.full_like(odds, float(not is_fixed[0])),
    )
    return torch.stack(columns, dim=1)


@dataclass
class TopGuesses(Guesses):
    """Guesses with all the features, of a runner that is asked for the most probable tokens too."""

    def run(self, batch: ScheduledBatch, /) -> list[SegmentOutput]:
        outputs = _with_top(self.runner, batch)
        self.note(batch, outputs)
        return outputs

    def facts_of(self, segment: Segment, output: SegmentOutput) -> Matrix:
        return features(segment, output).numpy()


class Chooser:
    """A runner whose confidences have `diffusion` at threshold 0.5 fix what a budget of wrong guesses
    allows."""

    def __init__(self, runner: Runner, sure: Sure, budget: float):
        self._runner, self._sure, self._budget = runner, sure, budget

    @property
    def spec(self) -> ModelSpec:
        return self._runner.spec

    def run(self, batch: ScheduledBatch, /) -> list[SegmentOutput]:
        found = _with_top(self._runner, batch)
        return [self._chosen(*pair) for pair in zip(batch.segments, found, strict=True)]

    def _chosen(self, segment: Segment, output: SegmentOutput) -> SegmentOutput:
        first = segment.num_checked
        if first == len(segment.wanted):
            return output
        sure = self._sure(features(segment, output))
        ranked = sure.argsort(descending=True)
        fixed = ranked[(1.0 - sure[ranked]).cumsum(0) <= self._budget]
        probs = 0.4 * sure
        probs[fixed] = 1.0
        return replace(output, probs=output.probs[:first] + tuple(probs.tolist()))


def _with_top(runner: Runner, batch: ScheduledBatch) -> list[SegmentOutput]:
    """The outputs with the most probable tokens of guesses."""
    asked = [
        segment
        if segment.is_causal
        else replace(segment, sampling=replace(segment.sampling, logprobs=NUM_TOP))
        for segment in batch.segments
    ]
    return list(runner.run(replace(batch, segments=tuple(asked))))


def fitted_weights(inputs: torch.Tensor, noted: Guesses) -> torch.Tensor:
    """The weights [F] of inputs [N, F] that best tell which of the guesses were right."""
    return torch.from_numpy(fit(inputs.numpy(), np.array(noted.right, dtype=np.float64)))


def by_place(noted: Guesses, length: int) -> Sure:
    """The model's confidence, calibrated by place in the block: a line over its log-odds for each place."""

    def spread(rows: torch.Tensor) -> torch.Tensor:
        line = torch.stack((torch.ones(len(rows), dtype=torch.float64), rows[:, 0] / SUREST), dim=1)
        here = torch.nn.functional.one_hot(rows[:, PLACE].expm1().round().long(), length).double()
        return torch.cat((10.0 * line, *(here * column[:, None] for column in line.T)), dim=1)

    weights = fitted_weights(spread(torch.from_numpy(np.concatenate(noted.facts))), noted)
    return lambda rows: torch.sigmoid(spread(rows) @ weights)


def learned(noted: Guesses, columns: Sequence[int]) -> Sure:
    """A logistic regression over some of the features."""
    rows = torch.from_numpy(np.concatenate(noted.facts))
    mean, deviation = rows.mean(0), rows.std(0) + 1e-9

    def scaled(rows: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(len(rows), 1, dtype=torch.float64)
        return torch.cat((ones, ((rows - mean) / deviation)[:, columns]), dim=1)

    weights = fitted_weights(scaled(rows), noted)
    return lambda rows: torch.sigmoid(scaled(rows) @ weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument(
        "--per-family", type=int, default=40, help="tasks of each family, to fit and to measure"
    )
    parser.add_argument("--only", default="", help="only the samplers with this in their name")
    options = parser.parse_args()
    runner = TorchRunner.load(str(DEFAULT_CHECKPOINT))
    codec = TextCodec.load(str(DEFAULT_CHECKPOINT))
    fitted = Prompts(training_tasks(options.per_family), codec, ROOM)
    tasks = [task for family in FAMILIES for task in held_out_tasks(family, options.per_family)]
    measured = Prompts(tasks, codec, ROOM)
    finals = [answer.tokens for answer in fitted.answers(runner, DecodePlan(Mode.AR))]
    by_ar = measured.answers(runner, DecodePlan(Mode.AR))
    print("| block | sampler | exact % | same as ar % | tokens/forward |")
    print("| ---: | --- | ---: | ---: | ---: |")

    def show(name: str, over: Runner, plan: DecodePlan) -> None:
        row = score(plan, "all", tasks, measured.answers(over, plan), by_ar)
        shares = f"{100 * row.exact:.1f} | {100 * row.same_as_ar:.1f}"
        print(f"| {plan.block_length} | {name} | {shares} | {row.tokens_per_forward:.2f} |", flush=True)

    for block in options.blocks:
        guesses = TopGuesses(runner, finals)
        fitted.answers(guesses, DecodePlan(Mode.DIFFUSION, block, factor=0.1))
        plan = DecodePlan(Mode.DIFFUSION, block, threshold=0.5)
        samplers: dict[str, Sure] = {
            "doubts summed": lambda rows: torch.sigmoid(rows[:, 0]),
            "calibrated by place": by_place(guesses, block),
            "learned rule": learned(guesses, range(NUM_FEATURES)),
            "learned of probabilities alone": learned(guesses, OF_PROBABILITIES),
        }
        for factor in (0.1, 0.2):
            if options.only in (name := f"factor {factor}"):
                show(name, runner, DecodePlan(Mode.DIFFUSION, block, factor=factor))
        for sampler, sure in samplers.items():
            for budget in BUDGETS:
                if options.only in (name := f"{sampler}, {budget:g} wrong"):
                    show(name, Chooser(runner, sure, budget), plan)


if __name__ == "__main__":
    main()
