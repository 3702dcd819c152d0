"""Blocks: the shortcut around one, and what stands for one that is absent."""

import chainer
import numpy as np
import pytest

from resnet import functions
from resnet.blocks import AbsentBlock, Block, ResidualBlock, TwiceRectifiedBlock


def pair(kind, n, stride):
    """The block with its shortcut and the one without, with the same weights, and A(x) of an x."""
    x = np.random.RandomState(1).rand(2, 8, 8, 8).astype(np.float32)  # as if it came from a ReLU
    channels = 8 * stride
    block, without = (
        each(n, 8, channels, stride, np.random.RandomState(0)) for each in (kind, Block)
    )
    assert len(block) == len(without) == n
    assert [module.stride for module in block] == [stride, *[1] * (n - 1)]
    return block, without, x, functions.option_a(chainer.Variable(x), channels, stride).array


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("n", [1, 3])
def test_residual_block_adds_its_input_to_the_last_sum(n, stride):
    block, without, x, shortcut = pair(ResidualBlock, n, stride)
    h = chainer.Variable(x)
    for module in list(without)[:-1]:
        h = module(h)
    last = without[n - 1]
    expected = np.maximum(last.residual(h).array + last.shortcut(h).array + shortcut, 0)
    np.testing.assert_allclose(block(x).array, expected, atol=1e-5)
    assert (expected < shortcut).any()  # it can take away from its input


@pytest.mark.parametrize("stride", [1, 2])
def test_twice_rectified_block_adds_its_input_to_what_the_block_gives(stride):
    block, without, x, shortcut = pair(TwiceRectifiedBlock, 3, stride)
    expected = np.maximum(without(x).array + shortcut, 0)
    np.testing.assert_allclose(block(x).array, expected, atol=1e-6)


@pytest.mark.parametrize("channels_in, channels, stride", [(16, 16, 1), (16, 32, 2), (32, 64, 2)])
def test_a_stand_in_averages_squares_and_appends_zeros(channels_in, channels, stride):
    x = np.random.RandomState(0).rand(2, channels_in, 8, 8).astype("f")
    block = AbsentBlock(channels_in, channels, stride)
    assert block.count_params() == 0
    y = block(chainer.Variable(x)).array
    assert y.shape == (2, channels, 8 // stride, 8 // stride)
    assert not y[:, channels_in:].any()
    for i in range(8 // stride):
        for j in range(8 // stride):
            square = x[:, :, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride]
            np.testing.assert_allclose(y[:, :channels_in, i, j], square.mean((2, 3)), rtol=1e-5)
