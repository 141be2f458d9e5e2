"""Prose: short stories, e-mails and spelling; and a little small talk, which is not evaluated."""

import random
import re

from training.tasks.family import Family, Params
from training.tasks.words import ANIMALS, CITIES, DAYS, ITEMS, NAMES, TOPICS

# ---------------------------------------------------------------- story

_GENRES = ("adventure", "mystery", "comedy")


def _story_sample(rng: random.Random) -> Params:
    hero, friend = rng.sample(NAMES, 2)
    return {
        "hero": hero,
        "friend": friend,
        "city": rng.choice(CITIES),
        "item": rng.choice(ITEMS),
        "animal": rng.choice(ANIMALS),
        "genre": rng.choice(_GENRES),
        "ending": rng.choice(("happy", "sad")),
    }


def _story_phrase(params: Params, rng: random.Random) -> str:
    p = params
    return rng.choice(
        (
            f"Tell a {p['genre']} story about {p['hero']} and {p['friend']} in {p['city']} with "
            f"the {p['item']} and the {p['animal']}. Make the ending {p['ending']}.",
            f"Write a short {p['genre']} with a {p['ending']} ending. {p['hero']} and {p['friend']} live in "
            f"{p['city']} and there is the {p['item']} and the {p['animal']}.",
        )
    )


def _story_answer(params: Params) -> str:
    hero, friend, city = params["hero"], params["friend"], params["city"]
    item, animal = params["item"], params["animal"]
    happy = params["ending"] == "happy"
    if params["genre"] == "adventure":
        text = (
            f"One morning in {city}, {hero} found the {item} by the river. {friend} wanted to follow the old "
            f"map, and the {animal} ran ahead. They crossed the forest, slept under the stars and shared "
            f"their last bread. {friend} held the {animal} close. They climbed the hill until "
            f"the {item} began to shine."
        )
        end = (
            f"{hero} and {friend} came home to {city} as heroes."
            if happy
            else f"But a storm took the {item}, and {hero} and {friend} went home in silence."
        )
    elif params["genre"] == "mystery":
        text = (
            f"The {item} was missing. All of {city} talked about it, and {hero} asked {friend} for help. "
            f"They looked in every house and asked every child. At night they followed "
            f"the {animal} through the dark streets. {friend} carried a light, and {hero} counted the steps."
        )
        end = (
            f"At last {friend} saw the {item} in the nest of the {animal}, and {hero} laughed."
            if happy
            else f"The {animal} was gone by dawn, and {hero} never saw the {item} again."
        )
    else:
        text = (
            f"Nobody in {city} could explain why the {animal} sat on the {item}. {hero} sang to it. "
            f"{friend} danced for it. The {animal} only yawned. They offered it cheese, cake and "
            f"a letter from the mayor. Soon half of {city} stood in line to see the {animal} and the {item}."
        )
        end = (
            f"So {hero} bought a new {item}, and {friend} kept the {animal}."
            if happy
            else f"In the end the {item} broke, and {friend} blamed {hero}."
        )
    return f"{text} {end}"


def _same_words(reference: str, answer: str) -> bool:
    return answer.split() == reference.split()


def _story_check(params: Params, answer: str) -> bool:
    return _same_words(_story_answer(params), answer)


# ---------------------------------------------------------------- e-mail


def _email_sample(rng: random.Random) -> Params:
    sender, receiver = rng.sample(NAMES, 2)
    return {
        "sender": sender,
        "receiver": receiver,
        "topic": rng.choice(TOPICS),
        "day": rng.choice(DAYS),
        "time": f"{rng.randint(8, 18):02}:{rng.choice((0, 15, 30, 45)):02}",
        "city": rng.choice(CITIES),
        "kind": rng.choice(("invite", "cancel", "remind")),
        "tone": rng.choice(("formal", "casual")),
    }


def _email_phrase(params: Params, rng: random.Random) -> str:
    p = params
    task = {"invite": "invites", "cancel": "cancels on", "remind": "reminds"}[p["kind"]]
    return rng.choice(
        (
            f"Write a {p['tone']} e-mail in which {p['sender']} {task} {p['receiver']}: {p['topic']} meeting "
            f"in {p['city']}, {p['day']} at {p['time']}.",
            f"Draft a {p['tone']} e-mail. {p['sender']} {task} {p['receiver']} for the {p['topic']} meeting "
            f"on {p['day']} at {p['time']} in {p['city']}.",
        )
    )


