"""Chainer's own functions, on NumPy and on CuPy: the reference, which other backends override."""

from __future__ import annotations

from collections.abc import Sequence

import chainer.functions as F
from chainer import links as L
from chainer import optimizers
from chainer.optimizer_hooks import WeightDecay

PAD = 1  # of every convolution: 3x3 keep the size


class Reference:
    """Every operation of the door, by Chainer; a faster backend overrides what it does faster."""

    def describe(self) -> str:
        """Say in one line what computes."""
        return "chainer (Chainer's own functions)"

    def first_start(self) -> str:
        """Say what the first step will have to wait for; '' if for nothing."""
        return ""

    def convolution(self, x, W, b=None, stride: int = 1):
        return F.convolution_2d(x, W, b, stride, PAD)

    def normalization(self, x, bn: L.BatchNormalization):
        return L.BatchNormalization.forward(bn, x)  # bn's own forward asks the door

    def relu(self, x):
        return F.relu(x)

    def gated(self, h, x, z):
        return x + F.sigmoid(z) * (h - x)

    def option_a(self, x, channels: int, stride: int):
        if stride > 1:
            x = x[:, :, ::stride, ::stride]
        missing = channels - x.shape[1]
        if missing:
            x = F.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)), "constant")
        return x

    def finished(self, x):
        return x

    def pool(self, x, side: int):
        return F.average_pooling_2d(x, side)

    def average_pooling(self, x):
        return F.mean(x, axis=(2, 3))

    def linear(self, x, W, b):
        return F.linear(x, W, b)

    def softmax_cross_entropy(self, y, t):
        return F.softmax_cross_entropy(y, t)

    def momentum_sgd(self, network, momentum: float, weight_decay: float):
        optimizer = optimizers.MomentumSGD(momentum=momentum).setup(network)
        optimizer.add_hook(WeightDecay(weight_decay))
        return optimizer

    def recorded_step(self, optimizer, batches, loss, correct):
        return None

    def recorded_evaluation(self, network, images, batchsize: int):
        return None


REFERENCE = Reference()


def widened(x, like):
    """A(x), option A, in the shape of ``like``."""
    return REFERENCE.option_a(x, like.shape[1], step(x.shape[2:], like.shape[2:]))


def step(size: Sequence[int], small: Sequence[int]) -> int:
    """Find by which step (height, width) was subsampled; one row stays one row by any."""
    return max(-(-length // short) for length, short in zip(size, small, strict=True))
