"""Short stories from a small grammar. Whatever the prompt leaves open has one value for each hero.

A story is opening (hero, name, place), find (thing), three sentences that belong to the thing, and an end.
Nothing in it is left to chance, so that greedy answers are no ties.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from zlib import crc32

from model.demo.corpus.names import made_up, person
from model.demo.corpus.phrasing import surface, words
from model.demo.corpus.turns import Turn


@dataclass(frozen=True, slots=True)
class Hero:
    kind: str  # with its article
    name: str
    place: str
    thing: str  # a key of THINGS


HEROES = (
    Hero("a fox", "Tilo", "in a quiet forest", "lantern"),
    Hero("an owl", "Mona", "in an old tower", "book"),
    Hero("a robot", "Bolt", "in a small workshop", "key"),
    Hero("a girl", "Lina", "in a house by the sea", "boat"),
    Hero("a boy", "Emil", "in a village on a hill", "kite"),
    Hero("a cat", "Minka", "on a warm roof", "bell"),
    Hero("a dog", "Bruno", "on a farm", "map"),
    Hero("a mouse", "Pim", "under a wooden floor", "coin"),
    Hero("a bear", "Otto", "in a cave", "drum"),
    Hero("a dragon", "Fara", "on a cold mountain", "egg"),
    Hero("a king", "Aldo", "in a stone castle", "mirror"),
    Hero("a queen", "Isa", "in a white palace", "ring"),
    Hero("a sailor", "Finn", "on a small ship", "bottle"),
    Hero("a witch", "Runa", "in a hut in the swamp", "broom"),
    Hero("a knight", "Kurt", "in a camp by the road", "sword"),
    Hero("a baker", "Rosa", "in a narrow street", "seed"),
    Hero("a frog", "Quin", "in a green pond", "ball"),
    Hero("a rabbit", "Hops", "in a meadow", "clock"),
    Hero("a router", "Rita", "in the middle of a layer", "map"),
    Hero("a token", "Theo", "in a long prompt", "key"),
    Hero("an expert", "Edda", "in slot number three", "book"),
    Hero("a worker", "Walt", "on rank zero", "bell"),
    Hero("a model", "Milo", "in a small server", "lantern"),
    Hero("a wizard", "Zeno", "in a house of glass", "book"),
    Hero("a penguin", "Pia", "on the ice", "kite"),
    Hero("an elephant", "Ella", "by a wide river", "drum"),
    Hero("a horse", "Blitz", "in a red barn", "bell"),
    Hero("a princess", "Mara", "in a high tower", "mirror"),
    Hero("a pirate", "Jack", "on an island", "bottle"),
    Hero("a child", "Toni", "in a loud city", "ball"),
)
# Heroes that the list does not know get these.
STRANGER = Hero("", "Pip", "at the edge of a wood", "lantern")

# thing -> when it was found, and what came of it
THINGS = {
    "lantern": (
        "One dark night",
        "{n} lit it and hung it by the road. Lost travellers saw the light and came in one by one. "
        "From then on nobody was lost there any more.",
    ),
    "book": (
        "One rainy day",
        "All its pages were empty. So {n} wrote down one kind word every evening. "
        "When the book was full, the whole neighbourhood came to read it.",
    ),
    "key": (
        "One morning",
        "It fitted no door, and {n} tried them all. At last a friend said that it opened a box of songs. "
        "They opened it together and sang until evening.",
    ),
    "boat": (
        "One summer day",
        "It had a hole, and {n} mended it with patience. Then they sailed around the bay. "
        "{n} learnt that slow work carries you far.",
    ),
    "kite": (
        "One windy day",
        "It flew so high that {n} could hardly hold it. A friend came and held the string too. "
        "Together they were stronger than the wind.",
    ),
    "bell": (
        "One evening",
        "{n} rang it, and everybody came running. There was no danger, only soup for all. "
        "Since then the bell rings every Sunday.",
    ),
    "map": (
        "One spring day",
        "It showed a path that nobody knew. {n} followed it step by step and asked the way twice. "
        "At the end of the path was home, and it had never looked so fine.",
    ),
    "coin": (
        "One cold day",
        "{n} wanted to keep it. Then a beggar came by, and {n} gave it away. "
        "The beggar smiled, and that was worth more than gold.",
    ),
    "drum": (
        "One quiet afternoon",
        "{n} played it far too loud. The neighbours asked for a softer song. {n} practised, and soon they all danced.",
    ),
    "egg": (
        "One winter day",
        "{n} kept it warm for three weeks. Then it broke, and out came a tiny bird. "
        "The bird learnt to fly and came back every spring.",
    ),
    "mirror": (
        "One bright day",
        "It showed not faces but wishes. {n} looked and saw a table with many friends. "
        "So {n} invited them all, and the wish came true.",
    ),
    "ring": (
        "One autumn day",
        "Whoever wore it could hear what others needed. {n} listened and helped where help was needed. "
        "Soon the ring was not needed any more.",
    ),
    "bottle": (
        "One stormy day",
        "There was a letter in it from someone far away. {n} wrote an answer and sent it over the sea. "
        "A year later the two met and became friends.",
    ),
    "broom": (
        "One foggy morning",
        "It would not fly. {n} swept the path with it instead. The path was so clean that visitors came at last.",
    ),
    "sword": (
        "One hot day",
        "It was old and blunt. {n} used it to cut bread for the hungry. People said that no sword had ever done more.",
    ),
    "seed": (
        "One April morning",
        "{n} planted it and waited. For a long time nothing happened. "
        "Then a tree grew, and its apples were enough for the whole street.",
    ),
    "ball": (
        "One sunny day",
        "{n} had nobody to play with. Then the ball rolled to a shy stranger, who threw it back. "
        "They played until the stars came out.",
    ),
    "clock": (
        "One early morning",
        "It had stopped, and {n} was always late. A friend showed how to wind it. "
        "Since then {n} has had time for everybody.",
    ),
}
PLACES = (
    "in a desert", "in a big city", "on a boat", "in a garden", "in a library", "under a bridge", "on the moon",
    "in a deep valley", "in a data center", "near a lake", "in a school", "in a station",
)  # fmt: skip

ASK = (
    "Tell me a story about {h}.",
    "Tell me a short story about {h}.",
    "Write a story about {h}.",
    "Can you tell me a story about {h}?",
    "A story about {h}, please.",
    "Please tell a story about {h}.",
    "Story about {h}",
    "I want to hear a story about {h}.",
    "Make up a story about {h}.",
    "Write a short story about {h}.",
    "Invent a story about {h}.",
    "Give me a story about {h}.",
)
HELD_OUT_ASK = ("I would like a story about {h}.", "Could you tell us a story about {h}?")
ASK_ANY = (
    "Tell me a story.",
    "Can you tell me a story?",
    "A story, please.",
    "Write a short story.",
    "Tell a story.",
    "I want to hear a story.",
    "Tell me a short story.",
    "Story",
    "Do you know a story?",
    "Please tell me something nice.",
    "Tell me a bedtime story.",
)
UNKNOWN_KINDS = words(
    "farmer singer doctor teacher painter tailor gardener cook nurse pilot driver hunter miner student spider snail",
    "goose duck hen pig cow sheep goat wolf lion tiger monkey snake turtle whale crab bee ant butterfly ghost giant",
    "dwarf elf fairy troll star cloud tree stone river computer car train house teapot shoe",
)


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def bare(kind: str) -> str:
    """The kind without its article."""
    return kind.split(" ", 1)[1]


def tell(hero: Hero) -> str:
    when, events = THINGS[hero.thing]
    opening = f"Once upon a time there was {hero.kind} named {hero.name}, who lived {hero.place}."
    find = f"{when} {hero.name} found {with_article(hero.thing)}."
    return f"{opening} {find} {events.format(n=hero.name)} The end."


def about(hero: Hero) -> tuple[tuple[str, str], ...]:
    kind, name = bare(hero.kind), hero.name
    return (
        (f"What was the name of the {kind}?", f"The {kind} was named {name}."),
        (f"What is the {kind} called?", f"The {kind} was named {name}."),
        (f"What did {name} find?", f"{name} found {with_article(hero.thing)}."),
        (f"What did the {kind} find?", f"{name} found {with_article(hero.thing)}."),
        (f"Where did {name} live?", f"{name} lived {hero.place}."),
        (f"Where did the {kind} live?", f"{name} lived {hero.place}."),
    )


def as_turn(question: str, hero: Hero, next_hero: Hero) -> Turn:
    return Turn("story", question, tell(hero), more=tell(next_hero), about=about(hero))


def choose(rng: Random) -> tuple[Hero, str, Hero]:
    """A hero with some of its values replaced, the words that say so, and whose story comes next."""
    index = rng.randrange(len(HEROES))
    hero, next_hero = HEROES[index], HEROES[(index + 1) % len(HEROES)]
    if rng.random() < 0.25:
        noun = rng.choice(UNKNOWN_KINDS) if rng.random() < 0.6 else made_up(rng)
        hero, next_hero = Hero(with_article(noun), STRANGER.name, STRANGER.place, STRANGER.thing), HEROES[0]
    name, thing, place = hero.name, hero.thing, hero.place
    said = hero.kind
    if rng.random() < 0.45:
        name = person(rng)
        said += rng.choice((" named ", " called ")) + name
    if rng.random() < 0.2:
        place = rng.choice(PLACES)
        said += " " + place
    if rng.random() < 0.45:
        thing = rng.choice(sorted(THINGS))
        said += rng.choice((" who finds ", " and ", " that found ")) + with_article(thing)
    return Hero(hero.kind, name, place, thing), said, next_hero


def turn(rng: Random, held_out: bool) -> Turn:
    """A story; the held-out ones join a hero with a thing that training never tells together."""
    if not held_out and rng.random() < 0.15:
        return as_turn(surface(rng, rng.choice(ASK_ANY)), HEROES[0], HEROES[1])
    while True:
        hero, said, next_hero = choose(rng)
        default = any(hero.kind == known.kind and hero.thing == known.thing for known in (*HEROES, STRANGER))
        if (not default and crc32(f"{hero.kind} {hero.thing}".encode()) % 10 == 0) == held_out:
            break
    question = rng.choice(HELD_OUT_ASK if held_out else ASK).format(h=said)
    return as_turn(question if held_out else surface(rng, question), hero, next_hero)
