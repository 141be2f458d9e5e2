"""Measures the adapter on held-out chat prompts with the real engine.

`python -m training.smollm2.evaluate`. Greedy, every prompt under every setting: mean accepted length
(tokens a round of self-speculation), tokens a forward (such a round is one, a diffusion block's
commit is one) and the share of answers that are AR's token for token. --show prints answers side by side,
since no number says whether diffusion reads well.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from policies.modes import DecodePlan, Mode
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec
from training.evaluate import Answer, decode, name_of
from training.smollm2.convert import CHECKPOINT
from training.smollm2.prompts import held_out_prompts
from training.tasks.family import Chat

SETTINGS = (
    DecodePlan(Mode.AR),
    *(DecodePlan(Mode.SELF_SPECULATION, block) for block in (4, 8, 16)),
    *(DecodePlan(Mode.DIFFUSION, block, 0.9) for block in (8, 16, 32)),
)


@dataclass(frozen=True)
class Score:
    """The figures of all prompts under one setting."""

    setting: str
    num_prompts: int
    tokens: int
    tokens_per_forward: float
    accepted: float | None
    """Tokens a round of self-speculation; None for other modes."""
    same_as_ar: float


def score(plan: DecodePlan, answers: list[Answer], by_ar: list[Answer]) -> Score:
    tokens = sum(len(answer.tokens) - 1 for answer in answers)
    per_forward = tokens / max(1, sum(answer.num_forwards for answer in answers))
    return Score(
        setting=name_of(plan),
        num_prompts=len(answers),
        tokens=tokens,
        tokens_per_forward=per_forward,
        accepted=per_forward if plan.mode is Mode.SELF_SPECULATION else None,
        same_as_ar=sum(a.tokens == b.tokens for a, b in zip(answers, by_ar, strict=True)) / len(answers),
    )


def evaluate(
    checkpoint: Path, prompts: list[str], plans: tuple[DecodePlan, ...] = SETTINGS, dtype: str = "float32"
) -> tuple[list[Score], list[list[Answer]]]:
    """Scores and answers by plan, the first of which is `ar`.

    Raises ValueError for a mode the checkpoint lacks.
    """
    runner = TorchRunner.load(str(checkpoint), dtype=dtype)
    missing = {plan.mode for plan in plans} - set(runner.spec.modes)
    if missing:
        raise ValueError(f"{checkpoint} has no {', '.join(sorted(missing))}: is its linear_spec_lora/ there?")
    codec = TextCodec.load(str(checkpoint))
    chats = [Chat([{"role": "user", "content": prompt}]) for prompt in prompts]
    answers = [
        decode(Engine(runner, EngineConfig(max_waiting=len(chats))), codec, chats, plan) for plan in plans
    ]
    return [score(plan, made, answers[0]) for plan, made in zip(plans, answers, strict=True)], answers


def table(scores: list[Score]) -> str:
    lines = [
        "| setting | prompts | tokens | tokens/forward | accepted | same as ar % |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for s in scores:
        accepted = "" if s.accepted is None else f"{s.accepted:.2f}"
        lines.append(
            f"| {s.setting} | {s.num_prompts} | {s.tokens} | {s.tokens_per_forward:.2f} | {accepted} "
            f"| {100 * s.same_as_ar:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--prompts", type=int, default=None, help="only the first so many")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--show", type=int, default=0, help="answers to print, of ar and of each diffusion")
    parser.add_argument("--json", type=Path, help="write the scores there too")
    arguments = parser.parse_args()
    prompts = held_out_prompts()[: arguments.prompts]
    try:
        scores, answers = evaluate(arguments.checkpoint, prompts, dtype=arguments.dtype)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    print(table(scores))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(s) for s in scores], indent=1) + "\n")
    for index, prompt in enumerate(prompts[: arguments.show]):
        print(f"\n## {prompt}")
        for plan, made in zip(SETTINGS, answers, strict=True):
            if plan.mode is not Mode.SELF_SPECULATION:
                print(f"\n[{name_of(plan)}]\n{made[index].text}")


if __name__ == "__main__":
    main()
