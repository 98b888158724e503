import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from atoll.core.random import Key, permutations

parts = st.lists(st.one_of(st.integers(-5, 5), st.text("ab1", max_size=3)), max_size=4)


@given(parts, parts, st.integers(0, 3), st.integers(0, 3))
def test_different_addresses_have_different_streams(one, other, seed, other_seed):
    first, second = Key(seed).fold(*one), Key(other_seed).fold(*other)
    assert (first == second) == (first.digest() == second.digest())


def test_numbers_and_their_text_are_different_addresses():
    assert Key(0).fold(1).digest() != Key(0).fold("1").digest()
    assert Key(0).fold(1).digest() == Key(0).fold(np.int64(1)).digest()
    assert Key(0).fold("ab", "c").digest() != Key(0).fold("a", "bc").digest()


def test_streams_do_not_depend_on_what_was_drawn_before():
    key = Key(3).fold("batches", 2, "a")
    key.generator().random(1000)
    np.testing.assert_array_equal(key.generator().random(5), key.generator().random(5))


def test_keys_are_the_same_in_every_process():
    code = (
        "from atoll.core.random import Key\n"
        "print(Key(7).fold('x', 1).generator().integers(1 << 60))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "random")
    }
    assert len(outputs) == 1


def test_streams_are_uniform_across_clients():
    # The first draws of 2,000 clients: a Kolmogorov-Smirnov distance beyond 1.95 / sqrt(n) has
    # probability below 0.1 %, and the seed is fixed.
    draws = np.sort([Key(0).fold("u", client).generator().random() for client in range(2000)])
    distance = np.abs(draws - np.arange(1, 2001) / 2000).max()
    assert distance < 1.95 / np.sqrt(2000)


def test_permutations_sort_the_published_numbers():
    """SplitMix64 from 1234567, as the authors' C program prints them."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    expected = sorted(range(5), key=published.__getitem__)
    assert permutations([1234567], 5, 1)[0, 0].tolist() == expected
    # A second epoch goes on in the same stream, and neighbours do not matter.
    assert permutations([99, 1234567], 5, 3)[1, 0].tolist() == expected


def test_every_permutation_is_equally_likely():
    words = [Key(0).fold(i).integer() for i in range(12_000)]
    drawn = permutations(words, 3, 2).reshape(-1, 3)
    kinds, counts = np.unique(drawn @ [9, 3, 1], return_counts=True)
    assert len(kinds) == 6
    # 24,000 draws: chi-squared with five degrees of freedom, one in a million.
    assert float(((counts - 4000) ** 2 / 4000).sum()) < 36
