"""Many ways to ask one question. Knows English patterns, not what any question is about.

Training sees questions varied by `vary`, `blur` and `mistype`; evaluation sees held-out questions as they were written.
"""

from __future__ import annotations

import re
from random import Random

from model.demo.corpus.entries import expand

# {x} is a topic as written ("a page"), {be} its verb. The second tuple is kept for evaluation.
DEFINITIONS = (
    "What {be} {x}?",
    "What {be} {x}?",
    "What's {x}?",
    "Explain {x}.",
    "Explain {x} to me.",
    "Please explain {x}.",
    "Can you explain {x}?",
    "Could you explain {x} to me?",
    "Tell me about {x}.",
    "Tell me what {x} {be}.",
    "Tell me something about {x}.",
    "Can you tell me about {x}?",
    "Can you tell me what {x} {be}?",
    "Do you know what {x} {be}?",
    "I would like to know what {x} {be}.",
    "I want to know more about {x}.",
    "Describe {x}.",
    "Define {x}.",
    "Help me understand {x}.",
    "What do you know about {x}?",
    "What exactly {be} {x}?",
    "What {be} {x} here?",
    "What {be} {x} in mixtral-serve?",
    "What does {x} mean?",
    "And what {be} {x}?",
    "In one sentence, what {be} {x}?",
    "What do you mean by {x}?",
    "I do not understand {x}.",
    "I have never heard of {x}. What {be} that?",
    "How would you explain {x} to a beginner?",
    "What can you tell me about {x}?",
    "Give me a (short |)definition of {x}.",
    "(Hello, |Sorry, |Well, |)(could|can|would) you (please |)(explain|describe|define) {x}( briefly| to me|)?",
    "(Please |)(explain|describe|define|sketch) {x}( for a beginner| in simple words| in short| briefly| once more|).",
    "(Can|Could) (somebody|you|anyone) (please |)tell me what {x} {be}?",
    "(I wonder|I am not sure|I forgot|I'd like to hear|Remind me|Teach me) what {x} {be}.",
    "(What's the story with|What about|How about|What's up with) {x}?",
    "(I read|I see|They talk|You speak|The docs speak) about {x}. What {be} (it|that|this|meant)?",
    "(I need|I want|I'd like) (an explanation of|to learn about|to understand|to hear about|some words about) {x}.",
    "(Anything|Something) about {x}(, please|?|.)",
    "{x}: what {be} (it|that|this)?",
    "{x} (meaning|definition|explained|in simple words)",
    "{x}?",
    "{x}",
)
HELD_OUT_DEFINITIONS = (
    "Let me know what {x} {be}.",
    "Could you say in a few words what {x} {be}?",
    "So what {be} {x}, really?",
    "How would you describe {x}?",
)

COMPARISONS = (
    "What is the difference between {x} and {y}?",
    "What's the difference between {x} and {y}?",
    "What is the difference between {x} and {y}?",
    "How does {x} differ from {y}?",
    "How is {x} different from {y}?",
    "Compare {x} and {y}.",
    "Compare {x} with {y}.",
    "{x} or {y}?",
    "{x} vs {y}",
    "{x} versus {y}?",
    "Is {x} the same as {y}?",
    "Are {x} and {y} the same?",
    "Explain the difference between {x} and {y}.",
    "Tell me the difference between {x} and {y}.",
    "How do {x} and {y} differ?",
    "I confuse {x} and {y}.",
    "Difference between {x} and {y}",
)
HELD_OUT_COMPARISONS = (
    "In what way is {x} not the same as {y}?",
    "Can you tell me how {x} and {y} differ?",
    "What distinguishes {x} from {y}?",
)

