"""Workloads to ask. The tasks are the embedded checkpoint's own, so answers are checked under load too."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loadtest.arrivals import Arrival, TraceError
from loadtest.slo import Slo
from training.tasks.family import draw
from training.tasks.registry import FAMILIES
from training.tasks.words import ITEMS, NAMES

ANSWER_LIMIT = 320
"""The most tokens of the embedded checkpoint in any task's answer."""


@dataclass(frozen=True)
class Ask:
    """One request to send."""

    workload: str
    class_name: str
    messages: tuple[dict[str, str], ...]
    check: Callable[[str], bool] | None = None
    """Judges an answer; None where there is nothing to judge by."""
    output_len: int | None = None
    """The exact number of tokens, the end of text ignored; None: up to the end."""
    expected: str | None = None
    """The text that the answer must have, where that is known."""

    def body(self, model: str, extra: dict[str, Any]) -> dict[str, Any]:
        """The request's JSON: greedy, streamed, with the usage. extra: more fields, such as `decoding`."""
        body: dict[str, Any] = {
            "model": model,
            "messages": list(self.messages),
            "temperature": 0,
            "max_tokens": self.output_len or ANSWER_LIMIT,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.output_len is not None:
            body["ignore_eos"] = True
        return body | extra


Draw = Callable[[random.Random, Arrival], Ask]


@dataclass(frozen=True)
class Workload:
    """A named kind of traffic."""

    name: str
    about: str
    draw: Draw
    slos: dict[str, Slo] = field(default_factory=dict)
    """Targets by class of request."""
    takes_lengths: bool = False
    """True if it asks with the lengths that an arrival has."""
    takes_classes: tuple[str, ...] | None = ()
    """The classes of an arrival that it knows; None is any."""

    def check_trace(self, arrivals: Sequence[Arrival]) -> None:
        """Raises TraceError for what this workload would have to leave out of account."""
        if not self.takes_lengths and any(a.prompt_len or a.output_len for a in arrivals):
            able = ", ".join(w.name for w in WORKLOADS.values() if w.takes_lengths)
            raise TraceError(f"the trace has lengths, which {self.name} does not take; these do: {able}")
        strange = {a.class_name for a in arrivals if a.class_name} - set(self.takes_classes or ())
        if strange and self.takes_classes is not None:
            known = ", ".join(self.takes_classes) or "none"
            names = ", ".join(sorted(strange))
            raise TraceError(f"the trace has classes {names}; {self.name} knows {known}, `trace` takes any")


INTERACTIVE = Slo(ttft_s=0.5, tpot_s=0.05)
BATCH = Slo(e2e_s=20.0)
LONG_PROMPT = Slo(ttft_s=2.0)

HIGH_ACCEPTANCE = ("story", "email", "sql", "spell", "table")
MIDDLE_ACCEPTANCE = ("dates", "python", "yaml", "add")
LOW_ACCEPTANCE = ("relist", "json", "units", "sort")
"""Families by the tokens a forward of self-speculation (the embedded checkpoint's model card)."""


def _task(workload: str, class_name: str, families: tuple[str, ...]) -> Draw:
    def ask(rng: random.Random, arrival: Arrival) -> Ask:
        family = FAMILIES[rng.choice(families)]
        task = draw(family, rng, held_out=True)
        messages = ({"role": "user", "content": task.prompt},)
        return Ask(workload, class_name, messages, lambda text: family.check(task.params, text))

    return ask


def words(rng: random.Random, count: int) -> str:
    """Text of `count` words, each of which is a token to the embedded checkpoint, and about one to others."""
    return " ".join(rng.choice(ITEMS) for _ in range(count))


def _lengths(workload: str, class_name: str, prompt_len: int, output_len: int) -> Draw:
    def ask(rng: random.Random, arrival: Arrival) -> Ask:
        """Asks with the arrival's own lengths and class where a trace gives them."""
        text = words(rng, max(1, (arrival.prompt_len or prompt_len) - 3))  # the template has about 3
        messages = ({"role": "user", "content": text},)
        length = arrival.output_len or output_len
        return Ask(workload, arrival.class_name or class_name, messages, output_len=length)

    return ask


def _shared_prefix(rng: random.Random, arrival: Arrival) -> Ask:
    """One of eight system prompts of 240 words, then a task; a prefix cache makes all but the first cheap."""
    number = rng.randrange(8)
    task = draw(FAMILIES[rng.choice(HIGH_ACCEPTANCE)], rng, held_out=True)
    system = f"{NAMES[number]}: {words(random.Random(number), 240)}"
    messages = ({"role": "system", "content": system}, {"role": "user", "content": task.prompt})
    return Ask("shared_prefix", "chat", messages, output_len=48)


_interactive = _task("mixed", "interactive", HIGH_ACCEPTANCE + MIDDLE_ACCEPTANCE)
_interactive_of = _lengths("mixed", "interactive", 32, 64)
_batch = _lengths("mixed", "batch", 24, 192)
_long = _lengths("mixed", "long_prompt", 480, 16)


def _mixed(rng: random.Random, arrival: Arrival) -> Ask:
    kinds = {"interactive": _interactive, "batch": _batch, "long_prompt": _long}
    name = arrival.class_name or rng.choices(list(kinds), (6, 2, 2))[0]
    if name == "interactive" and (arrival.prompt_len or arrival.output_len):
        return _interactive_of(rng, arrival)
    return kinds[name](rng, arrival)


WORKLOADS: dict[str, Workload] = {
    w.name: w
    for w in (
        Workload(
            "tasks",
            "all thirteen task families, answers checked",
            _task("tasks", "tasks", tuple(FAMILIES)),
            {"tasks": INTERACTIVE},
        ),
        Workload(
            "high_acceptance",
            f"drafts are mostly right: {', '.join(HIGH_ACCEPTANCE)}",
            _task("high_acceptance", "tasks", HIGH_ACCEPTANCE),
            {"tasks": INTERACTIVE},
        ),
        Workload(
            "middle_acceptance",
            f"in between: {', '.join(MIDDLE_ACCEPTANCE)}",
            _task("middle_acceptance", "tasks", MIDDLE_ACCEPTANCE),
            {"tasks": INTERACTIVE},
        ),
        Workload(
            "low_acceptance",
            f"drafts are often wrong: {', '.join(LOW_ACCEPTANCE)}",
            _task("low_acceptance", "tasks", LOW_ACCEPTANCE),
            {"tasks": INTERACTIVE},
        ),
        Workload(
            "long_prompt",
            "600 tokens in, 16 out: prefill",
            _lengths("long_prompt", "long_prompt", 600, 16),
            {"long_prompt": LONG_PROMPT},
            takes_lengths=True,
            takes_classes=None,
        ),
        Workload(
            "long_answer",
            "16 tokens in, 256 out: decoding",
            _lengths("long_answer", "batch", 16, 256),
            {"batch": BATCH},
            takes_lengths=True,
            takes_classes=None,
        ),
        Workload(
            "shared_prefix",
            "chats under eight long system prompts",
            _shared_prefix,
            {"chat": INTERACTIVE},
        ),
        Workload(
            "mixed",
            "interactive, batch and long-prompt requests, each with its own SLO",
            _mixed,
            {"interactive": INTERACTIVE, "batch": BATCH, "long_prompt": LONG_PROMPT},
            takes_lengths=True,
            takes_classes=("interactive", "batch", "long_prompt"),
        ),
        Workload(
            "trace",
            "lengths and classes as a trace has them; where it has none, 64 tokens in and 64 out",
            _lengths("trace", "trace", 64, 64),
            takes_lengths=True,
            takes_classes=None,
        ),
    )
}


def find_workload(name: str) -> Workload:
    """The workload of this name, or `tasks:<family>` for one family alone. Raises ValueError."""
    kind, colon, family = name.partition(":")
    if kind == "tasks" and colon:
        if family not in FAMILIES:
            raise ValueError(f"no task family '{family}'; the families are: {', '.join(FAMILIES)}")
        return Workload(name, f"{family} alone", _task(name, "tasks", (family,)), {"tasks": INTERACTIVE})
    if name not in WORKLOADS:
        raise ValueError(f"no workload '{name}'; the workloads are: {', '.join(WORKLOADS)}, tasks:<family>")
    return WORKLOADS[name]


def pool(workload: Workload, count: int, seed: int) -> list[Ask]:
    """Draws `count` requests of the workload, the same for the same seed."""
    rng = random.Random(f"pool/{seed}")
    return [workload.draw(rng, Arrival(0.0)) for _ in range(count)]


def verified(workload: Workload, asks: Sequence[Ask], texts: Sequence[str]) -> Workload:
    """A workload that draws from these requests alone, each of which must have its text."""
    expected = [replace(ask, expected=text) for ask, text in zip(asks, texts, strict=True)]
    return replace(workload, draw=lambda rng, arrival: rng.choice(expected))
