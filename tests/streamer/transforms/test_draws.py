import numpy as np
import pytest

from streamer.transforms.draws import Draws, philox, uniform, whole

# Source: Random123 1.14, tests/kat_vectors, "philox4x32 10": counter, key, block.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "block"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: str, key: str, block: str) -> None:
    words = tuple(np.array([int(word, 16)], np.uint64) for word in counter.split())
    low, high = (int(word, 16) for word in key.split())

    result = philox(words, low | high << 32)

    assert [f"{word:08x}" for word in result[0]] == block.split()


def test_words_differ_with_index_epoch_seed_and_place() -> None:
    indices = np.array([7, 8, 7 + (1 << 32)])
    base = Draws(indices, seed=1, epoch=2)

    blocks = [
        *base.words(3, 4),
        *base.words(4, 4),
        *Draws(indices, seed=2, epoch=2).words(3, 4),
        *Draws(indices, seed=1 + (1 << 32), epoch=2).words(3, 4),
        *Draws(indices, seed=1, epoch=3).words(3, 4),
    ]

    assert len({block.tobytes() for block in blocks}) == len(blocks)


def test_words_of_a_place_begin_with_its_first_words() -> None:
    draws = Draws(np.arange(5), seed=9, epoch=1)

    first = draws.first_words(np.array([0, 200]))

    np.testing.assert_array_equal(first[:, 1], draws.words(200, 11)[:, :4])


def test_absent_seed_counts_as_zero() -> None:
    indices = np.arange(3)

    absent, zero = (Draws(indices, seed=seed, epoch=0).words(0, 4) for seed in (None, 0))

    np.testing.assert_array_equal(absent, zero)


def test_numbers_lie_in_their_range_and_fill_it_evenly() -> None:
    words = Draws(np.arange(60_000), seed=3, epoch=0).words(0, 4)

    numbers, sides = uniform(words), whole(words, 6)

    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    assert numbers.mean() == pytest.approx(0.5, abs=0.003)
    assert numbers.var() == pytest.approx(1 / 12, abs=0.001)
    np.testing.assert_allclose(np.bincount(sides.ravel(), minlength=6) / sides.size, 1 / 6, atol=0.003)
    assert abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.02


def test_more_words_than_a_place_has_are_refused() -> None:
    with pytest.raises(ValueError, match="67108864 are allowed"):
        Draws(np.arange(1), seed=0, epoch=0).words(0, (1 << 26) + 1)
