"""The building units of the networks (report, Fig. 2 and 3a): two 3x3 convolutions."""

from __future__ import annotations

import chainer
import numpy as np
from chainer import links as L
from chainer.initializers import HeNormal

from resnet import functions
from resnet.functions import Layer


def convolution(channels_in: int, channels: int, rng: np.random.RandomState) -> L.Convolution2D:
    """A 3x3 convolution without bias, He initialisation (He et al., ICCV 2015, eq. 10)."""
    return L.Convolution2D(
        channels_in, channels, ksize=3, pad=1, nobias=True, initialW=HeNormal(rng=rng)
    )


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
        self.stride = stride
        with self.init_scope():
            self.conv1 = convolution(channels_in, channels, rng)
            self.bn1 = L.BatchNormalization(channels)
            self.conv2 = convolution(channels, channels, rng)
            self.bn2 = L.BatchNormalization(channels)

    @property
    def layers(self) -> tuple[Layer, Layer]:
        return Layer(self.conv1.W, self.bn1, self.stride), Layer(self.conv2.W, self.bn2)

    def forward(self, x):
        """(N, channels_in, H, W) -> (N, channels, H / stride, W / stride)."""
        return functions.layers(x, self.layers)


class ResidualModule(PlainModule):
    """The same two layers fit F(x); the output is ReLU(F(x) + x) (Fig. 2b, He et al. eq. 1).

    Where the shape changes, x is subsampled and padded with channels of zeros (option A).
    """

    @property
    def layers(self) -> tuple[Layer, Layer]:
        first, second = super().layers
        return first, second._replace(around=2)
