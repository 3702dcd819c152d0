"""Momentum SGD over one flat array stays Chainer's. Its steps: test_functions.py."""

import chainer
import numpy as np
import pytest

from resnet import functions, network


@pytest.mark.parametrize(
    "backend", [("onednn", "@numpy"), ("cuda", "@numpy")], indirect=True, ids="-".join
)
def test_the_optimizer_stays_chainers_whatever_happens_between_steps(backend, tmp_path):
    """Arrays are replaced, links frozen and thawed, the state is saved and loaded."""

    def trained(path):
        net = network.resnet(1)
        optimizer = functions.momentum_sgd(net, 0.9, 0.01)
        optimizer.lr = 0.1
        rng = np.random.RandomState(0)

        def step():
            for parameter in net.params():
                parameter.grad = rng.standard_normal(parameter.shape).astype("f")
            optimizer.update()

        step()
        net.fc.W.array = net.fc.W.array + 1
        step()
        net.fc.W.update_rule.state["v"] = np.zeros_like(net.fc.W.array)
        step()
        net.conv3.disable_update()
        step()
        chainer.serializers.save_npz(path, optimizer)
        step()
        net.conv3.enable_update()
        chainer.serializers.load_npz(path, optimizer)
        step()
        return {name: parameter.array for name, parameter in net.namedparams()}, optimizer.t

    ours, t = trained(tmp_path / "ours.npz")
    functions.use("chainer")
    expected, their_t = trained(tmp_path / "theirs.npz")
    assert t == their_t
    for name, array in expected.items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
