"""All families, and the draws of training chats and held-out tasks."""

import random
from collections.abc import Iterator

from training.tasks import code, drills, lists, numbers, prose, records, tools
from training.tasks.family import Chat, Family, Message, Task, draw

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *records.FAMILIES,
        *lists.FAMILIES,
        *numbers.FAMILIES,
        *code.FAMILIES,
        *prose.FAMILIES,
    )
}
"""The evaluated families whose requests stand alone, by name."""

TOOL_FAMILIES: dict[str, Family] = {
    family.name: family for family in tools.families({**FAMILIES, prose.SMALL_TALK.name: prose.SMALL_TALK})
}
"""The evaluated families whose chats offer functions, by name."""

ALL_FAMILIES = FAMILIES | TOOL_FAMILIES

SYSTEM_MESSAGES = (
    "You are Triad.",
    "You are a helpful assistant.",
    "Answer exactly and briefly.",
    "You are Triad, a helpful assistant.",
)

TOOL_SYSTEM_SHARE = 0.2
"""The share of chats with tools that begin with a system message."""


def train_chat(
    rng: random.Random,
    shares: dict[str, float],
    two_turn_share: float,
    system_share: float,
    talk_share: float,
    drill_share: float = 0.0,
    tool_share: float = 0.0,
) -> Chat:
    """A training chat of one or two turns, or one with tools.

    Of either kind family f is drawn with weight `shares[f]` (1 if not named).
    """
    if tool_share and rng.random() < tool_share:
        return _tool_chat(draw(_drawn(TOOL_FAMILIES, shares, rng), rng, held_out=False), rng)
    messages: list[Message] = []
    if rng.random() < system_share:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_MESSAGES)})
    for _ in range(2 if rng.random() < two_turn_share else 1):
        if rng.random() < talk_share:
            talk = prose.SMALL_TALK
            params = talk.sample(rng)
            prompt, answer = talk.phrase(params, rng), talk.answer(params)
        elif drill_share and rng.random() < drill_share:
            prompt, answer = drills.drill(rng)
        else:
            task = draw(_drawn(FAMILIES, shares, rng), rng, held_out=False)
            prompt, answer = task.prompt, task.answer
        messages.append({"role": "user", "content": prompt})
        messages.append({"role": "assistant", "content": answer})
    return Chat(messages)


def _tool_chat(task: Task, rng: random.Random) -> Chat:
    messages = [*task.chat.messages, {"role": "assistant", "content": task.answer}]
    if rng.random() < TOOL_SYSTEM_SHARE:
        messages.insert(0, {"role": "system", "content": rng.choice(tools.SYSTEM_MESSAGES)})
    return Chat(messages, task.chat.tools)


def _drawn(families: dict[str, Family], shares: dict[str, float], rng: random.Random) -> Family:
    return rng.choices(list(families.values()), [shares.get(name, 1.0) for name in families])[0]


def held_out_tasks(family: str, count: int, seed: int = 0) -> Iterator[Task]:
    """`count` different held-out tasks of a family, the same for the same seed."""
    rng = random.Random(f"held-out/{family}/{seed}")
    seen: set[str] = set()
    while len(seen) < count:
        task = draw(ALL_FAMILIES[family], rng, held_out=True)
        if task.prompt not in seen:
            seen.add(task.prompt)
            yield task
