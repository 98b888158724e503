import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from atoll.keys import Key

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
    code = "from atoll.keys import Key; print(Key(7).fold('x', 1).generator().integers(1 << 60))"
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
