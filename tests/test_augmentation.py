"""Crops and flips: drawn evenly, and made as the report says it."""

import chainer
import numpy as np
import pytest
from test_random import chi_square

from resnet import augmentation, functions


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


def test_draws_stay_what_they_are():
    # Logs of different versions can be compared only while this holds.
    top, left, flip = augmentation.draw(np, 3, 9, 6)
    assert top.tolist() == [7, 7, 6, 1, 0, 7]
    assert left.tolist() == [6, 6, 2, 4, 4, 8]
    assert flip.tolist() == [0, 0, 1, 1, 0, 1]


@pytest.mark.parametrize(("seed", "iteration"), [(5, 99), (4, 100)], ids=["seed", "iteration"])
def test_another_seed_or_iteration_crops_and_flips_otherwise(seed, iteration):
    draws, others = (augmentation.draw(np, *keys, 1000) for keys in ((4, 99), (seed, iteration)))
    shares = [(one == other).mean() for one, other in zip(draws, others, strict=True)]
    assert shares == pytest.approx([1 / 9, 1 / 9, 1 / 2], abs=0.08)  # by chance


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


@pytest.mark.gpu
def test_gpu_draws_and_crops_as_the_cpu_does():
    if not functions.count_gpus():
        pytest.skip("there is no GPU")
    cupy = chainer.cuda.cupy
    for on_cpu, on_gpu in zip(
        augmentation.draw(np, 3, 12, 128), augmentation.draw(cupy, 3, 12, 128), strict=True
    ):
        np.testing.assert_array_equal(on_cpu, on_gpu.get())
    x = np.random.RandomState(0).randn(128, 3, 32, 32).astype(np.float32)
    place = augmentation.draw(np, 3, 12, 128)
    on_gpu = augmentation.crop_and_flip(cupy.asarray(x), *map(cupy.asarray, place))
    np.testing.assert_array_equal(augmentation.crop_and_flip(x, *place), on_gpu.get())
