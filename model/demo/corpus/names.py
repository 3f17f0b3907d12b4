"""Names, known and made up. What was made up for one conversation can only be copied from it."""

from __future__ import annotations

from random import Random

from model.demo.corpus.phrasing import surface, words
from model.demo.corpus.turns import Turn

KNOWN = words(
    "Anna Ben Clara David Emma Felix Grace Hugo Ida Jonas Kim Leo Mia Noah Olga Paul Rosa Sam Tom Uma Vera Will Zoe",
    "Alice Bob Carol Dan Eve Frank Maria Peter Lena Max Nina Omar Priya Ravi Sara Yuki Chen Ali Fatima Ivan Jose",
)
ONSETS = words("b br c d dr f fl g gr h j k kr l m n p pl qu r s st t tr v w z")
VOWELS = words("a e i o u ai ee oo")
ENDS = ["", "", "", "n", "r", "l", "s", "x", "m", "nd", "rk", "t"]

GREETINGS = (
    "My name is {n}.",
    "I am {n}.",
    "I'm {n}.",
    "Call me {n}.",
    "Hello, I am {n}.",
    "Hi, my name is {n}!",
    "You can call me {n}.",
)
HELD_OUT_GREETINGS = ("Hello, my name is {n}.", "Please call me {n}.")
RECALL = ("What is my name?", "Do you know my name?", "Who am I?", "Tell me my name.", "What's my name?")
REPEAT = ("Repeat after me: {n}", "Say: {n}", "Repeat: {n}", "Please repeat: {n}", "Say after me: {n}")
HELD_OUT_REPEAT = ("Please say after me: {n}",)


def made_up(rng: Random) -> str:
    """A word that is no word, such as "Brovix"."""
    syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((1, 2, 2, 3)))]
    return "".join(syllables) + rng.choice(ENDS)


def person(rng: Random) -> str:
    return rng.choice(KNOWN) if rng.random() < 0.3 else made_up(rng).capitalize()


def greeting(rng: Random, held_out: bool) -> Turn:
    name = person(rng)
    question = rng.choice(HELD_OUT_GREETINGS if held_out else GREETINGS).format(n=name)
    recall = tuple((recall, f"Your name is {name}.") for recall in RECALL)
    return Turn("name", question, f"Hello, {name}! What would you like to know?", about=recall)


def stranger(rng: Random) -> Turn:
    return Turn("name", surface(rng, rng.choice(RECALL)), "I don't know your name. You have not told me.")


def turn(rng: Random, held_out: bool) -> Turn:
    return stranger(rng) if not held_out and rng.random() < 0.15 else greeting(rng, held_out)


def repeat(rng: Random, vocabulary: list[str], held_out: bool) -> Turn:
    """Words without any sense, some of them made up: the answer can only be copied."""
    said = " ".join(made_up(rng) if rng.random() < 0.5 else rng.choice(vocabulary) for _ in range(rng.randint(1, 12)))
    return Turn("repeat", rng.choice(HELD_OUT_REPEAT if held_out else REPEAT).format(n=said), said)
