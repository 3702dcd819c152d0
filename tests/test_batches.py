"""The stream of batches: order, augmentation, and images without their mean."""

import chainer
import numpy as np
import pytest

from resnet import augmentation, cifar10, random
from resnet.batches import Batches, Images


@pytest.fixture
def images(dataset):
    """40 training images."""
    mean = cifar10.mean_image(dataset.train_x)
    return Images(dataset.train_x, dataset.train_y, mean, chainer.get_device("@numpy"))


def stream(batches, count):
    return np.concatenate([batches.indices(iteration) for iteration in range(count)]).tolist()


def test_stream_passes_over_every_image_once_before_the_next_pass(images):
    passes = np.array(stream(Batches(images, 16), 10)).reshape(4, 40)
    assert (np.sort(passes, axis=1) == np.arange(40)).all()
    assert len({tuple(order) for order in passes.tolist()}) == 4


def test_the_order_of_a_pass_is_that_of_its_seed_and_number(images):
    batches = Batches(images, 16, seed=5)
    for epoch in (0, 1, 7, 6, 0):
        expected = random.permutation(np, 40, 5, random.SHUFFLE, epoch)
        assert batches.order(epoch).tolist() == expected.tolist()
    assert stream(batches, 5) == [*batches.order(0), *batches.order(1)]


@pytest.mark.parametrize("iteration", [7, 2, 10**6])
def test_stream_can_be_entered_anywhere(images, iteration):
    batches = Batches(images, 16)
    stream(batches, 10)
    assert (batches.indices(iteration) == Batches(images, 16).indices(iteration)).all()


def test_a_batch_may_be_all_images(images):
    assert sorted(Batches(images, 40).indices(3)) == list(range(40))


def test_seeds_shuffle_differently(images):
    assert stream(Batches(images, 16), 2) != stream(Batches(images, 16, seed=1), 2)


def test_a_part_of_the_images_has_their_labels_and_leaves_the_whole_as_it_was(images, dataset):
    part = images.part(slice(5, 9))
    x, t = part.batch(slice(None))
    assert len(part) == 4 and t.tolist() == dataset.train_y[5:9].tolist()
    np.testing.assert_array_equal(x, images.batch(slice(5, 9))[0])
    assert len(images) == len(images.x) == 40


def test_images_have_the_mean_subtracted_and_are_in_units_of_one(images, dataset):
    x, t = images.batch(np.arange(40))
    assert x.dtype == np.float32 and t.dtype == np.int32
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-6)
    expected = dataset.train_x[3] / 255.0 - dataset.train_x.mean(axis=0) / 255.0
    np.testing.assert_allclose(x[3], expected, atol=1e-6)


def test_a_batch_is_augmented_by_seed_and_iteration(images):
    x, t = Batches(images, 16, seed=3).batch(9)
    plain, labels = images.batch(Batches(images, 16, seed=3).indices(9))
    expected = augmentation.crop_and_flip(plain, *augmentation.draw(np, 3, 9, 16))
    np.testing.assert_array_equal(x, expected)
    np.testing.assert_array_equal(t, labels)
    assert (x != plain).any()


def test_a_share_of_a_batch_is_a_part_of_it(images):
    batches = Batches(images, 16)
    for whole, part in zip(batches.batch(2), batches.batch(2, slice(4, 8)), strict=True):
        np.testing.assert_array_equal(part, whole[4:8])
