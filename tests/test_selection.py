"""Documents are taken and held out by what they draw, whole, up to the asked numbers."""

import math
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from monosemy.selection import Limit, choose_taken, choose_validation, draw, shares

sizes = st.lists(st.integers(1, 10_000), min_size=2, max_size=60)


def draws(count: int, seed: int = 0) -> np.ndarray:
    return np.array([draw(seed, "take", f"d{n}") for n in range(count)], np.uint64)


@given(sizes, st.floats(0.01, 0.99), st.integers(0, 5))
def test_the_share_held_out_is_near_the_asked_one(sizes: list[int], fraction: float, seed: int):
    held_out = choose_validation(np.array(sizes), draws(len(sizes), seed), fraction)
    assert 1 <= held_out.sum() < len(sizes)
    found = np.array(sizes)[held_out].sum()
    assert abs(found - fraction * sum(sizes)) <= max(sizes)


@given(sizes, st.integers(1, 300_000))
def test_a_limit_spares_only_what_is_not_taken(sizes: list[int], most: int):
    """In whatever order documents are finished, those that `Limit` lets pass hold all that are taken."""
    numbers, tokens = draws(len(sizes)), np.array(sizes)
    taken = choose_taken(np.zeros(len(sizes), int), tokens, numbers, shares(()), most)
    limit = Limit(Fraction(1), most)
    for number, size, is_taken in zip(numbers.tolist(), sizes, taken.tolist(), strict=True):
        if limit.excludes(number):
            assert not is_taken
        else:
            limit.add(number, size)
    assert tokens[taken].sum() >= min(most, sum(sizes))
    assert tokens[taken].sum() - tokens[taken][numbers[taken].argmax()] < most


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 100)), min_size=3, max_size=200), st.integers(0, 5000))
def test_each_source_gives_its_share_and_no_document_twice(documents: list[tuple[int, int]], most: int):
    sources, tokens = (np.array(column) for column in zip(*documents, strict=True))
    weights = (0.5, 0.3, 0.2)
    taken = choose_taken(sources, tokens, draws(len(tokens)), shares(weights), most)
    available = np.bincount(sources, tokens, minlength=3)
    whole = min([most or math.inf, *(available / weights)])
    given = np.bincount(sources[taken], tokens[taken], minlength=3)
    assert (given >= np.floor(whole * np.array(weights)) - 1).all()
    assert (given <= whole * np.array(weights) + 100).all()


def test_shares_are_exact():
    assert sum(shares((0.1, 0.2, 0.7))) == 1
    assert shares((1.0, 3.0)) == [Fraction(1, 4), Fraction(3, 4)]
    assert shares(()) == [1]
