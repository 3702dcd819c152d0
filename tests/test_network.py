"""Networks: their sizes, their first weights, and what they compute."""

from dataclasses import replace

import chainer
import numpy as np
import pytest
import torch
from chainer import links as L
from torch.nn import functional as F

from experiments.torch_network import TorchNetwork
from resnet import blocks, functions, modules
from resnet.export import state, torch_name
from resnet.modules import GATE_BIAS, ResidualModule
from resnet.network import (
    ARCHITECTURES,
    BLOCKS,
    DEPTHS,
    GROUPS,
    highway,
    plain,
    resnet,
    resresnet,
)


def random(*shape):
    return np.random.RandomState(1).standard_normal(shape).astype(np.float32)


REPORTS = ("plain", "resnet", "resresnet")  # the other architectures are not in the report


def weighted(link):
    return [each for each in link.links() if isinstance(each, L.Convolution2D | L.Linear)]


def count_by_hand(n):
    """3x3 convolutions without bias, gamma and beta of each, and the fully connected layer."""
    total = 9 * 3 * 16 + 2 * 16
    for channels_in, channels in ((16, 16), (16, 32), (32, 64)):
        total += 9 * channels_in * channels + (2 * n - 1) * 9 * channels**2 + 2 * n * 2 * channels
    return total + 64 * 10 + 10


@pytest.mark.parametrize("architecture", REPORTS)
@pytest.mark.parametrize(
    ("n", "parameters"), [(3, 269_722), (5, 464_154), (7, 658_586), (9, 853_018), (18, 1_727_962)]
)
def test_sizes_are_those_of_the_published_networks(architecture, n, parameters):
    """Option A adds none; option B would give 272,474 for 20 layers."""
    net = ARCHITECTURES[architecture](n)
    assert net.count_params() == parameters == count_by_hand(n)
    assert len(weighted(net)) == 6 * n + 2 == ARCHITECTURES[architecture].depth(n) == DEPTHS[n]


def test_the_network_of_1202_layers_has_19_4_million_parameters():
    """He et al. 2015, 4.2."""
    net = resnet(200)
    assert net.count_params() == 19_421_274 == count_by_hand(200)
    assert len(weighted(net)) == 1202


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_groups_have_the_shapes_of_table_1(architecture):
    net = ARCHITECTURES[architecture](2)
    assert tuple(child.name for child in net.children()) == GROUPS
    h = random(2, 3, 32, 32)
    shapes = {}
    for group in GROUPS[:-1]:
        h = net[group](h)
        shapes[group] = h.shape[1:]
    assert shapes == {
        "conv1": (16, 32, 32),
        "conv2": (16, 32, 32),
        "conv3": (32, 16, 16),
        "conv4": (64, 8, 8),
    }
    assert net(random(2, 3, 32, 32)).shape == (2, 10)
    gates = 2 * (architecture == "highway")
    assert [len(weighted(net[g])) for g in GROUPS] == [1, *[4 + gates] * 3, 1]


@pytest.mark.parametrize("n", [1, 3, 9])
def test_a_highway_network_has_a_gate_in_each_module_besides(n):
    """A 3x3 convolution with a bias; half as many weights again: 392,170 for 20 layers."""
    gates = (9 * 16 + 1) * 16 + (9 * 16 + 1) * 32 + (9 * 32 + 1) * 64
    gates += (n - 1) * sum((9 * channels + 1) * channels for channels in (16, 32, 64))
    assert highway(n).count_params() == count_by_hand(n) + gates
    assert (highway(n).conv3[0].gate.b.array == GATE_BIAS).all() and GATE_BIAS < 0


def test_only_the_last_layer_has_a_bias():
    biases = [link.b is not None for link in weighted(resnet(3))]
    assert biases == [False] * 19 + [True]


def test_other_numbers_of_classes():
    assert resnet(1, classes=100)(random(2, 3, 32, 32)).shape == (2, 100)


