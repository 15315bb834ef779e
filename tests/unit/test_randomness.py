"""Streams of random numbers that are known by name."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fairchem_dens.randomness import derived_seed, generator, passing_generator

words = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4).map(tuple)
contents = st.lists(st.binary(max_size=12), max_size=4)


@given(words, contents)
def test_the_same_name_gives_the_same_numbers(name: tuple[int, ...], content: list[bytes]) -> None:
    first, second = generator(*name, content=content), generator(*name, content=iter(content))
    assert first is not second
    assert np.array_equal(first.random(5), second.random(5))
    assert derived_seed(*name) == derived_seed(*name)


@given(st.lists(st.tuples(words, contents), min_size=1, max_size=4), st.integers(0, 9))
def test_a_passing_generator_is_the_same_stream(
    names: list[tuple[tuple[int, ...], list[bytes]]], drawn_before: int
) -> None:
    """Whatever was drawn from the one before, odd numbers of 32 bits included."""
    for name, content in names:
        passing, lasting = passing_generator(*name, content=content), generator(*name, content=content)
        for draw in ("random", "standard_normal", "integers"):
            arguments = (5, 2**31) if draw == "integers" else (drawn_before,)
            assert np.array_equal(getattr(passing, draw)(*arguments), getattr(lasting, draw)(*arguments))
        passing.integers(0, 2**16, dtype=np.uint32)


def test_passing_generators_of_threads() -> None:
    def draw(seed: int) -> list[float]:
        return [passing_generator(seed, step).random() for step in range(200)]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(draw, range(8))) == [draw(seed) for seed in range(8)]


@given(words, words, contents, contents)
def test_another_name_gives_other_numbers(
    name: tuple[int, ...], other: tuple[int, ...], content: list[bytes], other_content: list[bytes]
) -> None:
    drawn, others = (
        generator(*name, content=content).random(4),
        generator(*other, content=other_content).random(4),
    )
    assert np.array_equal(drawn, others) == ((name, content) == (other, other_content))
    assert (derived_seed(*name) == derived_seed(*other)) == (name == other)


def test_names_that_look_alike_are_different() -> None:
    names = [(), (0,), (0, 0), (1, 0), (0, 1), (1,), (-1,), (256,), (1, 2, 3), (3, 2, 1)]
    assert len({derived_seed(*name) for name in names}) == len(names)
    # Where one piece ends and the next begins is part of the name.
    pieces: list[list[bytes]] = [[], [b""], [b"ab"], [b"a", b"b"], [b"", b"ab"], [b"ab", b""], [b"ba"]]
    assert len({generator(7, content=piece).random() for piece in pieces}) == len(pieces)


@given(words)
def test_seeds_suit_torch(name: tuple[int, ...]) -> None:
    assert 0 <= derived_seed(*name) < 2**63


def test_neighbouring_streams_are_independent() -> None:
    """One number from each of many streams is as random as many numbers from one."""
    drawn = np.array([[generator(seed, step).random() for step in range(60)] for seed in range(60)])
    assert stats.kstest(drawn.reshape(-1), "uniform").pvalue > 1e-3
    flat = drawn.reshape(-1)
    for lag in (1, 60):
        assert abs(np.corrcoef(flat[:-lag], flat[lag:])[0, 1]) < 4 / np.sqrt(flat.size)
    seeds = [derived_seed(*name) for name in itertools.product(range(20), repeat=3)]
    assert len(set(seeds)) == len(seeds)
    assert stats.kstest(np.array(seeds, dtype=float) / 2**63, "uniform").pvalue > 1e-3


def test_the_numbers_stay_what_they_are() -> None:
    """A run resumed elsewhere, or with a later version, must see the noise that it would have seen."""
    assert derived_seed(0, 1, 2) == 3107793614396734967
    assert generator(0, 1, content=[b"structure"]).random(2).tolist() == [
        0.5649993545026982,
        0.9576233568680782,
    ]