SYNONYMS = (
    (
        r"^Explain ",
        ("Describe ", "Tell me about ", "Please explain ", "Can you explain ", "Teach me about ", "Sketch "),
    ),
    (r"^How do I ", ("How can I ", "How would I ", "How should I ", "How to ", "What must I do to ")),
    (r"^How do I ", ("How do we ", "How does one ", "In what way can I ", "Is there a way to ", "Show me how to ")),
    (r"^How (?=is|are|does|do|did|was)", ("In what way ", "How exactly ", "Tell me: how ", "But how ")),
    (r"^How can I ", ("How do I ", "How could I ", "How to ")),
    (r"^What happens when ", ("What happens if ", "What if ", "What does it do when ")),
    (r"^What happens if ", ("What happens when ", "What if ")),
    (r"^What if ", ("What happens if ", "And if ")),
    (r"^Can I ", ("Could I ", "May I ", "Is it possible that I ", "Am I able to ")),
    (r"^Can ", ("Could ",)),
    (r"^Can it ", ("Could it ", "Is it able to ", "Can mixtral-serve ", "Can this ")),
    (r"^Does it ", ("Does mixtral-serve ", "Does this ", "Will it ")),
    (r"^Which ", ("What ",)),
    (r"^What is ", ("What's ", "Explain: what is ")),
    (r"^What are ", ("What're ", "Explain: what are ")),
    (r"^Is there ", ("Do you have ", "Does it have ")),
    (r"^Why ", ("For what reason ", "Why exactly ", "Tell me why ")),
    (r"^How many ", ("What number of ", "Tell me how many ")),
    (r"^Where ", ("Where exactly ", "Tell me where ")),
    (r"^Who ", ("Tell me who ",)),
    (r"^When ", ("Tell me when ", "When exactly ")),
    (r"\bmixtral-serve\b", ("this server", "this project", "the server", "your server", "mixtral serve")),
    (r"\bworks?\b(?=\?)", ("really work", "work in general", "work here")),
    (r"\bby default\b", ("if I change nothing", "normally")),
    (r"\ba mixture of experts\b", ("mixture of experts", "the mixture of experts", "an MoE")),
    (r"\bmixture of experts\b", ("mixture-of-experts", "MoE")),
    (r"\bAPI\b", ("interface",)),
    (r"\b(dies|crashes|fails)\b", ("dies", "crashes", "fails", "goes down", "is lost")),
    (r"\b(turn off|disable)\b", ("turn off", "disable", "switch off")),
    (r"\bset\b", ("choose", "configure", "change")),
    (r"\b(see|find)\b", ("see", "find", "look at", "view")),
    (r"\bsettings?\b", ("setting", "option", "settings")),
    (r"\bGPUs\b", ("graphics cards", "cards", "GPUs")),
    (r"\bGPU\b", ("graphics card", "GPU")),
    (r"\b(machine|computer)\b", ("machine", "computer", "box")),
    (r"\b(folder|directory)\b", ("folder", "directory")),
    (r"\b(laptop|notebook)\b", ("laptop", "notebook", "MacBook")),
    (r"\b(kind|sort|type)s? of\b", ("kind of", "sort of", "type of")),
    (r"\b(needed|required|necessary)\b", ("needed", "required", "necessary")),
    (r"\b(the|my|an) answer\b", (r"\1 answer", r"\1 output", "the reply", "the response")),
    (r"\b(my|a|the) request\b", (r"\1 request", r"\1 call", r"\1 query")),
    (r"\b(users|clients|people)\b", ("users", "clients", "people")),
    (r"\b(fast|quick)\b", ("fast", "quick")),
    (r"\b(stop|end|quit)\b", ("stop", "end", "shut down", "turn off", "halt")),
    (r"\b(monitor|observe)\b", ("monitor", "observe", "watch", "keep an eye on")),
    (r"\b(chosen|selected|picked)\b", ("chosen", "selected", "picked", "decided", "determined")),
    (r"\b(choose|select|pick)\b", ("choose", "select", "pick", "decide")),
    (r"\b(kinds|types|sorts)\b", ("kinds", "types", "sorts", "families", "forms")),
    (r"\b(limit|maximum)\b", ("limit", "maximum", "upper limit", "bound")),
    (r"\b(lost|dropped|gone)\b", ("lost", "dropped", "gone", "thrown away")),
    (r"\b(dead|killed|lost|shot)\b", ("dead", "killed", "gone", "terminated", "no more there")),
    (r"\b(move|relocate)\b", ("move", "relocate", "transfer", "bring")),
    (r"\b(split|cut|divided|sliced)\b", ("split", "cut", "divided", "sliced", "spread")),
    (r"\b(obtain|receive|get)\b", ("get", "obtain", "receive", "have")),
    (r"\b(exist|are there)\b(?=\?)", ("exist", "are there", "do you have", "can I have")),
    (r"\b(wrong|invalid|bad)\b", ("wrong", "invalid", "bad")),
    (r"\b(at once|in parallel|at the same time)\b", ("at once", "in parallel", "concurrently", "simultaneously")),
    (r"\b(show|list) me\b", ("show me", "give me", "tell me")),
    (r"\bsupported\b", ("available", "possible", "allowed")),
    (r"\bsupport\b", ("have", "offer", "know")),
    (r"\bstart\b", ("launch", "run", "bring up")),
    (r"\b(large|big)\b", ("large", "big")),
    (r"\bthere\b(?=\?)", ("there here", "available", "there in all")),
    (r"\bmean\b(?=\?)", ("mean here", "stand for", "mean exactly")),
    (r"\bmean here\b", ("mean", "mean in this project")),
    (r"\bparallelism\b", ("parallel",)),
)
PREFIXES = (
    "Please: ",
    "Hi! ",
    "Hello, ",
    "Quick question: ",
    "Tell me, ",
    "I am new here. ",
    "One more question. ",
    "I was wondering, ",
    "Now ",
    "And ",
    "Ok, ",
    "So, ",
    "Question: ",
    "Hey, ",
    "Good morning. ",
    "I have a question. ",
)
SUFFIXES = (
    " Please.",
    " Please answer briefly.",
    " Thanks!",
    " Thank you.",
    " I am curious.",
    " Be brief.",
    " In one sentence, please.",
    " Explain.",
    " Tell me.",
)


