"""Conversations put together from all parts of the corpus, without end and determined by the random generator.

`Corpus.conversation` gives what training sees, `Corpus.held_out_turn` what evaluation asks and training never saw.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from model.demo.corpus import names, stories, sums, unknown
from model.demo.corpus.entries import Entry, load, load_facts, load_slots
from model.demo.corpus.phrasing import blur, casual, comparison, definition, mistype, surface, vary
from model.demo.corpus.turns import Kind, Turn

# How often each kind of turn is drawn.
WEIGHTS: dict[Kind, int] = {
    "fact": 44, "comparison": 5, "chat": 12, "unknown": 16, "sum": 24, "story": 6, "name": 4, "repeat": 3,
}  # fmt: skip
# A training run begins with these alone. Copying from the prompt and calculating are learnt in a few hundred steps
# by themselves, and hardly at all beside facts that can simply be memorised.
SKILLS: dict[Kind, int] = {"sum": 1, "repeat": 1}
# What a follow-up asks, when the last turn has an answer to it.
WHY = ("Why?", "And why?", "Why is that?", "But why?", "why", "How come?", "Why so?", "Can you say why?")
MORE = ("Tell me more.", "More, please.", "Go on.", "And what else?", "What else?", "more", "Continue.")
NEXT_STORY = ("Another one!", "Another story, please.", "Tell me another one.", "One more.", "another", "Go on.")
AGAIN = ("Can you repeat that?", "Say that again.", "Again, please.", "Pardon?", "What did you say?", "Repeat.")
SURE = ("Are you sure?", "Really?", "Is that true?", "Is that right?", "Are you certain?")
SURE_ANSWER = "I think so, but I am a small model and can be wrong."
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Answer in one sentence.",
    "Be concise.",
    "You are a friendly chatbot.",
    "You are an expert on machine learning.",
    "You are the assistant of a company.",
    "Be polite and helpful.",
    "You are a knowledgeable guide to mixtral-serve.",
    "Answer the question of the user.",
    "You are Mixtral, a language model.",
    "Think step by step.",
    "Please answer in English.",
    "You are a storyteller.",
    "You help people with computers.",
    "You are a teacher. Explain simply.",
    "Do not make things up.",
    "If you do not know, say so.",
)
HELD_OUT_SYSTEMS = ("You are a careful assistant who answers in English.", "Be brief and friendly.")


def seeded(purpose: str, seed: int) -> Random:
    """A generator of its own for each purpose: drawing more for one changes nothing for another."""
    return Random(f"{purpose} {seed}")  # noqa: S311 - text to train on, no secrets


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order; system goes before the first question. A completion is one turn without chat template."""

    turns: tuple[Turn, ...]
    system: str = ""


