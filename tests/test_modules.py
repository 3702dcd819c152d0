"""Modules: what they hand on where a branch or a gate is silent. Whole ones: test_network.py."""

import chainer
import numpy as np
import pytest

from resnet.modules import HighwayModule, PlainModule, ResidualModule


@pytest.mark.parametrize(("channels", "stride"), [(16, 1), (32, 2)])
def test_residual_module_whose_branch_is_silent_hands_its_input_on(channels, stride):
    """With F = 0 it is ReLU(x); where the shape changes, of every second pixel, then zeros."""
    module = ResidualModule(16, channels, stride, np.random.RandomState(0))
    module.bn2.gamma.array[...] = 0
    x = np.random.RandomState(1).standard_normal((2, 16, 8, 8)).astype(np.float32)
    y = module(x).array
    np.testing.assert_array_equal(y[:, :16], np.maximum(x[:, :, ::stride, ::stride], 0))
    assert not y[:, 16:].any()
    without = PlainModule(16, channels, stride, np.random.RandomState(0))
    without.bn2.gamma.array[...] = 0
    assert not without(x).array.any()


@pytest.mark.parametrize(("channels", "stride"), [(16, 1), (32, 2)])
def test_highway_module_hands_on_its_input_where_its_gate_is_shut(backend, channels, stride):
    """And what its two layers compute where it is open."""
    x = backend.send(np.random.RandomState(1).standard_normal((2, 16, 8, 8)).astype(np.float32))
    module = HighwayModule(16, channels, stride, np.random.RandomState(0))
    plain_module = PlainModule(16, channels, stride, np.random.RandomState(0))
    for each in (module, plain_module):
        each.to_device(backend)
    module.gate.b.array[...] = -100
    y = chainer.cuda.to_cpu(module(x).array)
    np.testing.assert_array_equal(y[:, :16], chainer.cuda.to_cpu(x[:, :, ::stride, ::stride]))
    assert not y[:, 16:].any()
    module.gate.b.array[...] = 100
    y, expected = (chainer.cuda.to_cpu(each(x).array) for each in (module, plain_module))
    np.testing.assert_allclose(y, expected, atol=1e-5)
