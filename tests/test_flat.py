"""Momentum SGD over one flat array stays Chainer's. Its steps: test_functions.py."""

import chainer
import numpy as np
import pytest

from resnet import functions, network

COMPILED = pytest.mark.parametrize(
    "backend", [("onednn", "@numpy"), ("cuda", "@numpy")], indirect=True, ids="-".join
)


@COMPILED
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


@COMPILED
def test_hooks_and_a_loss_function_are_called_as_chainer_does(backend):
    def trained():
        net = network.resnet(1)
        optimizer = functions.momentum_sgd(net, 0.9, 0.0)
        optimizer.lr = 0.1

        def halve(_):
            net.fc.W.array[...] *= 0.5

        optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(0.5))
        optimizer.add_hook(halve, "halve", timing="post")
        for _ in range(2):  # of a loss that the other parameters have no part in
            optimizer.update(lambda c: chainer.functions.sum(net.fc.W**2) * c, 3)
        return {name: parameter.array for name, parameter in net.namedparams()}

    ours = trained()
    functions.use("chainer")
    for name, array in trained().items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-5, atol=1e-7, err_msg=name)