def test_first_weights_are_normal_with_variance_2_over_fan_in():
    """He et al., ICCV 2015, eq. 10; within 5 standard errors of both moments."""
    net = plain(3)
    normalized = []
    for link in weighted(net):
        w = link.W.array
        sigma = np.sqrt(2 / np.prod(w.shape[1:]))
        assert abs(w.mean()) < 5 * sigma / np.sqrt(w.size)
        assert abs(w.std() - sigma) < 5 * sigma / np.sqrt(2 * w.size)
        normalized.append(w.ravel() / sigma)
    normalized = np.concatenate(normalized)
    for bound, share in ((1, 0.31731), (2, 0.04550), (3, 0.00270)):  # beyond so many sigma
        error = 5 * np.sqrt(share / normalized.size)
        assert abs(np.mean(np.abs(normalized) > bound) - share) < error


def test_first_biases_and_normalizations_change_nothing():
    for name, parameter in resnet(1).namedparams():
        if not name.endswith("/W"):
            assert (parameter.array == (1 if name.endswith("gamma") else 0)).all(), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_seed_decides_the_first_weights(architecture):
    make = ARCHITECTURES[architecture]
    np.random.seed(1)
    first, other = state(make(2, seed=3)), state(make(2, seed=4))
    np.random.seed(2)  # the global generator has no say
    again = state(make(2, seed=3))
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name], err_msg=name)
        if name.endswith("/W"):
            assert not np.isclose(array, other[name]).all(), name


def test_seed_decides_those_of_links_without_a_generator_too():
    class Squeezing(ResidualModule):
        def __init__(self, channels_in, channels, stride, rng):
            super().__init__(channels_in, channels, stride, rng)
            with self.init_scope():
                self.squeeze = L.Linear(channels, channels)

    make = replace(ARCHITECTURES["resnet"], module=Squeezing)
    found = []
    for before, seed in ((1, 3), (2, 3), (2, 4)):
        np.random.seed(before)
        expected = np.random.RandomState(before).rand()
        net = make(1, seed)
        assert np.random.rand() == expected  # it is as it was before
        found.append([net[name][0].squeeze.W.array for name in BLOCKS])
    for first, again, other in zip(*found, strict=True):
        np.testing.assert_array_equal(first, again)
        assert not np.isclose(first, other).any()
    assert not np.isclose(found[0][0][:16, :16], found[0][1][:16, :16]).any()


def test_layers_begin_with_different_weights():
    corners = [link.W.array.ravel()[0] for link in weighted(resnet(3))]
    assert len(set(corners)) == len(corners)


def one_step(net, twin, device):
    """What a training step, and then a test, find in both networks: {name: (ours, theirs)}."""
    dtype = net.fc.W.dtype
    x, t = random(16, 3, 32, 32).astype(dtype), np.arange(16, dtype=np.int32) % 10
    y = net(device.send(x))
    loss = functions.softmax_cross_entropy(y, device.send(t))
    net.cleargrads()
    loss.backward()
    logits = twin(torch.tensor(x).double())
    expected = F.cross_entropy(logits, torch.tensor(t).long())
    expected.backward()
    pairs = {"logits": (y.array, logits), "loss": (loss.array, expected)}
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in net.namedparams():
        pairs[f"gradient of {name}"] = parameter.grad, gradients.pop(torch_name(name))
    assert not gradients  # each has its counterpart
    averages = twin.state_dict()
    for name, array in state(net).items():
        if "avg_" in name:
            pairs[name] = array, averages[torch_name(name)]
    twin.eval()
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        pairs["test logits"] = net(device.send(x)).array, twin(torch.tensor(x).double())
    return {
        name: (chainer.cuda.to_cpu(ours), theirs.detach().numpy())
        for name, (ours, theirs) in pairs.items()
    }


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_network_computes_what_pytorch_computes(architecture, n):
    """Logits, loss, gradients, running averages and test logits, in double precision."""
    with chainer.using_config("dtype", np.float64):
        net = ARCHITECTURES[architecture](n, seed=n)
    twin = TorchNetwork(architecture, n).double().load(net)
    for name, (ours, theirs) in one_step(net, twin, chainer.get_device("@numpy")).items():
        np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_backend_computes_a_network_as_pytorch_does(backend, architecture):
    """In single precision; a ReLU whose input rounds to the other side of 0 moves gradients.

    PyTorch's own in single and in double precision are up to 2 % apart.
    """
    net = ARCHITECTURES[architecture](2, seed=1)
    twin = TorchNetwork(architecture, 2).double().load(net)
    net.to_device(backend)
    for name, (ours, theirs) in one_step(net, twin, backend).items():
        assert ours.dtype == np.float32
        bound = 0.05 if "gradient" in name else 1e-4
        assert np.linalg.norm(ours - theirs) < bound * np.linalg.norm(theirs), name


