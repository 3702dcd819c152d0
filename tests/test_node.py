"""Gradients of gradients, which the nodes of the compiled backends leave to Chainer."""

import chainer
import numpy as np
import pytest

from resnet import functions, network, synthetic


@pytest.mark.parametrize(
    "backend", [("onednn", "@numpy"), ("winograd", "@numpy")], indirect=True, ids="-".join
)
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
