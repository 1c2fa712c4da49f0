"""Word problems in the manner of GSM8K (Cobbe et al. 2021, arXiv 2110.14168), from a seed.

A problem is a story template, its numbers, and a wording. The template and the numbers alone
decide the split (`split_of`), so that no held-out (template, numbers) pair is ever trained on,
under any names, objects or phrasing.

The solution writes out two to four arithmetic steps. Every step takes one of eight or more forms
of differing length, with or without an opening word, and the closing varies too: with one fixed
form the whole text would be certain from the problem, and there would be no order to decode it in.
"""

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]

MAX_PROMPT_CHARS = 144
MAX_SOLUTION_CHARS = 191
"""One less than the 192 generated positions: the last is for the end of the text."""

MAX_VALUE = 99
MIN_VALUE = 2
HELDOUT_SHARE = 16
"""One (template, numbers) pair in this many is held out."""


@dataclass(frozen=True)
class Problem:
    """A word problem, a written-out solution, and the number it comes to."""

    prompt: str
    solution: str
    answer: int


@dataclass(frozen=True)
class Template:
    """A story whose numbers are free.

    `ranges` bounds each number drawn; `steps` are (operation, left, right) where an operand is the
    name of a number or `r1`, `r2`, ... for the result of an earlier step, or a digit string. A
    word in braces in `stories` is a number, a person, a pronoun or the things counted.
    """

    key: str
    ranges: Mapping[str, tuple[int, int]]
    steps: tuple[tuple[str, str, str], ...]
    stories: tuple[str, ...]
    unit: str | None = None


TEMPLATES = (
    Template(
        "collect",
        {"a": (8, 60), "b": (3, 39), "c": (3, 39)},
        (("+", "a", "b"), ("-", "r1", "c")),
        (
            "{name} has {a} {things}. {He} buys {b} more, then gives {c} to {friend}. "
            "How many {things} does {name} have now?",
            "{name} starts with {a} {things}, finds {b} more and loses {c}. "
            "How many {things} are left?",
        ),
    ),
    Template(
        "bags",
        {"a": (5, 50), "k": (2, 9), "m": (2, 9), "c": (3, 30)},
        (("*", "k", "m"), ("+", "a", "r1"), ("-", "r2", "c")),
        (
            "{name} has {a} {things}. {He} buys {k} bags of {m} {things} each and gives {c} to "
            "{friend}. How many {things} does {name} have?",
            "There are {a} {things} on {name}'s desk. {friend} brings {k} bags with {m} in each, "
            "and {name} sells {c}. How many {things} remain?",
        ),
    ),
    Template(
        "wages",
        {"k": (2, 9), "m": (3, 9), "b": (4, 40), "c": (3, 30)},
        (("*", "k", "m"), ("-", "r1", "b"), ("+", "r2", "c")),
        (
            "{name} works {k} days for {m} dollars a day. {He} spends {b} dollars, and {friend} "
            "gives {him} {c} dollars. How many dollars does {name} have?",
            "For {k} weeks {name} saves {m} dollars each week. {He} pays {b} dollars for a game "
            "and earns {c} more. How many dollars does {he} have?",
        ),
        "dollars",
    ),
    Template(
        "baker",
        {"k": (3, 9), "m": (4, 9), "b": (3, 30), "c": (3, 30)},
        (("*", "k", "m"), ("-", "r1", "b"), ("-", "r2", "c")),
        (
            "{name} fills {k} trays with {m} {food} each. {He} sells {b} {food} and {friend} eats "
            "{c}. How many {food} are left?",
            "A shop gets {k} boxes of {m} {food}. It sells {b} on Monday and {c} on Tuesday. "
            "How many {food} are left?",
        ),
        "{food}",
    ),
    Template(
        "compare",
        {"a": (5, 40), "b": (2, 20), "c": (2, 30)},
        (("+", "a", "b"), ("+", "a", "r1"), ("-", "r2", "c")),
        (
            "{name} has {a} {things} and {friend} has {b} more than {name}. Together they give "
            "away {c}. How many {things} do they have left?",
            "{friend} counts {b} more {things} than {name}, who counts {a}. They lose {c} of "
            "them. How many {things} do both have now?",
        ),
    ),
    Template(
        "twice",
        {"a": (4, 30), "b": (3, 30), "c": (2, 25)},
        (("*", "2", "a"), ("+", "a", "r1"), ("+", "r2", "b"), ("-", "r3", "c")),
        (
            "{name} reads {a} pages on Monday, twice as many on Tuesday and {b} on Friday. {c} of "
            "the pages were comics. How many were not?",
            "{name} has {a} pages and writes 2 times as many. {friend} adds {b} pages and then "
            "{name} tears out {c}. How many pages are left?",
        ),
        "pages",
    ),
    Template(
        "bus",
        {"a": (8, 50), "b": (3, 30), "c": (3, 30), "d": (2, 30)},
        (("-", "a", "b"), ("+", "r1", "c"), ("+", "r2", "d")),
        (
            "A bus leaves with {a} people. At the first stop {b} get off and {c} get on. At the "
            "next stop {d} get on. How many people are on the bus?",
            "{a} people are in a hall. {b} go home, then {c} arrive, and later {d} more. "
            "How many people are there now?",
        ),
        "people",
    ),
    Template(
        "rows",
        {"k": (2, 9), "m": (2, 9), "j": (2, 9), "n": (2, 9)},
        (("*", "k", "m"), ("*", "j", "n"), ("+", "r1", "r2")),
        (
            "{name} plants {k} rows of {m} {plants} and {friend} plants {j} rows of {n}. "
            "How many {plants} do they plant?",
            "In the garden are {k} beds with {m} {plants} and {j} beds with {n} {plants}. "
            "How many {plants} are there?",
        ),
        "{plants}",
    ),
    Template(
        "market",
        {"k": (2, 9), "m": (3, 9), "j": (2, 9), "n": (2, 8), "c": (2, 20)},
        (("*", "k", "m"), ("*", "j", "n"), ("-", "r1", "r2"), ("+", "r3", "c")),
        (
            "{name} sells {k} {things} for {m} dollars each, buys {j} {food} for {n} dollars each "
            "and finds {c} dollars. How many dollars does {he} have?",
            "{name} gets {k} gifts of {m} dollars. {He} pays for {j} lunches at {n} dollars and "
            "earns {c} dollars. How much money is left?",
        ),
        "dollars",
    ),
    Template(
        "trip",
        {"a": (5, 40), "b": (4, 40), "c": (2, 30)},
        (("+", "a", "b"), ("-", "r1", "c")),
        (
            "{name} walks {a} miles in May and {b} miles in June. {friend} walks {c} miles less "
            "than that. How many miles does {friend} walk?",
            "A road is {a} miles of hills and {b} miles of fields. {name} has walked {c} miles. "
            "How many miles are left?",
        ),
        "miles",
    ),
)

