"""Drills: very short tasks that teach copying and looking up, the slowest things to learn. Not evaluated.

In a long request a word to copy is one of sixty tokens that a head may attend to, so the first gradient
towards copying it is weak; in a request of ten tokens it is several times stronger.
"""

import random

from training.tasks.words import (
    ANIMALS,
    CITIES,
    CODENAMES,
    DAYS,
    ITEMS,
    LANGUAGES,
    MONTHS,
    NAMES,
    SURNAMES,
    TEAMS,
)

_LISTS = (NAMES, NAMES, NAMES, CITIES, CITIES, TEAMS, LANGUAGES, SURNAMES, CODENAMES, DAYS, MONTHS)
_FACTS = {
    "name": (NAMES, "named {}"),
    "city": (CITIES, "lives in {}"),
    "team": (TEAMS, "works in {}"),
    "language": (LANGUAGES, "speaks {}"),
    "day": (DAYS, "on {}"),
    "item": (ITEMS, "has the {}"),
    "user": (ANIMALS, "and the {}"),
}


def repeat(rng: random.Random) -> tuple[str, str]:
    """(request, answer): one to four words to write again, in a layout."""
    words = [rng.choice(rng.choice(_LISTS)) for _ in range(rng.randint(1, 4))]
    target, separator = rng.choice((("commas", ", "), ("arrows", " -> "), ("bullets", "\n- ")))
    lead = "- " if target == "bullets" else ""
    given = rng.choice((", ", ",", "\n", " and ")).join(words)
    return f"Write with {target}: {given}", lead + separator.join(words)


def look_up(rng: random.Random) -> tuple[str, str]:
    """(request, answer): a question for one of two to four facts."""
    asked = rng.sample(sorted(_FACTS), rng.randint(2, 4))
    values = {key: rng.choice(_FACTS[key][0]) for key in asked}
    wanted = rng.choice(asked)
    style = rng.randrange(2)
    facts = ", ".join(
        f"{key} {values[key]}" if style else _FACTS[key][1].format(values[key]) for key in asked
    )
    return f"{facts}. Give me the {wanted}.", f"The {wanted} is {values[wanted]}"


def drill(rng: random.Random) -> tuple[str, str]:
    """(request, answer) of a random drill."""
    return rng.choice((repeat, look_up))(rng)
