"""Measures a checkpoint on held-out prompts with the real engine: `python -m training.evaluate`.

For each decoding setting and family: exact match (the family's own checker, and a proper end of text), tokens
per forward after the first token (those that verify nothing count too, as do commits), mean accepted length
(tokens a round of self-speculation), and the share of answers equal to `ar`'s, token for token. With
`--yields` what rounds brought, and the shares of answers that were right and that were not `ar`'s, go into
the checkpoint's folder, for a server's policy to start from. With `--tools` all that is measured of the
families whose chats offer functions. With `--speed-of-light` the samplers' tokens a forward stand beside an
oracle's (training.speed_of_light).
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from tqdm import tqdm

from policies.cost import RoundStats, RoundYield
from policies.modes import DecodePlan, Mode
from replicas.answer_forms import Tool, ToolUse
from replicas.config import EngineConfig
from replicas.engine.batch import ModelSpec, Runner
from replicas.engine.engine import Engine
from replicas.engine.sequence import Sequence
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec
from replicas.yields_file import YIELDS_FILE, write_yields
from training import speed_of_light
from training.tasks.family import Chat, Family, Task
from training.tasks.registry import ALL_FAMILIES, FAMILIES, TOOL_FAMILIES, held_out_tasks

DEFAULT_CHECKPOINT = Path(__file__).parents[1] / "replicas" / "checkpoints" / "triad-5m"
MAX_TOKENS = 320
SETTINGS = (
    DecodePlan(Mode.AR),
    *(DecodePlan(Mode.DIFFUSION, block, factor=f) for f in (0.05, 0.1, 0.2, 0.5) for block in (8, 16, 32)),
    *(DecodePlan(Mode.DIFFUSION, block, t) for t in (0.9, 0.95, 0.99) for block in (8, 16, 32)),
    *(DecodePlan(Mode.SELF_SPECULATION, block) for block in (4, 8, 16, 32)),
)


def settings(spec: ModelSpec) -> tuple[DecodePlan, ...]:
    """SETTINGS, and where the checkpoint has a sampler diffusion with its risk and with twice that."""
    risks = () if spec.risk is None else (spec.risk, 2.0 * spec.risk)
    return (
        *SETTINGS,
        *(DecodePlan(Mode.DIFFUSION, block, risk=risk) for risk in risks for block in (8, 16, 32)),
    )


@dataclass(frozen=True)
class Answer:
    """The result of decoding one task."""

    tokens: tuple[int, ...]
    """The completion, its end of text included."""
    text: str
    ended: bool
    """True if it ended with an end of text, not for want of room."""
    num_forwards: int


@dataclass(frozen=True)
class Score:
    """The figures of one family, or of all of them ("all"), under one setting."""

    setting: str
    family: str
    num_tasks: int
    exact: float
    tokens_per_forward: float
    accepted: float
    """Tokens a round, which is a forward; 1 for `ar`, 0 for `diffusion`, which accepts nothing."""
    same_as_ar: float


def name_of(plan: DecodePlan) -> str:
    if plan.mode is Mode.AR:
        return "ar"
    if plan.mode is Mode.SELF_SPECULATION:
        return f"self_speculation B={plan.block_length}"
    bounds = (("t", plan.threshold), ("f", plan.factor), ("r", plan.risk))
    [setting] = (f"{kind}={value:g}" for kind, value in bounds if value is not None)
    return f"diffusion {setting} B={plan.block_length}"


def decode(
    engine: Engine,
    codec: TextCodec,
    chats: Iterable[Chat],
    plan: DecodePlan,
    on_answer: Callable[[], object] = lambda: None,
    on_round: Callable[[RoundStats], object] = lambda _: None,
) -> list[Answer]:
    """Greedy answers to the chats, all submitted at once, in their order; no grammar holds calls to a form.

    on_round: called with each round of a block as it ended.
    """
    block_length = None if plan.mode is Mode.AR else plan.block_length
    options = DecodingOptions(plan.mode, block_length, plan.threshold, factor=plan.factor, risk=plan.risk)
    sequences: list[Sequence] = []
    for number, chat in enumerate(chats):
        ids = codec.encode(tuple(chat.messages), tools=tool_use(chat))
        sequences.append(engine.submit(str(number), ids, SamplingParams(max_tokens=MAX_TOKENS), options))
    while engine.has_work:
        for made in engine.step():
            if made.error is not None:
                raise RuntimeError(f"request {made.sequence.request_id}: {made.error} {made.message}")
            if made.ended:
                on_answer()
        rounds = engine.scheduler.counters.rounds
        while rounds:
            on_round(rounds.popleft())
    return [_answer(engine, codec, sequence) for sequence in sequences]


def tool_use(chat: Chat) -> ToolUse | None:
    """The functions offered in a chat, all of which may be called; None where there are none."""
    functions = [tool["function"] for tool in chat.tools]
    tools = tuple(Tool(each["name"], json.dumps(each["parameters"])) for each in functions)
    return ToolUse(tools, frozenset(tool.name for tool in tools)) if tools else None


def _answer(engine: Engine, codec: TextCodec, sequence: Sequence) -> Answer:
    tokens = tuple(sequence.tokens[sequence.num_prompt_tokens :])
    stream = codec.stream()
    text = stream.push(tokens) + stream.finish()
    return Answer(tokens, text, tokens[-1] in engine.spec.eos_token_ids, sequence.num_forwards)


def score(
    plan: DecodePlan, family: str, tasks: list[Task], answers: list[Answer], by_ar: list[Answer]
) -> Score:
    exact = sum(
        answer.ended and ALL_FAMILIES[task.family].check(task.params, answer.text)
        for task, answer in zip(tasks, answers, strict=True)
    )
    generated = sum(len(answer.tokens) - 1 for answer in answers)
    forwards = sum(answer.num_forwards for answer in answers)
    per_forward = generated / max(1, forwards)
    return Score(
        setting=name_of(plan),
        family=family,
        num_tasks=len(tasks),
        exact=exact / len(tasks),
        tokens_per_forward=per_forward,
        accepted=0.0 if plan.mode is Mode.DIFFUSION else per_forward,
        same_as_ar=sum(a.tokens == b.tokens for a, b in zip(answers, by_ar, strict=True)) / len(tasks),
    )


def evaluate(
    checkpoint: Path,
    per_family: int,
    plans: tuple[DecodePlan, ...] = (),
    num_threads: int | None = None,
    quantization: str | None = None,
    families: Mapping[str, Family] = FAMILIES,
) -> tuple[list[Score], list[RoundYield]]:
    """Scores by setting and family, `ar` first, each setting's last row is "all"; and the plans' yields.

    plans: `ar` first; none for all settings.
    """
    runner = TorchRunner.load(
        str(checkpoint), dtype="float32", num_threads=num_threads, quantization=quantization
    )
    return evaluate_runner(runner, TextCodec.load(str(checkpoint)), per_family, plans, families)


def evaluate_runner(
    runner: Runner,
    codec: TextCodec,
    per_family: int,
    plans: tuple[DecodePlan, ...] = (),
    families: Mapping[str, Family] = FAMILIES,
) -> tuple[list[Score], list[RoundYield]]:
    """The same of a model that is loaded."""
    plans = plans or settings(runner.spec)
    tasks = {family: list(held_out_tasks(family, per_family)) for family in families}
    everything = [task for family in families for task in tasks[family]]
    engine = Engine(runner, EngineConfig(max_waiting=len(everything)))
    scores: list[Score] = []
    yields: list[RoundYield] = []
    by_ar: list[Answer] = []
    with tqdm(total=len(plans) * len(everything), unit="answer") as bar:
        for plan in plans:
            bar.set_description(name_of(plan))
            rounds: list[RoundStats] = []
            chats = (task.chat for task in everything)
            answers = decode(engine, codec, chats, plan, bar.update, rounds.append)
            by_ar = by_ar or answers
            for number, (family, its_tasks) in enumerate(tasks.items()):
                span = slice(number * per_family, (number + 1) * per_family)
                scores.append(score(plan, family, its_tasks, answers[span], by_ar[span]))
            overall = score(plan, "all", everything, answers, by_ar)
            scores.append(overall)
            yields.append(mean_yield(plan, rounds, overall))
    return scores, yields


def mean_yield(plan: DecodePlan, rounds: list[RoundStats], overall: Score) -> RoundYield:
    """What a round of the plan brought on average, and how its answers were. `ar` has no rounds to count."""
    answers = {"differing": round(1.0 - overall.same_as_ar, 6), "right": round(overall.exact, 6)}
    if plan.mode is Mode.AR:
        return RoundYield(plan, 1.0, 1.0, **answers)
    num, forwards = len(rounds), sum(made.forwards for made in rounds)
    return RoundYield(
        plan,
        tokens=round(sum(made.tokens for made in rounds) / num, 4),
        forwards=round(forwards / num, 4),
        num_rounds=num,
        rows=round(sum(made.rows for made in rounds) / forwards, 2),
        **answers,
    )


def reached(
    checkpoint: Path, per_family: int, num_threads: int | None = None, quantization: str | None = None
) -> list[speed_of_light.Reached]:
    """What samplers and oracles reach on the held-out prompts.

    Steps have room for all prompts and rounds: no block begins in a forward of its own for want of it.
    """
    runner = TorchRunner.load(
        str(checkpoint), dtype="float32", num_threads=num_threads, quantization=quantization
    )
    codec = TextCodec.load(str(checkpoint))
    chats = [task.chat for family in FAMILIES for task in held_out_tasks(family, per_family)]
    roomy = EngineConfig(
        max_waiting=len(chats), max_running=32, max_step_tokens=16384, max_prefill_tokens=8192
    )

    def answers(over: Runner, plan: DecodePlan) -> list[Answer]:
        return decode(Engine(over, roomy), codec, chats, plan)

    return speed_of_light.measure(runner, answers)


def table(scores: list[Score]) -> str:
    """A Markdown table by setting and family."""
    lines = [
        "| setting | family | tasks | exact % | tokens/forward | accepted | same as ar % |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for s in scores:
        accepted = f"{s.accepted:.2f}" if s.accepted else ""
        lines.append(
            f"| {s.setting} | {s.family} | {s.num_tasks} | {100 * s.exact:.1f} | {s.tokens_per_forward:.2f} "
            f"| {accepted} | {100 * s.same_as_ar:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--per-family", type=int, default=20, help="held-out tasks of each family")
    parser.add_argument("--json", type=Path, help="write the scores there too")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument("--quantization", choices=["int8"], help="of the weights")
    parser.add_argument(
        "--yields", action="store_true", help=f"write the plans' yields to {YIELDS_FILE} in the checkpoint"
    )
    parser.add_argument(
        "--tools", action="store_true", help="measure the families whose chats offer functions instead"
    )
    parser.add_argument("--overall", action="store_true", help="print only the rows over all families")
    parser.add_argument("--speed-of-light", action="store_true", help="compare samplers with an oracle")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="with --speed-of-light: plot it there")
    arguments = parser.parse_args()
    if arguments.speed_of_light and (arguments.yields or arguments.overall):
        parser.error("--speed-of-light has no yields and no rows by family: leave out --yields and --overall")
    if arguments.tools and (arguments.yields or arguments.speed_of_light):
        parser.error("--yields and --speed-of-light go by requests that stand alone: leave out --tools")
    if arguments.plot and not arguments.speed_of_light:
        parser.error("--plot goes with --speed-of-light")
    started = time.time()
    if arguments.speed_of_light:
        rows = reached(arguments.checkpoint, arguments.per_family, arguments.threads, arguments.quantization)
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        if arguments.plot:
            speed_of_light.plot(rows, arguments.plot)
        print(speed_of_light.table(rows))
        print(f"\n{time.time() - started:.0f} s")
        return
    scores, yields = evaluate(
        arguments.checkpoint,
        arguments.per_family,
        num_threads=arguments.threads,
        quantization=arguments.quantization,
        families=TOOL_FAMILIES if arguments.tools else FAMILIES,
    )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(s) for s in scores], indent=1) + "\n")
    if arguments.yields:
        num_prompts = arguments.per_family * len(FAMILIES)
        source = f"training.evaluate: greedy answers to {num_prompts} held-out prompts, {date.today()}"
        write_yields(arguments.checkpoint, yields, source)
    print(table([s for s in scores if s.family == "all" or not arguments.overall]))
    lossless = all(s.same_as_ar == 1.0 for s in scores if s.setting.startswith("self_speculation"))
    print(f"\nself_speculation equals ar token for token: {'yes' if lossless else 'NO'}")
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