# Each form is lower case at its start: an opener may come before it.
FORMS: Mapping[str, tuple[str, ...]] = {
    "+": (
        "{a} + {b} = {c}.",
        "adding {b} to {a} gives {c}.",
        "{a} and {b} make {c} {unit}.",
        "that is {a} + {b} = {c} {unit}.",
        "the sum of {a} and {b} is {c}.",
        "we add {a} and {b} and get {c}.",
        "with {b} more than {a} it is {c}.",
        "{a} {unit} plus {b} {unit} is {c}.",
        "the total becomes {a} + {b} = {c}.",
        "together there are {a} + {b}, or {c}.",
    ),
    "-": (
        "{a} - {b} = {c}.",
        "taking {b} from {a} leaves {c}.",
        "{a} less {b} is {c} {unit}.",
        "that is {a} - {b} = {c} {unit}.",
        "when {b} are gone, {a} become {c}.",
        "we subtract {b} from {a} to get {c}.",
        "of {a} {unit} only {c} stay after {b} go.",
        "{a} {unit} minus {b} {unit} is {c}.",
        "this drops by {b} from {a} to {c}.",
        "the rest is {a} - {b}, or {c}.",
    ),
    "*": (
        "{a} * {b} = {c}.",
        "{a} times {b} gives {c}.",
        "{a} groups of {b} make {c} {unit}.",
        "that is {a} * {b} = {c} {unit}.",
        "multiplying {a} by {b} gives {c}.",
        "we count {b}, {a} times, and get {c}.",
        "the product of {a} and {b} is {c}.",
        "{a} lots of {b} {unit} come to {c}.",
        "in all it is {a} * {b}, or {c} {unit}.",
    ),
}

FIRST_OPENERS = ("", "", "First, ", "To start, ", "Well, ")
LATER_OPENERS = ("", "", "Then ", "Next, ", "Now ", "After that, ", "So ")

CLOSINGS = (
    "The answer is {n}.",
    "So the answer is {n}.",
    "Answer: {n}.",
    "That gives {n} {unit}.",
    "In the end it is {n}.",
    "So there are {n} {unit} in all.",
    "Hence {n} {unit}.",
    "The result is {n} {unit}.",
)

