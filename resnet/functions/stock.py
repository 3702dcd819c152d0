"""Chainer's own functions: the reference backend, on NumPy and on CuPy."""

from __future__ import annotations

import chainer.functions as F
from chainer import links as L
from chainer import optimizers
from chainer.optimizer_hooks import WeightDecay


def describe() -> str:
    return "chainer (Chainer's own functions)"


def convolution(x, W, stride: int = 1):
    return F.convolution_2d(x, W, stride=stride, pad=1)


def layer(x, W, bn: L.BatchNormalization, stride: int = 1, shortcut=None):
    y = bn(convolution(x, W, stride))
    return F.relu(y if shortcut is None else y + as_shortcut(shortcut, y))


def layers(x, layers, layer=layer):
    """One after the other, by a backend's ``layer``."""
    inputs = [x]
    for W, bn, stride, around in layers:
        shortcut = inputs[-around] if around else None
        inputs.append(layer(inputs[-1], W, bn, stride, shortcut))
    return inputs[-1]


def add_relu(x, shortcut):
    return F.relu(x + as_shortcut(shortcut, x))


def option_a(x, channels: int, stride: int):
    if stride > 1:
        x = x[:, :, ::stride, ::stride]
    missing = channels - x.shape[1]
    if missing:
        x = F.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)), "constant")
    return x


def as_shortcut(x, like):
    """A(x): ``x`` itself, or subsampled and padded to the shape of ``like`` (option A)."""
    return option_a(x, like.shape[1], -(-x.shape[2] // like.shape[2]))


def pool(x, side: int):
    return F.average_pooling_2d(x, side)


def average_pooling(x):
    return F.mean(x, axis=(2, 3))


def linear(x, W, b):
    return F.linear(x, W, b)


def softmax_cross_entropy(y, t):
    return F.softmax_cross_entropy(y, t)


def momentum_sgd(network, momentum: float, weight_decay: float):
    optimizer = optimizers.MomentumSGD(momentum=momentum).setup(network)
    optimizer.add_hook(WeightDecay(weight_decay))
    return optimizer
