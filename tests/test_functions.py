"""Every function of the door, on every backend, against PyTorch in double precision.

PyTorch's own rounding then plays no part. The float32 results may be off by 1e-5 of the largest
value of their channel: a sum of 4096 terms, the longest here, rounds to about 64 * 6e-8 = 4e-6.
"""

import chainer
import numpy as np
import pytest
import torch
from chainer import links as L
from conftest import layer
from torch.nn import functional as F

from resnet import functions, network
from resnet.backends.cpu import onednn, vectors
from resnet.torch_module import EPS, option_a

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def seed():
    np.random.seed(0)


def random(*shape):
    return np.random.standard_normal(shape).astype(np.float32)


def images(*shape, channels_last=False):
    """Random images; ``channels_last`` is how augmentation and oneDNN lay them out in memory."""
    x = random(*shape)
    return x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2) if channels_last else x


def assert_close(actual, expected, tolerance=TOLERANCE):
    actual, expected = chainer.cuda.to_cpu(actual), expected.detach().numpy()
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    others = (0, 2, 3) if expected.ndim == 4 else None
    scale = np.abs(expected).max(axis=others, keepdims=True) + 1e-12
    assert (np.abs(actual - expected) / scale).max() < tolerance


def compare(backend, ours, theirs, *arrays):
    """Value and gradients of ``ours(*variables)`` are those of ``theirs(*tensors)``."""
    variables = [chainer.Variable(backend.send(array)) for array in arrays]
    tensors = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in arrays]
    y, expected = ours(*variables), theirs(*tensors)
    assert_close(y.array, expected)
    gradient = random(*y.shape)
    y.grad = backend.send(gradient)
    y.backward()
    expected.backward(torch.tensor(gradient, dtype=torch.float64))
    for variable, tensor in zip(variables, tensors, strict=True):
        assert_close(variable.grad, tensor.grad)


def make_normalization(backend, channels):
    """A link in the middle of a training: nothing of it is 0 or 1."""
    bn = L.BatchNormalization(channels)
    bn.gamma.array[...] = 1 + random(channels) / 2
    bn.beta.array[...] = random(channels) / 2
    bn.avg_mean[...] = random(channels) / 100
    bn.avg_var[...] = np.logspace(-5, 1, channels)
    bn.to_device(backend)
    bn.cleargrads()
    return bn


def make_weights(channels, channels_in):
    """Filters whose outputs have variances from below to far above ``EPS``."""
    size = np.logspace(-3, 0, channels, dtype=np.float32)[:, None, None, None]
    return random(channels, channels_in, 3, 3) * size


def their_normalization(bn):
    """The link's running averages, and its parameters, as tensors in double precision."""
    averages = [torch.tensor(chainer.cuda.to_cpu(a)).double() for a in (bn.avg_mean, bn.avg_var)]
    parameters = [
        torch.tensor(chainer.cuda.to_cpu(p.array), dtype=torch.float64, requires_grad=True)
        for p in (bn.gamma, bn.beta)
    ]
    return averages, parameters


CHAINS = [  # input; of each layer: channels, stride, around how many layers its shortcut goes
    ((4, 3, 32, 32), [(16, 1, 0)]),
    ((4, 16, 32, 32), [(16, 1, 1)]),
    ((4, 16, 32, 32), [(32, 2, 1)]),
    ((7, 16, 32, 32), [(16, 1, 0), (16, 1, 2)]),
    ((4, 16, 32, 32), [(32, 2, 0), (32, 1, 2)]),
    ((2, 32, 16, 16), [(64, 2, 0), (64, 1, 2), (64, 1, 0), (64, 1, 2)]),
    ((5, 64, 8, 8), [(64, 1, 0), (64, 1, 0), (64, 1, 0)]),
    ((1, 64, 8, 8), [(64, 1, 0), (64, 1, 2)]),
    ((3, 64, 4, 4), [(64, 1, 0), (64, 1, 2)]),
    ((3, 32, 12, 12), [(32, 1, 0), (32, 1, 2)]),
    ((3, 5, 7, 9), [(6, 1, 0), (6, 2, 2)]),
    ((3, 8, 9, 9), [(8, 1, 1), (8, 1, 2), (8, 1, 0), (8, 1, 4)]),
]


def make_chain(backend, shape, layers):
    """Layers for the door, and the same for PyTorch in double precision."""
    ours, theirs, channels_in = [], [], shape[1]
    for channels, stride, around in layers:
        bn = make_normalization(backend, channels)
        w = make_weights(channels, channels_in)
        weights = chainer.Parameter(backend.send(w))
        weights.cleargrad()
        ours.append((weights, bn, stride, around))
        tensor = torch.tensor(w, dtype=torch.float64, requires_grad=True)
        theirs.append((tensor, *their_normalization(bn), stride, around))
        channels_in = channels
    return ours, theirs


