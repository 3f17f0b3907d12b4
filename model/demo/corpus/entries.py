"""The corpus files: entries of questions with one answer, and lists of words for slots.

An entry is a paragraph; each line says by its first character what it is:

    = a page            what the entry defines ("= a <> b": what it compares)
    * are               the topic is plural
    > A page is ...     the answer
    ~ Because ...       what "why?" gets afterwards
    ? How big is it?    a question to train on
    ! How many ...?     a question kept for evaluation
    % Is a page ...?    the same, as a visitor would put it; no line to train on is written with it in mind
    # ...               a remark

A question may hold alternatives, "(How big|How large) is a page?"; one of each is taken whenever it is drawn.
Knows the format alone, not how questions are varied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

DIRECTORY = Path(__file__).parent
ALTERNATIVES = re.compile(r"\(([^()]*\|[^()]*)\)")
FACT_FILES = ("project", "engine", "operation", "api", "experts", "language_models")


@dataclass(slots=True)
class Entry:
    """Filled by parse(), read by everybody else."""

    topic: str = ""
    verb: str = "is"
    answer: str = ""
    why: str = ""
    questions: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    visitors: list[str] = field(default_factory=list)

    def question(self, rng: Random) -> str:
        """One of the questions to train on; one that can be asked in many ways is drawn more often."""
        weights = [(1 + question.count("|")) ** 0.5 for question in self.questions]
        return expand(rng, rng.choices(self.questions, weights)[0])

    @property
    def pair(self) -> tuple[str, str]:
        """The two things that the entry compares."""
        first, second = self.topic.split(" <> ")
        return first, second

    @property
    def opens_with_topic(self) -> bool:
        return bool(self.topic) and self.answer.lower().startswith(f"{self.topic} ".lower())


def expand(rng: Random, text: str) -> str:
    """The text with one of each of its alternatives."""
    while found := ALTERNATIVES.search(text):
        text = text[: found.start()] + rng.choice(found[1].split("|")) + text[found.end() :]
    return without_gaps(text)


def expansions(text: str) -> Iterator[str]:
    """The text with every choice of its alternatives."""
    found = ALTERNATIVES.search(text)
    if found is None:
        yield without_gaps(text)
        return
    for choice in found[1].split("|"):
        yield from expansions(text[: found.start()] + choice + text[found.end() :])


def without_gaps(text: str) -> str:
    """The text without the spaces that an empty alternative leaves behind."""
    return re.sub(r" +(?=[ ?.!]|$)", "", text).lstrip()


def parse(text: str) -> list[Entry]:
    entries = []
    for paragraph in text.strip().split("\n\n"):
        entry = Entry()
        for line in paragraph.splitlines():
            mark, content = line[0], line[1:].strip()
            match mark:
                case "=":
                    entry.topic = content
                case "*":
                    entry.verb = content
                case ">":
                    entry.answer = content
                case "~":
                    entry.why = content
                case "?":
                    entry.questions.append(content)
                case "!":
                    entry.held_out.append(content)
                case "%":
                    entry.visitors.append(content)
                case "#":
                    pass
                case _:
                    raise ValueError(f"no line of a corpus file starts with {mark!r}: {line!r}")
        if entry.answer:
            entries.append(entry)
    return entries


def load(name: str) -> list[Entry]:
    return parse((DIRECTORY / f"{name}.txt").read_text(encoding="utf-8"))


def load_facts() -> list[list[Entry]]:
    """The facts, one list per file: within a file they follow each other when somebody asks for more."""
    return [load(f"facts/{name}") for name in FACT_FILES]


def load_slots() -> dict[str, list[str]]:
    """Words by slot, for example `country`."""
    slots = {}
    for line in (DIRECTORY / "slots.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            slot, words = line.split(": ")
            slots[slot] = words.split(", ")
    return slots


def part(words: list[str], held_out: bool) -> list[str]:
    """The words of a list that training sees, or the last quarter, which it never sees."""
    cut = len(words) - len(words) // 4
    return words[cut:] if held_out else words[:cut]
