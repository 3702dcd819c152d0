"""Operations that wait: what is computed, when, and how often."""

import chainer
import numpy as np
import pytest
import torch
from chainer import links as L
from conftest import layer, normal
from torch.nn import functional as F

from resnet import functions
from resnet.blocks import Block
from resnet.modules import ResidualModule
from resnet.network import resnet

TOLERANCE = 1e-5  # of the largest value; the sums have up to 144 terms in float32


def assert_close(found, expected):
    found, expected = (chainer.cuda.to_cpu(each) for each in (found, expected))
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()


def make(backend, kind, *arguments):
    link = kind(*arguments, np.random.RandomState(0))
    link.to_device(backend)
    return link


def averages(link):
    return [each.avg_mean.copy() for each in link.links() if isinstance(each, L.BatchNormalization)]


def test_what_comes_out_of_a_module_is_a_variable_like_any_other(backend):
    x = chainer.Variable(backend.send(normal(2, 16, 8, 8)))
    y = make(backend, ResidualModule, 16, 32, 2)(x)
    assert isinstance(y, chainer.Variable) and y.shape == (2, 32, 4, 4)
    assert y.array.shape == y.shape and y.dtype == np.float32
    chainer.functions.sum(chainer.functions.sigmoid(y) * y).backward()
    assert x.grad.shape == x.shape


def test_a_look_at_what_lies_between_changes_nothing(backend):
    """Neither the result, nor a gradient, nor how often the running averages move."""
    found = []
    for look in (lambda hs: None, lambda hs: hs[1].array, lambda hs: [h.array for h in hs[::-1]]):
        block = make(backend, Block, 3, 16, 16, 1)
        x = chainer.Variable(backend.send(normal(4, 16, 8, 8)))
        hs = [x]
        for module in block:
            hs.append(module(hs[-1]))
        look(hs)
        y = hs[-1]
        block.cleargrads()
        y.grad = backend.send(normal(*y.shape, seed=1))
        y.backward()
        look(hs)
        gradients = [p.grad for _, p in sorted(block.namedparams())]
        found.append([y.array, x.grad, *gradients, *averages(block)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_close(b, a)


@pytest.mark.parametrize(
    "use",
    [
        lambda h: functions.relu(h) * chainer.functions.tanh(h),
        lambda h: functions.relu(h) - functions.relu(-1 * h),
        lambda h: functions.relu(h + h),
        lambda h: functions.relu(functions.relu(h) + h),
    ],
    ids=["gate", "both halves", "twice itself", "a layer and itself"],
)
def test_running_averages_move_once_however_often_a_normalization_is_used(backend, use):
    x, w = normal(4, 16, 8, 8), normal(16, 16, 3, 3, seed=1) / 9
    theirs = torch.nn.BatchNorm2d(16, momentum=0.1).double()
    convolved = F.conv2d(torch.tensor(x).double(), torch.tensor(w).double(), padding=1)
    theirs(convolved)
    bn = L.BatchNormalization(16)
    bn.to_device(backend)
    h = functions.convolution(backend.send(x), backend.send(w), stride=1)
    y = use(functions.normalization(h, bn))
    chainer.functions.sum(functions.finished(y)).backward()
    assert_close(bn.avg_mean, theirs.running_mean.numpy())
    assert_close(bn.avg_var, theirs.running_var.numpy())


def test_running_averages_move_once_though_forget_computes_twice(backend):
    """F.forget keeps nothing of a block, and computes it again on the way back."""
    x, found = backend.send(normal(4, 16, 8, 8)), []
    for compute in (lambda block, x: block(x), chainer.functions.forget):
        block = make(backend, Block, 2, 16, 16, 1)
        variable = chainer.Variable(x)
        chainer.functions.sum(compute(block, variable)).backward()
        found.append([variable.grad, *averages(block)])
    for a, b in zip(*found, strict=True):
        assert_close(b, a)


def test_what_is_finished_has_a_gradient_and_the_weights_of_before(backend):
    """As the library's page promises; of what nobody has looked at there is none."""
    net = make(backend, lambda *_: resnet(1))
    with chainer.using_config("train", False):
        h = functions.finished(net.conv3(net.conv2(net.conv1(backend.send(normal(2, 3, 32, 32))))))
        (found,) = chainer.grad([net.fc(net.conv4(h))[:, 3]], [h], [backend.xp.ones(2, "f")])
    assert found.shape == h.shape and abs(found.array).max() > 0
    before = h.array.copy()
    net.conv3[0].conv1.W.array *= 2
    assert_close(h.array, before)


@pytest.mark.parametrize("train", [True, False], ids=["train", "test"])
def test_it_is_computed_as_it_was_asked_for(backend, train):
    """Under the configuration of that moment, whenever somebody looks."""
    x = backend.send(normal(4, 16, 8, 8))
    found = []
    for early in (True, False):
        module = make(backend, ResidualModule, 16, 16, 1)
        with chainer.using_config("train", train), chainer.using_config("enable_backprop", train):
            y = module(x)
            if early:
                functions.finished(y)
        with chainer.using_config("train", not train):
            found.append([y.array, *averages(module)])
        assert (y.creator_node is not None) == train
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(chainer.cuda.to_cpu(a), chainer.cuda.to_cpu(b))
    assert any(mean.any() for mean in found[0][1:]) == train


def test_a_shortcut_may_come_from_anywhere(backend):
    """Not only from a layer of the same row."""
    x, other, w = normal(2, 16, 8, 8), normal(2, 16, 8, 8, seed=1), normal(16, 16, 3, 3, seed=2) / 9
    ours = [chainer.Variable(backend.send(a)) for a in (x, other, w)]
    theirs = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, other, w)]
    bn = L.BatchNormalization(16)
    bn.to_device(backend)
    branch = layer(ours[1], ours[2], bn)
    y = layer(layer(ours[0], ours[2], bn, shortcut=branch), ours[2], bn)

    def their_layer(x, shortcut=0):
        h = F.conv2d(x, theirs[2], padding=1)
        return F.relu(F.batch_norm(h, None, None, training=True, eps=bn.eps) + shortcut)

    expected = their_layer(their_layer(theirs[0], their_layer(theirs[1])))
    assert_close(y.array, expected.detach().numpy())
    chainer.functions.sum(y * y).backward()
    expected.square().sum().backward()
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our.grad, their.grad.numpy())


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("inside", [False, True], ids=["of an image", "of a layer"])
def test_a_shortcut_may_be_there_more_than_once(backend, times, inside):
    """As around a ResResNet's block of one module, where the module's is the block's."""
    x, w = normal(2, 16, 8, 8), normal(16, 16, 3, 3, seed=1) / 9
    ours = [chainer.Variable(backend.send(a)) for a in (x, w)]
    theirs = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, w)]
    bn = L.BatchNormalization(16)
    bn.to_device(backend)

    def their_layer(x, shortcut=0):
        h = F.conv2d(x, theirs[1], padding=1)
        return F.relu(F.batch_norm(h, None, None, training=True, eps=bn.eps) + shortcut)

    h, expected = layer(*ours, bn) if inside else ours[0], theirs[0]
    expected = their_layer(expected) if inside else expected
    y = functions.normalization(functions.convolution(h, ours[1]), bn)
    for _ in range(times):
        y = y + h
    y, expected = functions.relu(y), their_layer(expected, times * expected)
    assert_close(y.array, expected.detach().numpy())
    chainer.functions.sum(y * y).backward()
    expected.square().sum().backward()
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our.grad, their.grad.numpy())


