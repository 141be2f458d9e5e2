"""All families, and the draws of training chats and held-out tasks."""

import random
from collections.abc import Iterator

from training.tasks import code, drills, lists, numbers, prose, records
from training.tasks.family import Family, Task, draw

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
"""The evaluated families by name."""

SYSTEM_MESSAGES = (
    "You are Triad.",
    "You are a helpful assistant.",
    "Answer exactly and briefly.",
    "You are Triad, a helpful assistant.",
)

Message = dict[str, str]


def train_chat(
    rng: random.Random,
    shares: dict[str, float],
    two_turn_share: float,
    system_share: float,
    talk_share: float,
    drill_share: float = 0.0,
) -> list[Message]:
    """A training chat of one or two turns; family f is drawn with weight `shares[f]` (1 if not named)."""
    names = list(FAMILIES)
    weights = [shares.get(name, 1.0) for name in names]
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
            task = draw(FAMILIES[rng.choices(names, weights)[0]], rng, held_out=False)
            prompt, answer = task.prompt, task.answer
        messages.append({"role": "user", "content": prompt})
        messages.append({"role": "assistant", "content": answer})
    return messages


def held_out_tasks(family: str, count: int, seed: int = 0) -> Iterator[Task]:
    """`count` different held-out tasks of a family, the same for the same seed."""
    rng = random.Random(f"held-out/{family}/{seed}")
    seen: set[str] = set()
    while len(seen) < count:
        task = draw(FAMILIES[family], rng, held_out=True)
        if task.prompt not in seen:
            seen.add(task.prompt)
            yield task
