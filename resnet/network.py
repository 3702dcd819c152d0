"""The networks of the report: conv1, three blocks, average pooling, fc (Fig. 4, Table I)."""

from __future__ import annotations

import chainer
import numpy as np
from chainer import links as L
from chainer.initializers import HeNormal

from resnet import functions
from resnet.blocks import Block, ResidualBlock
from resnet.modules import PlainModule, ResidualModule, convolution

CHANNELS = (16, 32, 64)  # of conv2, conv3, conv4 (report, Table I)
GROUPS = ("conv1", "conv2", "conv3", "conv4", "fc")  # Table I, in the order of the forward pass
DEPTHS = {3: 20, 5: 32, 7: 44, 9: 56, 18: 110}  # n -> layers, the report's five depths


def layers(n: int) -> int:
    """Number of weighted layers of a network with ``n`` modules per block: 6n + 2."""
    return 6 * n + 2


class Stem(chainer.Chain):
    """The first layer, group conv1 of Table I: 3x3 convolution, batch normalization, ReLU."""

    def __init__(self, channels: int, rng: np.random.RandomState) -> None:
        super().__init__()
        with self.init_scope():
            self.conv = convolution(3, channels, rng)
            self.bn = L.BatchNormalization(channels)

    def forward(self, x):
        """(N, 3, 32, 32) -> (N, channels, 32, 32)."""
        return functions.normalize(functions.convolution(x, self.conv.W), self.bn)


class Network(chainer.Chain):
    """A network of 6n + 2 layers for images of 32 x 32 pixels.

    Args:
        n: Modules per block.
        seed: Seed of the initial weights: the same seed, the same weights, on any device.
        module: Class of the modules.
        block: Class of the blocks.
        classes: Number of classes.
    """

    def __init__(
        self,
        n: int,
        seed: int = 0,
        module: type[chainer.Chain] = ResidualModule,
        block: type[Block] = Block,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.n = n
        rng = np.random.RandomState(seed)
        first, second, third = CHANNELS
        with self.init_scope():
            self.conv1 = Stem(first, rng)
            self.conv2 = block(n, first, first, 1, rng, module)
            self.conv3 = block(n, first, second, 2, rng, module)
            self.conv4 = block(n, second, third, 2, rng, module)
            self.fc = L.Linear(third, classes, initialW=HeNormal(rng=rng))

    def forward(self, x):
        """Logits of a batch of images: (N, 3, 32, 32) float32 -> (N, classes)."""
        h = self.conv4(self.conv3(self.conv2(self.conv1(x))))
        return functions.linear(functions.average_pooling(h), self.fc.W, self.fc.b)


def plain(n: int, seed: int = 0) -> Network:
    """The plain network of 6n + 2 layers (report, Fig. 1 and 2a)."""
    return Network(n, seed, module=PlainModule)


def resnet(n: int, seed: int = 0) -> Network:
    """The residual network of 6n + 2 layers (report, II)."""
    return Network(n, seed)


def resresnet(n: int, seed: int = 0) -> Network:
    """The residual of residual network of 6n + 2 layers (report, III.A)."""
    return Network(n, seed, block=ResidualBlock)


ARCHITECTURES = {"plain": plain, "resnet": resnet, "resresnet": resresnet}
