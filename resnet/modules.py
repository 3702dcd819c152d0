"""The building units of the networks (report, Fig. 2 and 3a): two 3x3 convolutions."""

from __future__ import annotations

import chainer
import numpy as np
from chainer import links as L
from chainer.initializers import HeNormal

from resnet import functions
from resnet.functions import gated, option_a, relu

GATE_BIAS = -2.0  # below 0: at first a Highway module hands on most of its input


class Convolution(L.Convolution2D):
    """A 3x3 convolution, padding 1, He initialisation (He et al., ICCV 2015, eq. 10).

    Args:
        channels_in: Channels of the input.
        channels: Channels of the output.
        stride: 1, or 2, which halves the image.
        rng: Source of the initial weights.
        nobias: Whether it has no bias, as in front of a normalization.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        stride: int,
        rng: np.random.RandomState,
        nobias: bool = True,
    ) -> None:
        super().__init__(channels_in, channels, 3, stride, 1, nobias, HeNormal(rng=rng))

    def forward(self, x):
        """(N, channels_in, H, W) -> (N, channels, H / stride, W / stride)."""
        return functions.convolution(x, self.W, self.b, self.stride[0])


class Normalization(L.BatchNormalization):
    """Batch normalization with Chainer's epsilon 2e-5 and decay 0.9 (He et al. 2015, 3.4)."""

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)."""
        return functions.normalization(x, self)


class Module(chainer.Chain):
    """What every unit that a block has several of looks like from outside.

    Args:
        channels_in: Channels of the input.
        channels: Channels of the output.
        stride: 1, or 2, which halves the image.
        rng: Source of the initial weights.
    """

    def __init__(
        self, channels_in: int, channels: int, stride: int, rng: np.random.RandomState
    ) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x):
        """(N, channels_in, H, W) -> (N, channels, H / stride, W / stride)."""
        raise NotImplementedError


class PlainModule(Module):
    """Two convolutions, each followed by batch normalization and ReLU; no shortcut (Fig. 2a)."""

    def __init__(
        self, channels_in: int, channels: int, stride: int, rng: np.random.RandomState
    ) -> None:
        super().__init__(channels_in, channels, stride, rng)
        with self.init_scope():
            self.conv1 = Convolution(channels_in, channels, stride, rng)
            self.bn1 = Normalization(channels)
            self.conv2 = Convolution(channels, channels, 1, rng)
            self.bn2 = Normalization(channels)

    def residual(self, x):
        """F(x) of Fig. 2b, of the shape of the output."""
        h = relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(h))

    def forward(self, x):
        return relu(self.residual(x))


class ResidualModule(PlainModule):
    """The same two layers fit F(x); the output is ReLU(F(x) + x) (Fig. 2b, He et al. eq. 1).

    Where the shape changes, x is subsampled and padded with channels of zeros (option A).
    """

    def shortcut(self, x):
        """A(x), or x, of the shape of the output."""
        return option_a(x, self.channels, self.stride)

    def forward(self, x):
        return relu(self.residual(x) + self.shortcut(x))


class HighwayModule(PlainModule):
    """The same two layers compute H(x), and a gate T(x) how much of it is let through.

    The output is H(x) T(x) + x (1 - T(x)); T is the sigmoid of a 3x3 convolution (Srivastava et
    al., arXiv:1505.00387, eq. 3). The report's introduction names it as the forerunner of the
    residual module, which leaves out the gate and its weights.
    """

    def __init__(
        self, channels_in: int, channels: int, stride: int, rng: np.random.RandomState
    ) -> None:
        super().__init__(channels_in, channels, stride, rng)
        with self.init_scope():
            self.gate = Convolution(channels_in, channels, stride, rng, nobias=False)
        self.gate.b.array[...] = GATE_BIAS

    def forward(self, x):
        h = super().forward(x)
        return gated(h, option_a(x, self.channels, self.stride), self.gate(x))