def run_ours(x, layers):
    inputs = [chainer.as_variable(x)]
    for w, bn, stride, around in layers:
        inputs.append(layer(inputs[-1], w, bn, stride, inputs[-around] if around else None))
    return inputs[-1]


def run_theirs(x, layers, train):
    inputs = [x]
    for w, averages, parameters, stride, around in layers:
        h = F.conv2d(inputs[-1], w, stride=stride, padding=1)
        h = F.batch_norm(h, *averages, *parameters, training=train, momentum=0.1, eps=EPS)
        inputs.append(F.relu(h + option_a(inputs[-around], h) if around else h))
    return inputs[-1]


@pytest.mark.parametrize("train", [True, False], ids=["train", "test"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "layers"), CHAINS)
def test_layers(backend, shape, layers, channels_last, train):
    ours, theirs = make_chain(backend, shape, layers)
    with chainer.using_config("train", train):
        compare(
            backend,
            lambda x: run_ours(x, ours),
            lambda x: run_theirs(x, theirs, train),
            images(*shape, channels_last=channels_last),
        )
    for (W, bn, *_), (w, (mean, var), (gamma, beta), *_) in zip(ours, theirs, strict=True):
        assert_close(W.grad, w.grad)
        assert_close(bn.gamma.grad, gamma.grad)
        assert_close(bn.beta.grad, beta.grad)
        assert_close(bn.avg_mean, mean)  # torch updates them in place, in training only
        assert_close(bn.avg_var, var)


@pytest.mark.parametrize(("shape", "layers"), CHAINS)
def test_layers_without_gradients_at_test_time(backend, shape, layers):
    """How a trained network is evaluated."""
    ours, theirs = make_chain(backend, shape, layers)
    x = images(*shape)
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        y = run_ours(backend.send(x), ours)
    assert_close(y.array, run_theirs(torch.tensor(x).double(), theirs, train=False))


def test_one_variable_on_every_way_through_two_layers(backend):
    """Its gradients add up: as input and shortcut, and of both layers that it enters."""
    x, w = random(2, 8, 8, 8), random(8, 8, 3, 3) / 8
    variable, weights = (chainer.Variable(backend.send(a)) for a in (x, w))
    bn = L.BatchNormalization(8)
    bn.to_device(backend)
    y = layer(variable, weights, bn, shortcut=variable)
    y = layer(y, weights, bn, shortcut=variable)
    y = functions.relu(y + variable)
    y = layer(y, weights, bn, shortcut=y)
    chainer.functions.sum(y * y).backward()
    tensor, filters = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, w))

    def theirs(h, shortcut):
        y = F.batch_norm(F.conv2d(h, filters, padding=1), None, None, training=True, eps=EPS)
        return F.relu(y + shortcut)

    h = theirs(theirs(tensor, tensor), tensor)
    h = F.relu(h + tensor)
    theirs(h, h).square().sum().backward()
    assert_close(variable.grad, tensor.grad)
    assert_close(weights.grad, filters.grad)


def test_running_averages_follow_torch_with_the_unbiased_variance(backend):
    bn = L.BatchNormalization(8)
    bn.to_device(backend)
    theirs = torch.nn.BatchNorm2d(8, eps=EPS, momentum=0.1).double()
    w = make_weights(8, 4)
    for batch in range(3):
        x = random(2, 4, 3, 3 + batch)  # 18 values: the variances differ by 1 in 17
        functions.finished(layer(backend.send(x), backend.send(w), bn))
        theirs(F.conv2d(torch.tensor(x).double(), torch.tensor(w).double(), padding=1))
    assert_close(bn.avg_mean, theirs.running_mean)
    assert_close(bn.avg_var, theirs.running_var)


@pytest.mark.parametrize("shortcut", [(6, 8, 9, 9), (6, 4, 18, 18)], ids=["identity", "option A"])
def test_the_shortcut_round_a_block(backend, shortcut):
    """The sum of two activations, rectified (report, Fig. 7)."""

    def ours(x, added):
        step = added.shape[2] // x.shape[2]
        return functions.relu(x + functions.option_a(added, x.shape[1], step))

    compare(
        backend,
        ours,
        lambda x, added: F.relu(x + option_a(added, x)),
        random(6, 8, 9, 9),
        random(*shortcut),
    )


