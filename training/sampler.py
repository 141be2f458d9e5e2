"""Fits a checkpoint's sampler (replicas.engine.decoders.learned_sampler): `python -m training.sampler`.

It learns from the guesses of denoising forwards on training prompts, in the states that the default factor
comes to, as long as the text is `ar`'s so far: was the guess `ar`'s token? One sampler serves all block
lengths. It is written beside the weights only if, on the held-out prompts, at least as many answers are right
with it as with the default factor, in fewer forwards, at each of diffusion's block lengths. Afterwards
`python -m training.evaluate --yields` measures it for policies and bounds on quality.
"""

import argparse
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from policies.modes import DEFAULT_FACTOR, DecodePlan, Mode
from replicas.config import EngineConfig
from replicas.engine.batch import ModelSpec, Runner, ScheduledBatch, Segment, SegmentOutput
from replicas.engine.decoders.learned_sampler import LEAST_DOUBT, LearnedSampler, Weights, log_odds
from replicas.engine.engine import Engine
from replicas.model.runner import TorchRunner
from replicas.sampler_file import SAMPLER_FILE, write_sampler
from replicas.text import TextCodec
from training.evaluate import DEFAULT_CHECKPOINT, Answer, Score, decode, score
from training.tasks.family import Task, draw
from training.tasks.registry import FAMILIES, held_out_tasks

FITTED_BLOCKS = (4, 8, 16, 32)
MEASURED_BLOCKS = (8, 16, 32)
RISK = 0.01
DOUBTS = 2
"""The column of all doubts together."""
DEFAULT_LIMITS = EngineConfig()
Matrix = NDArray[np.float64]


def facts(block_length: int, places: Sequence[int], probs: Sequence[float], seed_hidden: bool) -> Matrix:
    """What a sampler weighs of each guess, [W, 6], in the order of Weights."""
    doubts = math.log(sum(1.0 - prob for prob in probs) + LEAST_DOUBT)
    common = (doubts, math.log(block_length), float(seed_hidden))
    rows = [
        (1.0, log_odds(prob), common[0], math.log1p(place), common[1], common[2])
        for place, prob in zip(places, probs, strict=True)
    ]
    return np.array(rows)


@dataclass
class Guesses:
    """A runner that notes the facts of guesses, of texts that are `ar`'s so far, and whether they are right.

    finals: `ar`'s completion of each of an engine's sequences, in the order in which it numbers them.
    """

    runner: Runner
    finals: Sequence[Sequence[int]]
    facts: list[Matrix] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    _strayed: set[int] = field(default_factory=set)

    @property
    def spec(self) -> ModelSpec:
        return self.runner.spec

    def run(self, batch: ScheduledBatch, /) -> Sequence[SegmentOutput]:
        outputs = self.runner.run(batch)
        self.note(batch, outputs)
        return outputs

    def facts_of(self, segment: Segment, output: SegmentOutput) -> Matrix:
        """What is noted of each guess of a segment, [W, F]."""
        block = segment.token_ids[segment.num_causal :]
        places = [index - segment.num_causal for index in segment.wanted[segment.num_checked :]]
        is_seed_hidden = block[0] == self.spec.mask_token_id
        return facts(len(block), places, output.probs[segment.num_checked :], is_seed_hidden)

    def note(self, batch: ScheduledBatch, outputs: Sequence[SegmentOutput]) -> None:
        for segment, output in zip(batch.segments, outputs, strict=True):
            if segment.num_drafted:
                self._note(segment, output)

    def _note(self, segment: Segment, output: SegmentOutput) -> None:
        final, mask = self.finals[segment.seq_id], self.spec.mask_token_id
        for place, token in enumerate(segment.token_ids, start=segment.start - segment.prompt_len):
            if 0 <= place < len(final) and token not in (mask, final[place]):
                self._strayed.add(segment.seq_id)
        if segment.seq_id in self._strayed:
            return
        first = segment.num_checked
        places = [position - segment.prompt_len for position in segment.sampled_positions[first:]]
        kept = [row for row, place in enumerate(places) if place < len(final)]
        if kept:
            self.facts.append(self.facts_of(segment, output)[kept])
            self.right += [output.token_ids[first + row] == final[places[row]] for row in kept]


@dataclass
class Sampling:
    """A runner whose checkpoint has a sampler."""

    runner: Runner
    sampler: LearnedSampler

    @property
    def spec(self) -> ModelSpec:
        return replace(self.runner.spec, sampler=self.sampler)

    def run(self, batch: ScheduledBatch, /) -> Sequence[SegmentOutput]:
        return self.runner.run(batch)


def fit(inputs: Matrix, right: Matrix, ridge: float = 0.1) -> Matrix:
    """Logistic regression: the weights [F] of inputs [N, F] whose sum is the log-odds of being right [N]."""
    weights = np.zeros(inputs.shape[1])
    penalty = ridge * np.eye(len(weights))
    for _ in range(25):  # of Newton's steps
        sure = 1.0 / (1.0 + np.exp(-np.clip(inputs @ weights, -50.0, 50.0)))
        slope = inputs.T @ (right - sure) - ridge * weights
        bend = (inputs * (sure * (1.0 - sure))[:, None]).T @ inputs + penalty
        weights += np.linalg.solve(bend, slope)
    return weights


