"""Small arithmetic: sums, differences, products, small word problems, and refusing what is too large.

Two-digit numbers are added and subtracted in steps, tens first, as a chain of equal terms:

    38 + 47 = 38 + 40 + 7 = 78 + 7 = 85

Of those sums and differences, one pair of numbers in ten is kept for evaluation. Steps and the multiplication table
are learnt whole. Sums are drawn by their result, so that small and large results come equally often.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from zlib import crc32

from model.demo.corpus.names import person
from model.demo.corpus.phrasing import vary, words
from model.demo.corpus.turns import Turn

LARGEST = 99
LARGEST_FACTOR = 12
SMALL_WORDS = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen",
    "seventeen eighteen nineteen",
)
TENS_WORDS = words("twenty thirty forty fifty sixty seventy eighty ninety")

ASK = (
    "{s}",
    "{s} =",
    "{s} = ?",
    "{s}?",
    "What is {s}?",
    "What's {s}?",
    "How much is {s}?",
    "Calculate {s}.",
    "Compute {s}.",
    "Please calculate {s}.",
    "Can you calculate {s}?",
    "Tell me what {s} is.",
    "What does {s} give?",
)
FORMS = {
    "+": ("{a} + {b}", "{a} + {b}", "{a}+{b}", "{a} plus {b}", "{a} and {b} together", "the sum of {a} and {b}"),
    "-": ("{a} - {b}", "{a} - {b}", "{a}-{b}", "{a} minus {b}", "{a} less {b}"),
    "*": ("{a} * {b}", "{a} x {b}", "{a}*{b}", "{a} times {b}", "{a} multiplied by {b}", "the product of {a} and {b}"),
}
IMPERATIVES = {
    "+": ("Add {a} and {b}.", "Add {b} to {a}.", "Sum up {a} and {b}."),
    "-": ("Subtract {b} from {a}.", "Take {b} away from {a}."),
    "*": ("Multiply {a} by {b}.", "Multiply {a} and {b}."),
}
STORIES_PLUS = (
    "I have {a} {things} and get {b} more. How many {things} do I have?",
    "{n} has {a} {things} and buys {b} more. How many {things} does {n} have?",
    "There are {a} {things} here and {b} there. How many are there together?",
)
STORIES_MINUS = (
    "I have {a} {things} and give away {b}. How many {things} do I have left?",
    "{n} has {a} {things} and loses {b}. How many {things} are left?",
    "There are {a} {things}, and {b} are gone. How many are left?",
)
THINGS = words("apples books coins pages tokens experts stones cups pens eggs cards marbles")
TOO_LARGE = "That is too large for me. I add and subtract numbers up to 99, and multiply up to 12 times 12."
NO_DIVISION = "I don't divide. I add, subtract and multiply small numbers."
DIVISIONS = (
    "What is {a} / {b}?",
    "{a} / {b}",
    "{a} divided by {b}",
    "Divide {a} by {b}.",
    "What is {a} divided by {b}?",
    "How often does {b} go into {a}?",
    "What is half of {a}?",
    "What is the square root of {a}?",
    "What is {b} percent of {a}?",
)


def is_held_out(operator: str, a: int, b: int) -> bool:
    """Whether training never does this calculation. Never true of what may be a step of another one."""
    if operator == "*" or min(a, b) < 10 or not (a % 10 and b % 10):
        return False
    # Both orders together: a sum turns round, and a negative difference is calculated as the positive one.
    first, second = (max(a, b), min(a, b)) if operator == "-" else sorted((a, b))
    return crc32(f"{first}{operator}{second}".encode()) % 10 == 0


def in_words(number: int) -> str:
    if number < len(SMALL_WORDS):
        return SMALL_WORDS[number]
    tens, ones = divmod(number, 10)
    return TENS_WORDS[tens - 2] + (f"-{SMALL_WORDS[ones]}" if ones else "")


def draw(rng: Random, operator: str) -> tuple[int, int]:
    match operator:
        case "+":
            total = rng.randint(0, 2 * LARGEST) if rng.random() < 0.75 else rng.randint(0, 20)
            a = rng.randint(max(0, total - LARGEST), min(LARGEST, total))
            return a, total - a
        case "-":
            a, b = rng.randint(0, LARGEST), rng.randint(0, LARGEST)
            if rng.random() < 0.3:
                a, b = rng.randint(0, 20), rng.randint(0, 20)
            return (a, b) if rng.random() < 0.1 else (max(a, b), min(a, b))
        case _:
            return rng.randint(0, LARGEST_FACTOR), rng.randint(0, LARGEST_FACTOR)


def operands(rng: Random, operator: str, held_out: bool) -> tuple[int, int]:
    while True:
        a, b = draw(rng, operator)
        if is_held_out(operator, a, b) == held_out:
            return a, b


def result(operator: str, a: int, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


def exercise(rng: Random, held_out: bool) -> tuple[str, int, int]:
    operator = rng.choice("++++---" if held_out else "++++---**")
    return operator, *operands(rng, operator, held_out)


def chain(operator: str, a: int, b: int) -> str:
    """A calculation and its result, in steps where one step is too much."""
    asked = f"{a} {operator} {b}"
    tens, ones = b - b % 10, b % 10
    if operator == "-" and a < b:
        turned = chain("-", b, a).split(" = ")
        return " = ".join([asked, *(f"-({step})" for step in turned[:-1]), f"-{turned[-1]}"])
    if operator == "*" or not (tens and ones):
        return f"{asked} = {result(operator, a, b)}"
    steps = (asked, f"{a} {operator} {tens} {operator} {ones}", f"{result(operator, a, tens)} {operator} {ones}")
    return " = ".join([*steps, str(result(operator, a, b))])


def calculation(rng: Random, held_out: bool) -> Turn:
    operator, a, b = exercise(rng, held_out)
    spelled = rng.random() < 0.15
    shown_a, shown_b = (in_words(a), in_words(b)) if spelled else (str(a), str(b))
    if rng.random() < 0.15:
        question = rng.choice(IMPERATIVES[operator]).format(a=shown_a, b=shown_b)
    else:
        form = rng.choice(FORMS[operator]).format(a=shown_a, b=shown_b)
        question = rng.choice(ASK).format(s=form)
        question = question[0].upper() + question[1:]
    question = question.lower() if rng.random() < 0.2 else question
    return equation(question, operator, a, b)


def equation(question: str, operator: str, a: int, b: int) -> Turn:
    return Turn("sum", question, chain(operator, a, b) + ".", about=going_on(result(operator, a, b)))


def several(rng: Random, held_out: bool) -> Turn:
    """A list of calculations and their results."""
    exercises = [exercise(rng, held_out) for _ in range(rng.randint(2, 4))]
    asked = [f"{a} {operator} {b}" for operator, a, b in exercises]
    question = rng.choice(("Calculate {s}.", "What is {s}?", "{s}", "Please calculate {s}.", "Compute {s}."))
    results = ", ".join(chain(*numbers) for numbers in exercises)
    return Turn("sum", question.format(s=", ".join(asked)), results + ".")


def going_on(value: int) -> tuple[tuple[str, str], ...]:
    """Sums that go on from the last result, in one step."""
    if not 0 <= value <= LARGEST:
        return ()
    questions = (("And plus {n}?", 1), ("Plus {n}?", 5), ("Add {n} to that.", 10), ("Add {n} more.", 2))
    return tuple((question.format(n=n), chain("+", value, n) + ".") for question, n in questions)


def word_problem(rng: Random, held_out: bool) -> Turn:
    operator = rng.choice("+-")
    a, b = operands(rng, operator, held_out)
    a, b = (a, b) if operator == "+" or a >= b else (b, a)  # nobody gives away more than there is
    story = rng.choice(STORIES_PLUS if operator == "+" else STORIES_MINUS)
    return equation(story.format(a=a, b=b, n=person(rng), things=rng.choice(THINGS)), operator, a, b)


def three_terms(rng: Random, held_out: bool) -> Turn:
    a, b, c = (rng.randint(1, 9) for _ in range(3))
    while (crc32(f"{a}{b}{c}".encode()) % 10 == 0) != held_out:
        a, b, c = (rng.randint(1, 9) for _ in range(3))
    question = rng.choice(ASK).format(s=f"{a} + {b} + {c}")
    return Turn("sum", question, f"{a} + {b} + {c} = {a + b} + {c} = {a + b + c}.", about=going_on(a + b + c))


def larger(rng: Random, held_out: bool) -> Turn:
    a, b = rng.sample(range(LARGEST + 1), 2)
    while is_held_out("larger", a, b) != held_out:
        a, b = rng.sample(range(LARGEST + 1), 2)
    if rng.random() < 0.5:
        question = rng.choice(("Which is larger, {a} or {b}?", "What is more, {a} or {b}?", "Is {a} larger than {b}?"))
        return Turn("sum", vary(rng, question.format(a=a, b=b)), f"{max(a, b)} is larger than {min(a, b)}.")
    question = rng.choice(("Which is smaller, {a} or {b}?", "What is less, {a} or {b}?", "Is {a} smaller than {b}?"))
    return Turn("sum", vary(rng, question.format(a=a, b=b)), f"{min(a, b)} is smaller than {max(a, b)}.")


def counting(rng: Random, held_out: bool) -> Turn:
    last = rng.choice((4, 7, 13)) if held_out else rng.choice((2, 3, 5, 6, 8, 9, 10, 11, 12, 14, 15))
    question = rng.choice(("Count to {n}.", "Count from 1 to {n}.", "Can you count to {n}?", "Please count to {n}."))
    return Turn("sum", vary(rng, question.format(n=last)), ", ".join(map(str, range(1, last + 1))) + ".")


def too_large(rng: Random, held_out: bool) -> Turn:
    a, b = rng.randint(100, 10 ** rng.randint(3, 6)), rng.randint(2, 10 ** rng.randint(1, 5))
    if rng.random() < 0.3:
        a, b = 100 * rng.randint(1, 20), 10 * rng.randint(1, 90)
    operator = rng.choice("+-*")
    if rng.random() < 0.25:
        operator, a, b = "*", rng.randint(13, LARGEST), rng.randint(13, LARGEST)
    a, b = rng.sample((a, b), 2)
    question = rng.choice(ASK).format(s=rng.choice(FORMS[operator]).format(a=a, b=b))
    return Turn("sum", question[0].upper() + question[1:], TOO_LARGE)


def division(rng: Random, held_out: bool) -> Turn:
    a, b = rng.randint(1, 200), rng.randint(2, 20)
    return Turn("sum", vary(rng, rng.choice(DIVISIONS).format(a=a, b=b)), NO_DIVISION)


def turn(rng: Random, held_out: bool) -> Turn:
    """A question about numbers; the held-out ones have numbers that training never puts together."""
    makers: list[Callable[[Random, bool], Turn]] = [calculation, several, word_problem, three_terms, larger, counting]
    weights = [52, 18, 8, 4, 5, 2]
    if not held_out:  # their answer depends on no pair of numbers
        makers += [too_large, division]
        weights += [7, 4]
    return rng.choices(makers, weights)[0](rng, held_out)
