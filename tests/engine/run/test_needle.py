"""Needles in a haystack: where they are, what is asked, and what counts as found."""

import numpy as np
import pytest

from tq.engine.run import needle


def encode(text):
    return list(text.encode())


FILLER = encode("the hay is dry and long. ")


@pytest.mark.parametrize("length", [700, 1001, 5000])
def test_the_haystack_has_the_length_and_every_needle_spread_evenly(length):
    hidden = needle.haystack(encode, FILLER, length)
    text = bytes(hidden.tokens).decode()
    assert len(hidden.tokens) == length
    at = [text.index(f"The password for {place}:") for place in needle.PLACES]
    assert at == sorted(at)
    gaps = np.diff(at)
    assert gaps.max() - gaps.min() <= 10  # the lengths of names
    assert at[0] < gaps[0] and length - at[-1] < gaps[0] + 40  # the last needle itself


def test_each_question_has_the_answer_of_its_needle():
    hidden = needle.haystack(encode, FILLER, 900)
    text, asked = bytes(hidden.tokens).decode(), bytes(hidden.questions).decode()
    assert len(hidden.answers) == len(needle.PLACES)
    seen = set()
    for begin, end in hidden.answers:
        question = asked[:begin].rpartition("\n\n")[2]
        answer = asked[begin:end]
        assert f"{question}{answer}\n\n" in text
        assert len(answer) == 5 and answer[0] == " " and answer[1:].isdecimal()
        seen.add((question, answer[1]))
    assert len({question for question, _ in seen}) == len({digit for _, digit in seen}) == len(needle.PLACES)


def test_the_same_seed_hides_the_same():
    first, second = (needle.haystack(encode, FILLER, 900) for _ in range(2))
    assert first == second
    assert needle.haystack(encode, FILLER, 900, seed=1) != first


def test_a_short_haystack_is_none():
    least = sum(len(f"\n\nThe password for {place}: 1234\n\n") for place in needle.PLACES)
    assert needle.haystack(encode, FILLER, 2 * least - 2) is None
    assert needle.haystack(encode, FILLER, 2 * least) is not None


def test_found_needs_every_token_of_an_answer_and_nothing_else():
    hidden = needle.haystack(encode, FILLER, 900)
    n = len(hidden.questions)
    perfect = np.append(hidden.questions[1:], 0)
    assert needle.found(perfect, hidden) == len(needle.PLACES)
    only_answers = np.full(n, -1)
    for begin, end in hidden.answers:
        only_answers[begin - 1 : end - 1] = hidden.questions[begin:end]
    assert needle.found(only_answers, hidden) == len(needle.PLACES)
    for miss, (begin, end) in enumerate(hidden.answers):
        wrong = only_answers.copy()
        wrong[end - 2 if miss % 2 else begin - 1] = -1
        assert needle.found(wrong, hidden) == len(needle.PLACES) - 1
    assert needle.found(np.full(n, -1), hidden) == 0