def test_residual_networks_are_the_plain_one_plus_shortcuts_without_parameters():
    expected = state(plain(2, seed=5))
    for make in (resnet, resresnet):
        found = state(make(2, seed=5))
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)


def without_shortcuts(monkeypatch, place):
    """Replace A(x) by zeros in a room of the package; returns the list of shapes it then had."""
    cut = []

    def zeros(x, channels, stride):
        n, _, height, width = x.shape
        shape = n, channels, height // stride, width // stride
        cut.append(shape)
        return chainer.Variable(chainer.backend.get_array_module(x).zeros(shape, np.float32))

    monkeypatch.setattr(place, "option_a", zeros)
    return cut


def test_resnet_without_its_shortcuts_is_the_plain_network(backend, monkeypatch):
    x = backend.send(random(4, 3, 32, 32))
    nets = plain(2), resnet(2)
    for net in nets:
        net.to_device(backend)
    y, with_shortcuts = (net(x).array for net in nets)
    assert abs(y - with_shortcuts).max() > 0.1
    cut = without_shortcuts(monkeypatch, modules)
    assert abs(nets[1](x).array - y).max() < 1e-5 * abs(y).max()
    assert [shape[1] for shape in cut] == [16, 16, 32, 32, 64, 64]


@pytest.mark.parametrize("architecture", ["resresnet", "resresnet_twice"])
def test_resresnet_without_its_three_shortcuts_is_the_resnet(architecture, backend, monkeypatch):
    x = backend.send(random(4, 3, 32, 32))
    nets = resnet(2), ARCHITECTURES[architecture](2)
    for net in nets:
        net.to_device(backend)
    y, with_shortcuts = (net(x).array for net in nets)
    assert abs(y - with_shortcuts).max() > 0.1
    cut = without_shortcuts(monkeypatch, blocks)
    assert abs(nets[1](x).array - y).max() < 1e-5 * abs(y).max()
    assert cut == [(4, 16, 32, 32), (4, 32, 16, 16), (4, 64, 8, 8)]


@pytest.mark.parametrize(
    "arguments, found",
    [
        ({"n": 0}, "n: found 0, legal: whole numbers from 1 up"),
        ({"n": 1.5}, "n: found 1.5, legal"),
        ({"n": 1, "seed": -1}, "seed: found -1, legal: whole numbers from 0 up"),
        ({"n": 1, "classes": 0}, "classes: found 0, legal"),
        ({"n": 1, "present": ("conv9",)}, "present: found conv9, legal: a list of conv1, conv2"),
        ({"n": 1, "present": "conv2"}, "present: found conv2, legal: a list of"),
    ],
)
def test_a_network_that_does_not_exist_is_refused_in_one_line(arguments, found):
    with pytest.raises(ValueError, match=f"^{found}") as error:
        resnet(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("names", ["conv2", ["conv2", "conv9"]])
def test_a_group_that_does_not_exist_cannot_be_frozen(names):
    net = resnet(1)
    with pytest.raises(ValueError, match=r"^freeze: found conv2.*, legal: a list of conv1, conv2"):
        net.freeze(names)
    assert not net.frozen