PEOPLE = tuple(
    [(name, "she", "her") for name in ("Anna", "Mia", "Lena", "Sara", "Ivy", "Nora", "Ruth", "Zoe")]
    + [(name, "he", "him") for name in ("Tom", "Ben", "Omar", "Jack", "Leo", "Paul", "Kai", "Hugo")]
)
THINGS = ("apples", "marbles", "stickers", "books", "shells", "coins", "cards", "pens", "stamps")
FOOD = ("cookies", "rolls", "muffins", "pies", "buns", "cakes", "tarts")
PLANTS = ("roses", "tulips", "trees", "beans", "lilies", "carrots")


def split_of(template: str, numbers: Sequence[int]) -> Split:
    """The split that a template's key with these numbers belongs to, by a hash of the two."""
    key = f"{template}:{','.join(map(str, numbers))}".encode()
    bucket = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little")
    return "heldout" if bucket % HELDOUT_SHARE == 0 else "train"


_APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def evaluate(
    template: Template, numbers: Mapping[str, int]
) -> list[tuple[str, int, int, int]] | None:
    """The template's steps as (operation, left, right, result); None where a result is out of
    [`MIN_VALUE`, `MAX_VALUE`]."""
    values = dict(numbers)
    done = []
    for index, (op, left, right) in enumerate(template.steps, 1):
        a = values[left] if left in values else int(left)
        b = values[right] if right in values else int(right)
        c = _APPLY[op](a, b)
        if not MIN_VALUE <= c <= MAX_VALUE:
            return None
        values[f"r{index}"] = c
        done.append((op, a, b, c))
    return done


def _draw(
    rng: random.Random, template: Template, split: Split
) -> tuple[dict[str, int], list[tuple[str, int, int, int]]]:
    while True:
        numbers = {
            name: low + int(rng.random() * (high - low + 1))
            for name, (low, high) in template.ranges.items()
        }
        steps = evaluate(template, numbers)
        if steps is not None and split_of(template.key, tuple(numbers.values())) == split:
            return numbers, steps


def _word(
    rng: random.Random, steps: Sequence[tuple[str, int, int, int]], unit: str, answer: int
) -> str:
    sentences = []
    for index, (op, a, b, c) in enumerate(steps):
        opener = rng.choice(LATER_OPENERS if index else FIRST_OPENERS)
        form = rng.choice(FORMS[op]).format(a=a, b=b, c=c, unit=unit)
        sentences.append(opener + form if opener else form[0].upper() + form[1:])
    sentences.append(rng.choice(CLOSINGS).format(n=answer, unit=unit))
    return " ".join(sentences)


def _make(rng: random.Random, split: Split) -> tuple[Template, dict[str, int], Problem]:
    template = rng.choice(TEMPLATES)
    numbers, steps = _draw(rng, template, split)
    (name, he, him), (friend, _, _) = rng.sample(PEOPLE, 2)
    words = {
        "name": name,
        "friend": friend,
        "he": he,
        "He": he.capitalize(),
        "him": him,
        "things": rng.choice(THINGS),
        "food": rng.choice(FOOD),
        "plants": rng.choice(PLANTS),
    }
    prompt = rng.choice(template.stories).format(**words, **numbers)
    unit = (template.unit or "{things}").format(**words)
    answer = steps[-1][3]
    # Redrawing the wording keeps a long story within the generated positions.
    solution = _word(rng, steps, unit, answer)
    while len(solution) > MAX_SOLUTION_CHARS:
        solution = _word(rng, steps, unit, answer)
    return template, numbers, Problem(prompt, solution, answer)


def problems(split: Split, n: int, seed: int) -> list[Problem]:
    """`n` problems of a split.

    Args:
        split: `"train"` or `"heldout"`; the two share no (template, numbers) pair.
        n: how many; at least 0.
        seed: the same seed gives the same list, and a longer list begins with the shorter one.

    Raises:
        ValueError: an unknown split or a negative `n`.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split: expected 'train' or 'heldout', got {split!r}")
    if n < 0:
        raise ValueError(f"n: expected at least 0, got {n}")
    rng = random.Random(f"{split}/{seed}")
    return [_make(rng, split)[2] for _ in range(n)]


_INTEGER = re.compile(r"(?<!\d)-\d+|\d+")


def extract_answer(text: str) -> int | None:
    """The last integer of a solution, as GSM8K is commonly scored; None where there is none."""
    found = _INTEGER.findall(text)
    return int(found[-1]) if found else None