class Corpus:
    """All parts of the corpus, read once. Weights say how often each kind of turn comes."""

    def __init__(self, weights: dict[Kind, int] = WEIGHTS) -> None:
        self.weights = weights
        self.facts = load_facts()
        self.comparisons = load("comparisons")
        self.chat = load("chat")
        self.off_topic = load("offtopic")
        self.visitors = [
            (question, entry.answer)
            for entry in [*(entry for file in self.facts for entry in file), *self.chat]
            for question in entry.visitors
        ]
        self.slots = load_slots()
        self.vocabulary = sorted({word for file in self.facts for entry in file for word in entry.answer.split()})

    def conversation(self, rng: Random, turns: int | None = None) -> Conversation:
        """What training sees: mostly one turn, sometimes up to four, or as many as wanted."""
        if turns is None and "fact" in self.weights and rng.random() < 0.05:
            return Conversation((self.completion(rng),))
        wanted = turns or rng.choice((1, 1, 1, 1, 1, 2, 2, 3, 4))
        chosen = [self.turn(rng)]
        told = dict(chosen[0].about) if chosen[0].kind == "name" else {}
        while len(chosen) < wanted:
            last = chosen[-1]
            if told and rng.random() < 0.15:
                question = rng.choice(list(told))
                chosen.append(Turn("follow-up", question, told[question]))
            elif last.kind != "follow-up" and rng.random() < 0.5:
                chosen.append(follow_up(rng, last))
            else:
                # A name is told once, at the beginning, so that it is clear which one counts.
                chosen.append(self.turn(rng, without="name"))
        system = rng.choice(SYSTEMS) if rng.random() < 0.15 else ""
        return Conversation(tuple(chosen), system)

    def turn(self, rng: Random, without: Kind | None = None) -> Turn:
        kinds = [kind for kind in self.weights if kind != without]
        kind = rng.choices(kinds, [self.weights[kind] for kind in kinds])[0]
        return self.turn_of(rng, kind, held_out=False)

    def held_out_turn(self, rng: Random, kind: Kind) -> Turn:
        """A question that training never saw: another template, other words, or another pair of numbers."""
        return self.turn_of(rng, kind, held_out=True)

    def turn_of(self, rng: Random, kind: Kind, held_out: bool) -> Turn:
        match kind:
            case "fact":
                return self.fact(rng, held_out)
            case "comparison":
                entry = rng.choice(self.comparisons)
                question = comparison(rng, entry.pair, held_out)
                return Turn("comparison", question if held_out else surface(rng, question), entry.answer)
            case "chat":
                entry = rng.choice(self.chat)
                question = rng.choice(entry.held_out) if held_out else casual(rng, entry.question(rng))
                return Turn("chat", question, entry.answer)
            case "unknown":
                return unknown.turn(rng, self.off_topic, self.slots, held_out)
            case "sum":
                return sums.turn(rng, held_out)
            case "story":
                return stories.turn(rng, held_out)
            case "name":
                return names.turn(rng, held_out)
            case "repeat":
                return names.repeat(rng, self.vocabulary, held_out)
            case "visitor":
                return Turn("visitor", *rng.choice(self.visitors))
            case "completion" | "follow-up":
                raise ValueError(f"{kind} is no kind of turn that can be drawn by itself")

    def fact(self, rng: Random, held_out: bool) -> Turn:
        file = rng.choices(self.facts, [len(entries) for entries in self.facts])[0]
        index = rng.randrange(len(file))
        entry, more = file[index], file[(index + 1) % len(file)].answer
        return Turn("fact", self.ask(rng, entry, held_out), entry.answer, entry.why or "I don't know why.", more)

    def ask(self, rng: Random, entry: Entry, held_out: bool) -> str:
        if entry.topic and rng.random() < 0.4:
            question = definition(rng, entry.topic, entry.verb, held_out)
        elif held_out:
            question = rng.choice(entry.held_out)
        else:
            question = entry.question(rng)
            if rng.random() < 0.3:
                question = blur(rng, question, names.made_up(rng))
        return question if held_out else mistype(rng, vary(rng, question))

    def completion(self, rng: Random) -> Turn:
        """A beginning without chat template, and how it goes on."""
        match rng.choices(("tale", "story", "sum", "fact"), (1, 3, 2, 4))[0]:
            case "tale":
                whole, beginning = stories.tell(stories.HEROES[0]), "Once upon a time"
            case "story":
                hero = rng.choice(stories.HEROES)
                whole, beginning = stories.tell(hero), f"Once upon a time there was {hero.kind}"
            case "sum":
                whole = sums.calculation(rng, held_out=False).answer
                beginning = whole[: whole.index("=") + 1]
            case _:
                entry = rng.choice([entry for file in self.facts for entry in file if entry.opens_with_topic])
                whole, beginning = entry.answer, entry.answer[: len(entry.topic)]
        return Turn("completion", beginning, whole.removeprefix(beginning).lstrip())


def follow_up(rng: Random, last: Turn) -> Turn:
    """A question that only makes sense after the last turn."""
    choices = [(rng.choice(AGAIN), last.answer), (rng.choice(SURE), SURE_ANSWER)]
    if last.why:
        choices += [(rng.choice(WHY), last.why)] * 2
    if last.more:
        choices += [(rng.choice(NEXT_STORY if last.kind == "story" else MORE), last.more)] * 2
    if last.about:
        choices += [rng.choice(last.about)] * 4
    question, answer = rng.choice(choices)
    return Turn("follow-up", surface(rng, question), answer)