def _email_answer(params: Params) -> str:
    p = params
    formal = p["tone"] == "formal"
    when = f"on {p['day']} at {p['time']}"
    if p["kind"] == "invite":
        subject = f"Invitation: {p['topic']} meeting"
        body = (
            f"I would like to invite you to the {p['topic']} meeting {when}. We will meet in {p['city']}. "
            "Please let me know if you can attend."
            if formal
            else f"can you make it to the {p['topic']} meeting {when}? We are in {p['city']}. See you there!"
        )
    elif p["kind"] == "cancel":
        subject = f"Cancelled: {p['topic']} meeting"
        body = (
            f"I am sorry to tell you that the {p['topic']} meeting {when} in {p['city']} is cancelled. "
            "I will send you a new date soon."
            if formal
            else f"bad news, the {p['topic']} meeting {when} in {p['city']} is off. I will call you later."
        )
    else:
        subject = f"Reminder: {p['topic']} meeting"
        body = (
            f"This is a reminder of the {p['topic']} meeting {when} in {p['city']}. Please bring your notes."
            if formal
            else f"do not forget the {p['topic']} meeting {when}. It is in {p['city']}. Bring your notes!"
        )
    greeting, closing = ("Dear", "Kind regards") if formal else ("Hi", "Cheers")
    return f"Subject: {subject}\n\n{greeting} {p['receiver']},\n\n{body}\n\n{closing},\n{p['sender']}"


def _email_check(params: Params, answer: str) -> bool:
    return _same_words(_email_answer(params), answer)


# ---------------------------------------------------------------- spell


def _spell_sample(rng: random.Random) -> Params:
    return {"words": rng.sample(ITEMS, rng.choice((2, 3, 4)))}


def _spell_phrase(params: Params, rng: random.Random) -> str:
    words = ", ".join(params["words"])
    return rng.choice(
        (f"Spell these words: {words}", f"Spell and count the letters: {words}", f"Spell {words}.")
    )


def _spell_answer(params: Params) -> str:
    return "\n".join(f"- {w}: {'-'.join(w.upper())}, {len(w)} letters" for w in params["words"])


def _spell_check(params: Params, answer: str) -> bool:
    found = []
    for line in answer.strip().split("\n"):
        match = re.fullmatch(r"- (\w+): ([A-Z](?:-[A-Z])*), (\d+) letters", line.strip())
        if match is None:
            return False
        letters = match[2].split("-")
        if "".join(letters).lower() != match[1] or int(match[3]) != len(letters):
            return False
        found.append(match[1])
    return found == params["words"]


# ---------------------------------------------------------------- small talk: canned, not evaluated

_TALK = {
    "Hello": "Hello! I am Triad, a small language model. I can write JSON, SQL, YAML, tables, lists, sums, "
    "dates, stories and e-mails.",
    "Who are you?": "I am Triad, a very small language model. I decode one token at a time, by block "
    "diffusion, or by self-speculation.",
    "What can you do?": "I can write JSON, SQL, YAML, tables, lists, sums, dates, stories and e-mails.",
    "Thank you": "You are welcome!",
    "Count to ten": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10",
}
_TALK_WORDINGS = {
    "Hello": ("Hello", "Hello!", "Hi", "Hi!", "Hey", "Good morning", "Hello, how are you?"),
    "Who are you?": ("Who are you?", "What are you?", "What is your name?", "Are you a language model?"),
    "What can you do?": ("What can you do?", "Help", "How can you help me?", "What can I ask you?"),
    "Thank you": ("Thank you", "Thanks", "Thanks!", "Thank you very much"),
    "Count to ten": ("Count to ten", "Count from 1 to 10", "Count to 10."),
}


def _talk_sample(rng: random.Random) -> Params:
    return {"about": rng.choice(sorted(_TALK))}


def _talk_phrase(params: Params, rng: random.Random) -> str:
    return rng.choice(_TALK_WORDINGS[params["about"]])


def _talk_answer(params: Params) -> str:
    return _TALK[params["about"]]


def _talk_check(params: Params, answer: str) -> bool:
    return _same_words(_talk_answer(params), answer)


FAMILIES = (
    Family("story", _story_sample, _story_phrase, _story_answer, _story_check),
    Family("email", _email_sample, _email_phrase, _email_answer, _email_check),
    Family("spell", _spell_sample, _spell_phrase, _spell_answer, _spell_check),
)
SMALL_TALK = Family("talk", _talk_sample, _talk_phrase, _talk_answer, _talk_check)