def words(*lists: str) -> list[str]:
    """Words written in a row: a list that reads like text."""
    return " ".join(lists).split()


def lower_first(text: str) -> str:
    """Lower case for the first letter, unless the first word is a name or an abbreviation."""
    first = text.split(" ", 1)[0]
    plain = first[1:].islower() or len(first) == 1
    return text[0].lower() + text[1:] if plain and first != "I" else text


def reword(rng: Random, question: str) -> str:
    for pattern, choices in SYNONYMS:
        if rng.random() < 0.35:
            question = re.sub(pattern, rng.choice(choices), question)
    return question


def wrap(rng: Random, question: str) -> str:
    if rng.random() < 0.6:
        prefix = rng.choice(PREFIXES)
        return prefix + (question if prefix[-2] in ".!:" else lower_first(question))
    return question + rng.choice(SUFFIXES) if question[-1] in "?.!" else question


def casual(rng: Random, question: str) -> str:
    """How people type: lower case, no mark at the end, sometimes no articles."""
    if rng.random() < 0.2:
        question = re.sub(r" (the|a|an) ", " ", question)
    if rng.random() < 0.7:
        question = question.lower()
    return question.rstrip("?.! ") if rng.random() < 0.6 else question


def mistype(rng: Random, question: str) -> str:
    """Sometimes a slip: no small words, or in a long plain word a letter lost, doubled or exchanged with the next."""
    chance = rng.random()
    if chance < 0.05:
        return re.sub(r"(?i)\b(the|a|an|is|are|do|does|of|to)\b ?", "", question).strip() or question
    long_words = list(re.finditer(r"(?<![\w/_.-])[a-z]{5,}(?![\w/_-]|\.\w)", question))
    if chance > 0.12 or not long_words:
        return question
    word = rng.choice(long_words)
    at = rng.randrange(word.start() + 1, word.end() - 1)
    lost = question[:at] + question[at + 1 :]
    doubled = question[: at + 1] + question[at:]
    exchanged = question[:at] + question[at + 1] + question[at] + question[at + 2 :]
    return rng.choice((lost, doubled, exchanged))


def blur(rng: Random, question: str, strange: str) -> str:
    """As somebody with other words asks it: some words missing, a strange one, two exchanged. What is left decides."""
    said = [word for word in question.split() if rng.random() < 0.88]
    if len(said) < 4:
        return question
    if rng.random() < 0.5:
        said.insert(rng.randrange(len(said)), strange)
    if rng.random() < 0.3:
        at = rng.randrange(len(said) - 1)
        said[at], said[at + 1] = said[at + 1], said[at]
    return " ".join(said)


def vary(rng: Random, question: str) -> str:
    question = reword(rng, question)
    if rng.random() < 0.3:
        question = wrap(rng, question)
    return casual(rng, question) if rng.random() < 0.35 else question


def surface(rng: Random, question: str) -> str:
    """The same words, sometimes in lower case: for questions whose words must be copied."""
    if rng.random() < 0.25:
        question = wrap(rng, question)
    if rng.random() < 0.25:
        question = question.rstrip("?.! ")
    return lower_first(question) if rng.random() < 0.2 else question


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def definition(rng: Random, topic: str, verb: str, held_out: bool) -> str:
    template = rng.choice(HELD_OUT_DEFINITIONS if held_out else DEFINITIONS)
    return capitalised(expand(rng, template).format(x=topic, be=verb))


def comparison(rng: Random, pair: tuple[str, str], held_out: bool) -> str:
    first, second = rng.sample(pair, 2)
    template = rng.choice(HELD_OUT_COMPARISONS if held_out else COMPARISONS)
    return capitalised(template.format(x=first, y=second))
