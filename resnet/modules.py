"""The building units of the networks (report, Fig. 2 and 3a): two 3x3 convolutions."""

from __future__ import annotations

import chainer
import numpy as np
from chainer import links as L
from chainer.initializers import HeNormal

from resnet import functions
from resnet.functions import option_a, relu


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


class PlainModule(chainer.Chain):
    """Two convolutions, each followed by batch normalization and ReLU; no shortcut (Fig. 2a).

    Args:
        channels_in: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first convolution; 2 halves the image.
        rng: Source of the initial weights.
    """

    def __init__(
        self, channels_in: int, channels: int, stride: int, rng: np.random.RandomState
    ) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride
        with self.init_scope():
            self.conv1 = Convolution(channels_in, channels, stride, rng)
            self.bn1 = Normalization(channels)
            self.conv2 = Convolution(channels, channels, 1, rng)
            self.bn2 = Normalization(channels)

    def residual(self, x):
        """F(x) of Fig. 2: (N, channels_in, H, W) -> (N, channels, H / stride, W / stride)."""
        h = relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(h))

    def forward(self, x):
        """(N, channels_in, H, W) -> (N, channels, H / stride, W / stride)."""
        return relu(self.residual(x))


class ResidualModule(PlainModule):
    """The same two layers fit F(x); the output is ReLU(F(x) + x) (Fig. 2b, He et al. eq. 1).

    Where the shape changes, x is subsampled and padded with channels of zeros (option A).
    """

    def forward(self, x):
        """(N, channels_in, H, W) -> (N, channels, H / stride, W / stride)."""
        return relu(self.residual(x) + option_a(x, self.channels, self.stride))
