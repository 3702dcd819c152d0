"""Gradients of gradients, which the nodes of the compiled backends leave to Chainer."""

import chainer
import numpy as np
import pytest
from conftest import normal

from resnet import functions, network, synthetic
from resnet.modules import ResidualModule

ON_CPU = pytest.mark.parametrize(
    "backend", [("onednn", "@numpy"), ("winograd", "@numpy")], indirect=True, ids="-".join
)


@ON_CPU
def test_gradients_of_gradients_are_chainers(backend):
    net = network.resnet(1)
    x = synthetic.make(8, 10)[0].astype("f") / 255
    weight = net.conv3[0].conv1.W

    def penalty():
        """The squared norm of the gradient, differentiated once more."""
        t = np.arange(8, dtype=np.int32)
        loss = chainer.functions.softmax_cross_entropy(net(x), t, enable_double_backprop=True)
        (g,) = chainer.grad([loss], [weight], enable_double_backprop=True)
        (gg,) = chainer.grad([chainer.functions.sum(g * g)], [weight])
        return gg.array

    ours = penalty()
    functions.use("chainer")
    expected = penalty()
    assert abs(expected).max() > 0
    np.testing.assert_allclose(ours, expected, rtol=1e-2, atol=1e-3 * abs(expected).max())


@ON_CPU
@pytest.mark.parametrize("looks", [False, True], ids=["at once", "layer by layer"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "test"])
def test_they_are_also_where_an_input_has_other_uses(backend, train, looks):
    """By the batch's statistics in training, at test time by the averages."""

    def penalty():
        x = chainer.Variable(normal(4, 16, 8, 8))
        module = ResidualModule(16, 16, 1, np.random.RandomState(0))
        with chainer.using_config("train", train):
            h = functions.relu(module.bn1(module.conv1(x)))
            h = functions.finished(h) if looks else h
            y = functions.relu(module.bn2(module.conv2(h)) + x)  # of which h is another function
            use = chainer.functions.sum(chainer.functions.tanh(y) * x)
            (g,) = chainer.grad([use], [x], enable_double_backprop=True)
            gg = chainer.grad([chainer.functions.sum(g * g)], [x, module.conv1.W])
        return [each.array for each in gg]

    ours = penalty()
    functions.use("chainer")
    for found, expected in zip(ours, penalty(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-3 * abs(expected).max())
