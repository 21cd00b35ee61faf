"""The quickstart's text: six skills that the base model is trained on, and the one it is taught by fine-tuning.

A skill maps a word of lower-case letters to an answer; a prompt is `<skill>: <word>`. Words are split into training and
held-out ones by a checksum of the word itself, so no held-out word occurs in any training text, of any skill.
"""

from __future__ import annotations

import dataclasses
import random
import string
import zlib
from collections.abc import Callable, Iterator

MIN_LETTERS = 3
MAX_LETTERS = 8
#: One word in eight is held out.
HELD_OUT_SHARE = 8


def _double(word: str) -> str:
    return "".join(letter * 2 for letter in word)


#: What the base model knows.
BASE_SKILLS: dict[str, Callable[[str], str]] = {
    "copy": lambda word: word,
    "upper": str.upper,
    "length": lambda word: str(len(word)),
    "first": lambda word: word[0],
    "last": lambda word: word[-1],
    "double": _double,
}
#: What fine-tuning teaches it.
NEW_SKILL = "reverse"
SKILLS: dict[str, Callable[[str], str]] = {**BASE_SKILLS, NEW_SKILL: lambda word: word[::-1]}

#: Every character a prompt or an answer may hold; the newline belongs to the chat template.
ALPHABET = "\n :" + string.ascii_letters + string.digits


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and the only right answer to it."""

    prompt: str
    answer: str


def is_held_out(word: str) -> bool:
    """Whether a word belongs to the held-out words; the same for every seed and skill."""
    return zlib.crc32(word.encode()) % HELD_OUT_SHARE == 0


def make_example(skill: str, word: str) -> Example:
    """The example of a skill for one word; KeyError when there is no such skill."""
    return Example(prompt=f"{skill}: {word}", answer=SKILLS[skill](word))


def words(seed: int, *, held_out: bool) -> Iterator[str]:
    """An endless stream of random words of MIN_LETTERS to MAX_LETTERS letters, all held out or none."""
    generator = random.Random(seed)
    while True:
        length = generator.randint(MIN_LETTERS, MAX_LETTERS)
        word = "".join(generator.choices(string.ascii_lowercase, k=length))
        if is_held_out(word) == held_out:
            yield word


def base_examples(seed: int) -> Iterator[Example]:
    """An endless stream of training examples of the base skills, in random order."""
    generator = random.Random(seed + 1)
    names = list(BASE_SKILLS)
    for word in words(seed, held_out=False):
        yield make_example(generator.choice(names), word)


def skill_examples(skill: str, count: int, seed: int, *, held_out: bool) -> list[Example]:
    """`count` examples of one skill, all with different prompts."""
    found: dict[str, Example] = {}
    for word in words(seed, held_out=held_out):
        if len(found) == count:
            break
        example = make_example(skill, word)
        found.setdefault(example.prompt, example)
    return list(found.values())
