"""A needle in a haystack: numbers hidden in a text, and questions that a model answers by continuing them.

Kamradt's test, https://github.com/gkamradt/LLMTest_NeedleInAHaystack, with exact answers: a needle is found if each of
its tokens is the likeliest one, which is what greedy generation would need.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

PLACES = ("Lisbon", "Nairobi", "Oslo", "Lima", "Kyoto", "Cairo", "Quebec", "Perth")
FILLER_SHARE = 0.5  # a haystack is mostly hay


@dataclass(frozen=True)
class Haystack:
    """A prompt and what is asked about it.

    Attributes:
        tokens: The text with the needles.
        questions: Questions and right answers one after another, which follow the text.
        answers: Where the answers are in `questions`, as (begin, end).
    """

    tokens: list[int]
    questions: list[int]
    answers: list[tuple[int, int]]


def haystack(encode: Callable[[str], list[int]], filler: Sequence[int], length: int, seed: int = 0) -> Haystack | None:
    """Hide a needle for each of PLACES in a text, spread evenly; None if so many tokens have no room for them.

    Args:
        encode: Text to tokens, without special ones.
        filler: The text, of any length: it is repeated or cut.
        length: Tokens in the result.
    """
    rng = np.random.default_rng(seed)
    # Each begins with another digit: who finds the needle needs no luck to tell its digits from those of others.
    numbers = 1000 * (1 + rng.permutation(len(PLACES))) + rng.integers(0, 1000, len(PLACES))
    asked = [
        (encode(f"\n\nThe password for {place}:"), encode(f" {n}")) for place, n in zip(PLACES, numbers, strict=True)
    ]
    end = encode("\n\n")
    needles = [[*question, *answer, *end] for question, answer in asked]
    room = length - sum(map(len, needles))
    if room < FILLER_SHARE * length:
        return None
    hay = [filler[i % len(filler)] for i in range(room)]
    tokens: list[int] = []
    begin = 0
    for i, needle in enumerate(needles):
        at = room * (2 * i + 1) // (2 * len(needles))
        tokens += [*hay[begin:at], *needle]
        begin = at
    tokens += hay[begin:]
    questions: list[int] = []
    answers = []
    for i in rng.permutation(len(asked)):
        question, answer = asked[i]
        questions += question
        answers.append((len(questions), len(questions) + len(answer)))
        questions += [*answer, *end]
    return Haystack(tokens, questions, answers)


def found(likeliest: np.ndarray, hidden: Haystack) -> int:
    """How many needles a model finds.

    Args:
        likeliest: The likeliest token behind each token of `hidden.questions`, (len(questions),).
    """
    right = np.asarray(hidden.questions)
    return sum(bool((likeliest[begin - 1 : end - 1] == right[begin:end]).all()) for begin, end in hidden.answers)