@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (8, 1), (4, 2), (8, 2)])
def test_option_a_subsamples_and_appends_channels_of_zeros(backend, channels, stride):
    x = random(2, 4, 6, 6)
    y = chainer.as_variable(functions.option_a(backend.send(x), channels, stride)).array
    y = chainer.cuda.to_cpu(y)
    np.testing.assert_array_equal(y[:, :4], x[:, :, ::stride, ::stride])
    assert y.shape[1] == channels and not y[:, 4:].any()
    compare(
        backend,
        lambda x: functions.option_a(x, channels, stride) * 1,
        lambda x: option_a(x, torch.empty(2, channels, 6 // stride, 6 // stride)),
        x,
    )


def test_average_pooling(backend):
    x = images(5, 64, 8, 8, channels_last=True)
    compare(backend, functions.average_pooling, lambda x: F.adaptive_avg_pool2d(x, 1)[..., 0, 0], x)


def test_linear(backend):
    compare(backend, functions.linear, F.linear, random(5, 64), random(10, 64), random(10))


@pytest.mark.parametrize("scale", [1, 40])
def test_softmax_cross_entropy(backend, scale):
    """The mean over the batch; logits above 88 overflow an exponential in float32."""
    labels = np.arange(12, dtype=np.int32) % 10
    compare(
        backend,
        lambda y: functions.softmax_cross_entropy(y, backend.send(labels)),
        lambda y: F.cross_entropy(y, torch.tensor(labels).long()),
        scale * random(12, 10),
    )


def optimize(backend, rates, take_step):
    """The door's optimizer does what ``take_step(weights, gradients, rate)`` does to weights."""
    net = network.resnet(1)
    net.to_device(backend)
    optimizer = functions.momentum_sgd(net, 0.9, 0.01)
    parameters = dict(net.namedparams())
    weights = {k: chainer.cuda.to_cpu(p.array).astype(np.float64) for k, p in parameters.items()}
    for rate in rates:
        gradients = {name: random(*parameter.shape) for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.grad = backend.send(gradients[name].copy())  # is changed in place
        optimizer.lr = rate
        optimizer.update()
        take_step(weights, gradients, rate)
        for name, parameter in parameters.items():
            assert_close(parameter.array, torch.tensor(weights[name]))


def test_momentum_sgd_equals_torch_at_a_constant_rate(backend):
    tensors, sgd = {}, None

    def take_step(weights, gradients, rate):
        nonlocal sgd
        if sgd is None:
            tensors.update({name: torch.tensor(w) for name, w in weights.items()})
            sgd = torch.optim.SGD(tensors.values(), rate, momentum=0.9, weight_decay=0.01)
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradients[name], dtype=torch.float64)
        sgd.step()
        weights.update({name: tensor.numpy() for name, tensor in tensors.items()})

    optimize(backend, [0.1] * 6, take_step)


def test_momentum_sgd_keeps_its_velocity_when_the_rate_drops(backend):
    """v carries the rate it was made with (He et al.); torch's is rescaled by a drop."""
    velocity = {}

    def take_step(weights, gradients, rate):
        for name, w in weights.items():
            g = gradients[name] + 0.01 * w
            velocity[name] = 0.9 * velocity.get(name, 0) - rate * g
            weights[name] = w + velocity[name]

    optimize(backend, [0.1, 0.1, 0.1, 0.01, 0.01, 0.001], take_step)


def test_weight_decay_reaches_every_parameter(backend):
    """Without gradients everything shrinks alike: convolutions, gamma, beta and bias."""
    net = network.resnet(1)
    for parameter in net.params():
        parameter.array[...] = 1
    net.to_device(backend)
    optimizer = functions.momentum_sgd(net, 0.9, 1e-4)
    for parameter in net.params():
        parameter.grad = backend.xp.zeros(parameter.shape, np.float32)
    optimizer.lr = 0.1
    optimizer.update()
    for name, parameter in net.namedparams():
        expected = np.full(parameter.shape, np.float32(1 - 0.1 * 1e-4))
        np.testing.assert_array_equal(chainer.cuda.to_cpu(parameter.array), expected, name)


def test_auto_takes_the_fastest_backend_that_can_run(monkeypatch):
    monkeypatch.setattr(onednn, "available", lambda **_: (True, "oneDNN 3"))
    monkeypatch.setattr(vectors, "name", lambda: "AVX2")
    assert functions.use("auto") == "winograd (F(4x4, 3x3) with AVX2, oneDNN 3)"
    assert functions.use("onednn") == "onednn (oneDNN 3)"
    assert functions.use("chainer").startswith("chainer")
    monkeypatch.setattr(vectors, "name", lambda: "")
    assert functions.use("auto") == "onednn (oneDNN 3; without Winograd's convolution: no AVX2)"
    monkeypatch.setattr(onednn, "available", lambda **_: (False, "Numba is missing"))
    line = functions.use("auto")
    assert line.startswith("chainer") and "Numba is missing" in line
    with pytest.raises(ValueError, match="Numba is missing"):
        functions.use("onednn")
