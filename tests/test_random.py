"""Counter-based random numbers: even, and the same ones everywhere."""

from types import SimpleNamespace

import chainer
import numpy as np
import pytest

from resnet import functions, random


def chi_square(counts):
    expected = counts.sum() / counts.size
    return ((counts - expected) ** 2 / expected).sum()


def test_numbers_depend_on_every_key_and_on_nothing_else():
    keys = [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3), (1, 0, 2)]
    numbers = [int(random.bits(np, *k)[0]) for k in keys]
    assert len(set(numbers)) == len(keys)
    np.random.seed(7)
    assert [int(random.bits(np, *k)[0]) for k in keys] == numbers


def test_numbers_stay_what_they_are():
    # Logs of different versions can be compared only while this holds.
    assert int(random.bits(np, 1, 2, 3)[0]) == 7702586659592502839
    assert random.permutation(np, 8, 0, random.SHUFFLE, 0).tolist() == [2, 5, 7, 4, 6, 0, 1, 3]


def test_below_is_uniform():
    draws = random.below(np, 162, 5, np.arange(162_000))
    assert draws.min() == 0 and draws.max() == 161
    assert chi_square(np.bincount(draws)) < 250  # 161 degrees of freedom: 1 in 10,000 is above 234


def test_permutation_is_one_and_no_image_has_a_favourite_place():
    orders = np.array([random.permutation(np, 20, 3, epoch) for epoch in range(4000)])
    assert (np.sort(orders, axis=1) == np.arange(20)).all()
    for place in (0, 7, 19):
        assert chi_square(np.bincount(orders[:, place], minlength=20)) < 57  # 19 degrees of freedom


def test_numbers_are_not_copied_to_the_gpu_one_by_one():
    """CuPy copies each from the host and waits; arrays may be needed."""

    def asarray(value, dtype):
        assert isinstance(value, np.ndarray)
        return np.asarray(value, dtype)

    xp = SimpleNamespace(zeros=np.zeros, asarray=asarray)
    keys = 3, np.int64(2**40), 7, np.arange(5)
    np.testing.assert_array_equal(random.bits(xp, *keys), random.bits(np, *map(np.array, keys)))


def test_numpy_s_own_generator_is_seeded_by_every_key():
    drawn = []
    for keys in ((0, 0), (1, 0), (0, 1), (1 << 32, 0), (0, 0, 1), (0, 0)):
        random.seed_numpy(*keys)
        drawn.append(np.random.rand())
    assert drawn[-1] == drawn[0] and len(set(drawn)) == 5


@pytest.mark.gpu
def test_gpu_permutes_as_the_cpu_does():
    if not functions.count_gpus():
        pytest.skip("there is no GPU")
    order = random.permutation(chainer.cuda.cupy, 50_000, 0, random.SHUFFLE, 3).get()
    np.testing.assert_array_equal(order, random.permutation(np, 50_000, 0, random.SHUFFLE, 3))
