"""Counter-based random numbers, and the augmentation drawn from them."""

from types import SimpleNamespace

import chainer
import numpy as np
import pytest

from resnet import augmentation, functions, random


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


def test_draws_cover_all_81_offsets_and_both_flips_evenly():
    top, left, flip = augmentation.draw(np, 0, 17, 81_000)
    assert chi_square(np.bincount(top * 9 + left, minlength=81)) < 145  # 80 degrees of freedom
    assert chi_square(np.bincount(flip)) < 19
    assert chi_square(np.bincount(top * 2 + flip, minlength=18)) < 50


def test_draws_of_an_image_do_not_depend_on_the_batch_size():
    small = augmentation.draw(np, 4, 99, 16)
    large = augmentation.draw(np, 4, 99, 128)
    for few, many in zip(small, large, strict=True):
        assert (few == many[:16]).all()


def test_what_is_not_random_leaves_an_image_as_it_is_and_the_rest_is_the_reports():
    top, left, flip = augmentation.draw(np, 4, 99, 64)
    x = np.random.RandomState(0).randn(64, 3, 32, 32).astype(np.float32)

    def augmented(kind):
        return augmentation.crop_and_flip(x, *augmentation.draw(np, 4, 99, 64, kind))

    np.testing.assert_array_equal(augmented("none"), x)
    np.testing.assert_array_equal(augmented("crop"), slow_crop_and_flip(x, top, left, 0 * flip))
    middle = np.full(64, augmentation.PADDING)
    np.testing.assert_array_equal(augmented("flip"), slow_crop_and_flip(x, middle, middle, flip))
    assert (augmented("flip") != x).any() and (augmented("crop") != x).any()


def slow_crop_and_flip(x, top, left, flip):
    """The report's words, one image and one step at a time."""
    images = []
    for image, t, f, mirrored in zip(x, top, left, flip, strict=True):
        padded = np.pad(image, ((0, 0), (4, 4), (4, 4)))
        crop = padded[:, t : t + 32, f : f + 32]
        images.append(crop[:, :, ::-1] if mirrored else crop)
    return np.stack(images)


def test_crop_and_flip_equals_the_slow_clear_version():
    x = np.random.RandomState(0).randn(162, 3, 32, 32).astype(np.float32)
    top, left, flip = np.unravel_index(np.arange(162), (9, 9, 2))  # every crop, flipped or not
    fast = augmentation.crop_and_flip(x, top, left, flip)
    assert fast.dtype == np.float32
    np.testing.assert_array_equal(fast, slow_crop_and_flip(x, top, left, flip))


def test_numbers_are_not_copied_to_the_gpu_one_by_one():
    """CuPy copies each from the host and waits; arrays may be needed."""

    def asarray(value, dtype):
        assert isinstance(value, np.ndarray)
        return np.asarray(value, dtype)

    xp = SimpleNamespace(zeros=np.zeros, asarray=asarray)
    keys = 3, np.int64(2**40), 7, np.arange(5)
    np.testing.assert_array_equal(random.bits(xp, *keys), random.bits(np, *map(np.array, keys)))


@pytest.mark.gpu
def test_gpu_draws_and_crops_as_the_cpu_does():
    if not functions.count_gpus():
        pytest.skip("there is no GPU")
    cupy = chainer.cuda.cupy
    for on_cpu, on_gpu in zip(
        augmentation.draw(np, 3, 12, 128), augmentation.draw(cupy, 3, 12, 128), strict=True
    ):
        np.testing.assert_array_equal(on_cpu, on_gpu.get())
    order = random.permutation(cupy, 50_000, 0, random.SHUFFLE, 3).get()
    np.testing.assert_array_equal(order, random.permutation(np, 50_000, 0, random.SHUFFLE, 3))
    x = np.random.RandomState(0).randn(128, 3, 32, 32).astype(np.float32)
    place = augmentation.draw(np, 3, 12, 128)
    on_gpu = augmentation.crop_and_flip(cupy.asarray(x), *map(cupy.asarray, place))
    np.testing.assert_array_equal(augmentation.crop_and_flip(x, *place), on_gpu.get())
