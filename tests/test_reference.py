"""Chainer's own functions, which every backend falls back on. Their values: test_functions.py."""

import inspect

import numpy as np
import pytest

from resnet import functions
from resnet.backends.cpu.onednn import OneDNN
from resnet.backends.gpu.capture import Recorded
from resnet.backends.reference import Reference, widened

OPERATIONS = [name for name in vars(Reference) if not name.startswith("_") and name != "describe"]


@pytest.mark.parametrize("backend", [Reference, OneDNN, Recorded])
def test_every_operation_of_a_backend_takes_what_the_door_hands_on(backend):
    def parameters(function):
        found = inspect.signature(function).parameters.values()
        return [(each.name, each.default) for each in found]

    for name in OPERATIONS:
        _, *found = parameters(getattr(backend, name))
        assert found == parameters(getattr(functions, name)), name


@pytest.mark.parametrize("side", [5, 9, 10])
def test_a_shortcut_is_widened_to_the_shape_of_what_it_is_added_to(side):
    x = np.random.RandomState(0).rand(2, 3, side, side).astype(np.float32)
    assert widened(x, x) is x
    small = -(-side // 2)
    y = widened(x, np.empty((2, 5, small, small))).array
    np.testing.assert_array_equal(y[:, :3], x[:, :, ::2, ::2])
    assert y.shape == (2, 5, small, small) and not y[:, 3:].any()


@pytest.mark.parametrize("size", [(1, 9), (9, 1), (5, 8)])
def test_a_shortcut_is_widened_whatever_the_shape_of_an_image(size):
    x = np.random.RandomState(0).rand(2, 3, *size).astype(np.float32)
    small = [-(-length // 2) for length in size]
    y = widened(x, np.empty((2, 5, *small))).array
    np.testing.assert_array_equal(y[:, :3], x[:, :, ::2, ::2])
