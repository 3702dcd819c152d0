"""The embedded stand-in: the same images everywhere, balanced, and no game for a linear model."""

import hashlib

import numpy as np
import pytest

from resnet import cifar10, synthetic

SHA256 = "517657eba1c83599257499ce8e0fa0d31d6fe96c62f680100253a4be729b0050"  # of the default images


@pytest.fixture(scope="module")
def arrays():
    return synthetic.make()


def test_default_images_never_change(arrays):
    found = hashlib.sha256()
    for array in arrays:
        found.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    assert found.hexdigest() == SHA256


def test_has_the_shape_of_cifar10(arrays):
    train_x, train_y, test_x, test_y = arrays
    assert (train_x.shape, test_x.shape) == ((5000, 3, 32, 32), (1000, 3, 32, 32))
    assert (train_y.shape, test_y.shape) == ((5000,), (1000,))
    assert (train_x.dtype, test_x.dtype) == (np.uint8, np.uint8)
    assert (train_y.dtype, test_y.dtype) == (np.int32, np.int32)


def test_classes_are_balanced_and_shuffled(arrays):
    _, train_y, _, test_y = arrays
    assert len(synthetic.CLASSES) == 10
    assert (np.bincount(train_y) == 500).all()
    assert (np.bincount(test_y) == 100).all()
    assert len(set(train_y[:100])) == 10


def test_no_test_image_is_a_training_image(arrays):
    train_x, _, test_x, _ = arrays
    seen = {image.tobytes() for image in train_x}
    assert len(seen) == len(train_x)
    assert not seen & {image.tobytes() for image in test_x}


def test_seed_and_sizes_are_arguments():
    first, again, other = (synthetic.make(train=60, test=20, seed=seed) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first[0] != other[0]).any()
    assert len(first[0]) == 60
    assert len(first[2]) == 20


def test_images_are_neither_flat_nor_clipped(arrays):
    train_x = arrays[0]
    assert train_x.std(axis=(2, 3)).min() > 5
    assert ((train_x == 0) | (train_x == 255)).mean() < 0.02


def test_a_linear_model_stays_below_60_percent(arrays):
    train_x, train_y, _, test_y = arrays
    mean = cifar10.mean_image(train_x)
    x, z = ((images / np.float32(255) - mean).reshape(len(images), -1) for images in arrays[::2])
    gram = x.T @ x
    for ridge in (1, 100, 10_000):  # from nearly no regularization to a lot
        weights = np.linalg.solve(gram + ridge * np.eye(len(gram), dtype=np.float32),
                                  x.T @ np.eye(10, dtype=np.float32)[train_y])  # fmt: skip
        accuracy = ((z @ weights).argmax(axis=1) == test_y).mean()
        assert accuracy < 0.6


def test_load_gives_the_images_an_honest_name(arrays):
    dataset = cifar10.load("synthetic")
    assert dataset.name == "synthetic"
    assert dataset.source == "made from seed 2016"
    assert dataset.classes == synthetic.CLASSES
    assert (dataset.train_x == arrays[0]).all()
    assert (dataset.test_y == arrays[3]).all()
