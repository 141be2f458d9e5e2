"""Structured output by mode: validity, right answers, tokens a forward: `python -m benchmarks.forms`.

Two sets of greedy answers of triad-5m, all counts: held-out tasks of the family `json`, each with the schema
of its own answer, and without; and one task with random schemas that the model was not trained on, whose
answers are cut at MAX_FOREIGN_TOKENS. A cut answer is valid where it is the beginning of one that is.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

import jsonschema

from benchmarks.tables import table
from policies.control.replay import describe
from policies.modes import DecodePlan, Mode
from replicas.answer_forms import JsonFormat
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.engine.sequence import Sequence
from replicas.grammar_compiler import GrammarCompiler
from replicas.messages import DecodingOptions, SamplingParams
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec
from training.evaluate import DEFAULT_CHECKPOINT
from training.tasks.family import Task
from training.tasks.registry import FAMILIES, held_out_tasks

PLANS = (
    DecodePlan(Mode.AR),
    *(DecodePlan(Mode.SELF_SPECULATION, block) for block in (8, 16, 32)),
    *(DecodePlan(Mode.DIFFUSION, block) for block in (8, 16, 32)),
    *(DecodePlan(Mode.DIFFUSION, block, 0.9) for block in (8, 16, 32)),
)
MAX_TOKENS = 320
MAX_FOREIGN_TOKENS = 120
NUM_SCHEMAS = 60
WORDS = (
    "name",
    "age",
    "city",
    "team",
    "language",
    "email",
    "phone",
    "score",
    "active",
    "since",
    "tags",
    "note",
)


@dataclass(frozen=True)
class Asked:
    task: Task
    schema: dict[str, Any]
    max_tokens: int


def own_schema(task: Task) -> dict[str, Any]:
    """The schema of a task's own answer."""
    properties = {
        key: {"type": "integer"} if key == "age" else {"type": "string"} for key in task.params["keys"]
    }
    row = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "array", "items": row, "minItems": 1}


def foreign_schema(rng: Random, depth: int = 2) -> dict[str, Any]:
    """A random schema of an object, as programs' types have."""
    names = rng.sample(WORDS, rng.randint(1, 5))
    properties = {name: _kind(rng, depth) for name in names}
    required = [name for name in names if rng.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _kind(rng: Random, depth: int) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"type": "string", "maxLength": rng.randint(4, 20)},
        {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"},
        {"type": "string", "format": "date"},
        {"type": "integer", "minimum": 0, "maximum": rng.randint(9, 200)},
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "boolean"},
        {"enum": rng.sample(("red", "green", "blue", "Dublin", "Legal", 7, None), 3)},
    ]
    if depth:
        inner = _kind(rng, depth - 1)
        kinds += [
            {"type": "array", "items": inner, "maxItems": 3},
            {"anyOf": [inner, {"type": "null"}]},
            foreign_schema(rng, depth - 1),
        ]
    return rng.choice(kinds)


def decode(
    runner: TorchRunner,
    codec: TextCodec,
    compiler: GrammarCompiler | None,
    asked: Iterable[Asked],
    plan: DecodePlan,
) -> list[Sequence]:
    """Answers under a plan, in a form where there is a compiler of it."""
    engine = Engine(runner, EngineConfig(max_running=16))
    block_length = None if plan.mode is Mode.AR else plan.block_length
    is_diffusion = plan.mode is Mode.DIFFUSION
    options = DecodingOptions(
        plan.mode,
        block_length,
        plan.threshold if is_diffusion else None,
        factor=plan.factor if is_diffusion else None,
    )
    sequences = []
    for number, item in enumerate(asked):
        form = JsonFormat(json.dumps(item.schema))
        sampling = SamplingParams(max_tokens=item.max_tokens, response_format=form if compiler else None)
        grammar = compiler.compile(form) if compiler else None
        prompt = codec.encode(({"role": "user", "content": item.task.prompt},))
        sequences.append(engine.submit(str(number), prompt, sampling, options, grammar=grammar))
        if number % 32 == 31:
            _finish(engine)
    _finish(engine)
    return sequences


def _finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def figures(
    codec: TextCodec, compiler: GrammarCompiler, asked: list[Asked], made: list[Sequence], eos: frozenset[int]
) -> list[str]:
    """Answers that came to an end, valid ones, right ones, tokens a forward."""
    ended = valid = right = forwards = tokens = 0
    for item, sequence in zip(asked, made, strict=True):
        ids = sequence.tokens[sequence.num_prompt_tokens :]
        tokens, forwards = tokens + len(ids) - 1, forwards + sequence.num_forwards
        text = codec.decode([token for token in ids if token not in eos])
        is_whole = sequence.num_remaining > 0 or ids[-1] in eos or _is_valid(text, item.schema)
        ended += is_whole
        right += is_whole and FAMILIES["json"].check(item.task.params, text)
        if is_whole:
            valid += _is_valid(text, item.schema)
        else:
            valid += compiler.compile(JsonFormat(json.dumps(item.schema))).num_allowed(ids) == len(ids)
    whole = len(asked)
    return [
        f"{ended / whole:.0%}",
        f"{valid / whole:.1%}",
        f"{right / whole:.1%}",
        f"{tokens / forwards:.2f}",
    ]


def _is_valid(text: str, schema: dict[str, Any]) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", type=int, default=100, help="held-out tasks of the family json")
    num_tasks = parser.parse_args().tasks
    codec = TextCodec.load(str(DEFAULT_CHECKPOINT))
    runner = TorchRunner.load(str(DEFAULT_CHECKPOINT), dtype="float32", num_pages=700)
    spec = runner.spec
    compiler = codec.grammars(spec.vocab_size, spec.eos_token_ids)
    tasks = list(held_out_tasks("json", num_tasks))
    own = [Asked(task, own_schema(task), MAX_TOKENS) for task in tasks]
    rng = Random(1)
    foreign = [
        Asked(tasks[index % len(tasks)], foreign_schema(rng), MAX_FOREIGN_TOKENS)
        for index in range(NUM_SCHEMAS)
    ]
    rows = []
    for plan in PLANS:
        row = [describe(plan)]
        for asked, used in ((own, None), (own, compiler), (foreign, compiler)):
            made = decode(runner, codec, used, asked, plan)
            found = figures(codec, compiler, asked, made, spec.eos_token_ids)
            row += found if asked is own else [*found[:2], found[3]]
        rows.append(row)
        print(row, flush=True)
    each = ("ended", "valid", "right", "tokens a forward")
    print(table(("mode", *each, *each, "ended", "valid", "tokens a forward"), rows))


if __name__ == "__main__":
    main()
