"""What the demo model must say it does not know. The thing asked about is copied into the answer."""

from __future__ import annotations

import re
from random import Random

from model.demo.corpus.entries import Entry, part
from model.demo.corpus.names import made_up, person
from model.demo.corpus.phrasing import definition, surface, vary
from model.demo.corpus.turns import Turn

WHY = "Because I am small and was trained on little text."
FEATURES = (
    "Does mixtral-serve support {f}?",
    "Does it support {f}?",
    "Can I use mixtral-serve with {f}?",
    "Is {f} supported?",
    "Does this server work with {f}?",
    "Does mixtral-serve have {f}?",
    "Can it do {f}?",
    "Is there support for {f}?",
)
HELD_OUT_FEATURES = ("Will mixtral-serve work with {f}?", "Do you support {f}?")
PEOPLE = ("Who is {p}?", "Who was {p}?", "Do you know {p}?", "Tell me about {p}.", "What did {p} do?")
LIKES = ("I like {t}.", "I love {t}.", "My hobby is {t}.", "I am interested in {t}.")


def off_topic(rng: Random, entries: list[Entry], slots: dict[str, list[str]], held_out: bool) -> Turn:
    """Questions about the world, with a fixed answer for each family of questions."""
    weights = [len(entry.held_out if held_out else entry.questions) for entry in entries]
    entry = rng.choices(entries, weights)[0]
    template = rng.choice(entry.held_out if held_out else entry.questions)
    question = re.sub(r"\{(\w+)\}", lambda match: rng.choice(part(slots[match[1]], held_out)), template)
    return Turn("unknown", question if held_out else vary(rng, question), entry.answer, why=WHY)


def thing(rng: Random, slots: dict[str, list[str]], held_out: bool) -> Turn:
    kind = rng.choice(("thing", "technology", "plural", "made up"))
    topic = rng.choice(("a ", "")) + made_up(rng) if kind == "made up" else rng.choice(part(slots[kind], held_out))
    verb = "are" if kind == "plural" else "is"
    question = definition(rng, topic, verb, held_out)
    return Turn("unknown", question if held_out else surface(rng, question), f"I don't know what {topic} {verb}.", WHY)


def feature(rng: Random, slots: dict[str, list[str]], held_out: bool) -> Turn:
    name = rng.choice(part(slots["feature"], held_out)) if rng.random() < 0.7 else made_up(rng)
    question = rng.choice(HELD_OUT_FEATURES if held_out else FEATURES).format(f=name)
    answer = f"I don't know whether mixtral-serve supports {name}. Please look in its documentation."
    return Turn("unknown", question if held_out else surface(rng, question), answer, WHY)


def somebody(rng: Random, slots: dict[str, list[str]], held_out: bool) -> Turn:
    name = rng.choice(part(slots["person"], held_out))
    if rng.random() < 0.5:
        name = f"{person(rng)} {made_up(rng).capitalize()}"
    return Turn("unknown", surface(rng, rng.choice(PEOPLE).format(p=name)), f"I don't know anything about {name}.", WHY)


def liking(rng: Random, slots: dict[str, list[str]], held_out: bool) -> Turn:
    name = rng.choice(part(slots[rng.choice(("food", "sport", "skill"))], held_out))
    return Turn("unknown", rng.choice(LIKES).format(t=name), f"I know little about {name}, but I am glad you like it.")


def turn(rng: Random, entries: list[Entry], slots: dict[str, list[str]], held_out: bool) -> Turn:
    chance = rng.random()
    if chance < 0.5:
        return off_topic(rng, entries, slots, held_out)
    maker = rng.choices((thing, feature, somebody, liking), (5, 3, 2, 1))[0]
    return maker(rng, slots, held_out)