@pytest.mark.parametrize("size", [(1, 9), (9, 1)], ids=["row", "column"])
def test_a_shortcut_of_images_of_one_row(backend, size):
    """Whose height, or width, does not tell the stride."""
    module, x = make(backend, ResidualModule, 16, 32, 2), normal(4, 16, *size)
    ours = [chainer.Variable(backend.send(x)), module.conv1.W, module.conv2.W]
    theirs = [
        torch.tensor(chainer.cuda.to_cpu(each.array), dtype=torch.float64, requires_grad=True)
        for each in ours
    ]
    module.cleargrads()
    y = module(ours[0])
    h, expected = theirs[0], F.pad(theirs[0][:, :, ::2, ::2], (0, 0, 0, 0, 0, 16))
    h = F.conv2d(h, theirs[1], stride=2, padding=1)
    h = F.relu(F.batch_norm(h, None, None, training=True, eps=module.bn1.eps))
    h = F.conv2d(h, theirs[2], padding=1)
    h = F.batch_norm(h, None, None, training=True, eps=module.bn2.eps)
    expected = F.relu(h + expected)
    assert_close(y.array, expected.detach().numpy())
    chainer.functions.sum(y * y).backward()
    expected.square().sum().backward()
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our.grad, their.grad.numpy())


def test_shapes_that_do_not_fit_are_refused(backend):
    """Where Chainer refuses them, before a kernel reads or writes behind the end of an array."""
    x, wide, w = normal(2, 16, 8, 8), normal(2, 32, 8, 8), normal(16, 16, 3, 3)
    x, wide, w = map(backend.send, (x, wide, w))
    wrong, right = L.BatchNormalization(32), L.BatchNormalization(16)
    for link in (wrong, right):
        link.to_device(backend)
    for compute in (
        lambda: functions.convolution(wide, w),
        lambda: functions.convolution(x[:, :3], w),
        lambda: functions.convolution(x[0], w),
        lambda: functions.relu(functions.normalization(functions.convolution(x, w), wrong)),
        lambda: layer(x, w, right, shortcut=wide),
        lambda: functions.gated(x, wide, x),
    ):
        with pytest.raises((chainer.utils.type_check.InvalidType, ValueError)):
            functions.finished(compute())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_by_itself(backend, stride, bias):
    x, w, b = normal(3, 16, 8, 8), normal(32, 16, 3, 3, seed=1), normal(32, seed=2)
    arrays = (x, w, b) if bias else (x, w)
    ours = [chainer.Variable(backend.send(a)) for a in arrays]
    theirs = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in arrays]
    y = functions.convolution(*ours, stride=stride)
    expected = F.conv2d(*theirs, stride=stride, padding=1)
    assert y.shape == expected.shape
    assert_close(y.array, expected.detach().numpy())
    chainer.functions.sum(y * y).backward()
    expected.square().sum().backward()
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our.grad, their.grad.numpy())


@pytest.mark.parametrize("frozen", [(), ("conv3",), ("conv2", "conv4")])
def test_a_network_is_what_its_groups_are_one_after_the_other(backend, frozen, monkeypatch):
    """Though layers of several groups are computed at once; a frozen one as at test time."""
    found, forward = [], Block.forward
    for groups_by_themselves in (False, True):
        if groups_by_themselves:
            monkeypatch.setattr(Block, "forward", lambda *a: functions.finished(forward(*a)))
        net = make(backend, lambda *_: resnet(1))
        net.freeze(frozen)
        y = net(backend.send(normal(4, 3, 32, 32)))
        net.cleargrads()
        y.grad = backend.send(normal(*y.shape, seed=1))
        y.backward()
        moved = [mean for mean in averages(net) if mean.any()]
        found.append([y.array, *(p.grad for _, p in sorted(net.namedparams())), *moved])
        assert any(mean.any() for mean in averages(net.conv3)) != ("conv3" in frozen)
    for a, b in zip(*found, strict=True):
        assert_close(a, b)