def fit_sampler(inputs: Matrix, right: Matrix, risk: float) -> LearnedSampler:
    """The sampler of these facts [N, 6] and whether the guesses were right [N].

    Doubts that would speak for a guess don't count, so that none is trusted less where the model is surer.
    Raises ValueError where a guess's own probability speaks against it, so that nothing can be learned.
    """
    scale = np.maximum(inputs.std(0), 1e-9)
    scale[0] = 1.0  # the bias
    found = fit(inputs / scale, right) / scale
    if found[DOUBTS] > 0.0:
        others = np.arange(len(found)) != DOUBTS
        found[DOUBTS] = 0.0
        found[others] = fit((inputs / scale)[:, others], right) / scale[others]
    weights = Weights(*(round(float(weight), 4) for weight in found))
    if weights.odds <= 0.0:
        raise ValueError(f"the guesses' probabilities don't tell which are right: {weights}")
    return LearnedSampler(weights, risk)


def training_tasks(per_family: int) -> list[Task]:
    rng = random.Random("samplers")
    return [draw(family, rng, held_out=False) for family in FAMILIES.values() for _ in range(per_family)]


class Prompts:
    """Tasks, and the engine that answers them. limits: the engine's, but for how many tasks may wait."""

    def __init__(self, tasks: list[Task], codec: TextCodec, limits: EngineConfig = DEFAULT_LIMITS):
        self.tasks = tasks
        self._codec = codec
        self._limits = limits.model_copy(update={"max_waiting": len(tasks)})

    def answers(self, runner: Runner, plan: DecodePlan) -> list[Answer]:
        engine = Engine(runner, self._limits)
        return decode(engine, self._codec, [task.chat for task in self.tasks], plan)


def learned(runner: Runner, prompts: Prompts, risk: float) -> tuple[LearnedSampler, str]:
    """The sampler that these prompts teach, and what it was fitted to."""
    finals = [answer.tokens for answer in prompts.answers(runner, DecodePlan(Mode.AR))]
    noted: list[Guesses] = []
    for block in FITTED_BLOCKS:
        noted.append(Guesses(runner, finals))
        prompts.answers(noted[-1], DecodePlan(Mode.DIFFUSION, block, factor=DEFAULT_FACTOR))
    inputs = np.concatenate([each for guesses in noted for each in guesses.facts])
    right = np.array([each for guesses in noted for each in guesses.right], dtype=np.float64)
    seen = f"{len(right)} guesses on {len(prompts.tasks)} training prompts, {int((1.0 - right).sum())} wrong"
    return fit_sampler(inputs, right, risk), seen


def measured(runner: Runner, prompts: Prompts, sampler: LearnedSampler) -> list[tuple[int, Score, Score]]:
    """By block length the scores of the default factor and of the sampler."""
    by_ar = prompts.answers(runner, DecodePlan(Mode.AR))

    def scored(over: Runner, plan: DecodePlan) -> Score:
        return score(plan, "all", prompts.tasks, prompts.answers(over, plan), by_ar)

    sampling = Sampling(runner, sampler)
    return [
        (
            block,
            scored(runner, DecodePlan(Mode.DIFFUSION, block, factor=DEFAULT_FACTOR)),
            scored(sampling, DecodePlan(Mode.DIFFUSION, block, risk=sampler.risk)),
        )
        for block in MEASURED_BLOCKS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--per-family", type=int, default=40, help="tasks of each, to fit and to measure")
    parser.add_argument("--risk", type=float, default=RISK, help="wrong guesses expected of a forward")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    options = parser.parse_args()
    started = time.process_time()
    runner = TorchRunner.load(str(options.checkpoint), dtype="float32", num_threads=options.threads)
    codec = TextCodec.load(str(options.checkpoint))
    sampler, seen = learned(runner, Prompts(training_tasks(options.per_family), codec), options.risk)
    print(f"{sampler.weights}\nfitted to {seen}", flush=True)
    held_out = [task for family in FAMILIES for task in held_out_tasks(family, options.per_family)]
    rows = measured(runner, Prompts(held_out, codec), sampler)
    print("\n| block | setting | exact % | same as ar % | tokens/forward |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for block, *scores in rows:
        for name, of in zip((f"factor {DEFAULT_FACTOR}", f"risk {options.risk:g}"), scores, strict=True):
            shares = f"{100 * of.exact:.1f} | {100 * of.same_as_ar:.1f}"
            print(f"| {block} | {name} | {shares} | {of.tokens_per_forward:.2f} |")
    print(f"\n{time.process_time() - started:.0f} s of CPU time")
    if not all(
        by_sampler.exact >= by_factor.exact and by_sampler.tokens_per_forward > by_factor.tokens_per_forward
        for _, by_factor, by_sampler in rows
    ):
        raise SystemExit(
            "fewer answers are right than with the factor, or no fewer forwards taken: nothing is written; "
            f"a {SAMPLER_FILE} of other weights is to be deleted"
        )
    write_sampler(options.checkpoint, sampler, f"training.sampler: {seen}, {date.today()}")


if __name__ == "__main__":
    main()
