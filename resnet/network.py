"""The networks of the report: conv1, three blocks, average pooling, fc (Fig. 4, Table I)."""

from __future__ import annotations

from collections.abc import Collection

import chainer
import numpy as np
from chainer import links as L
from chainer.initializers import HeNormal

from resnet import functions
from resnet.blocks import AbsentBlock, Block, ResidualBlock
from resnet.modules import Convolution, Normalization, PlainModule, ResidualModule

CHANNELS = (16, 32, 64)  # of conv2, conv3, conv4 (report, Table I)
BLOCKS = ("conv2", "conv3", "conv4")  # Table I, in the order of the forward pass
GROUPS = ("conv1", *BLOCKS, "fc")
DEPTHS = {3: 20, 5: 32, 7: 44, 9: 56, 18: 110}  # n -> layers, the report's five depths


def layers(n: int) -> int:
    """Number of weighted layers of a network with ``n`` modules per block: 6n + 2."""
    return 6 * n + 2


class Stem(chainer.Chain):
    """The first layer, group conv1 of Table I: 3x3 convolution, batch normalization, ReLU."""

    def __init__(self, channels: int, rng: np.random.RandomState) -> None:
        super().__init__()
        with self.init_scope():
            self.conv = Convolution(3, channels, 1, rng)
            self.bn = Normalization(channels)

    def forward(self, x):
        """(N, 3, 32, 32) -> (N, channels, 32, 32)."""
        return functions.relu(self.bn(self.conv(x)))


class Network(chainer.Chain):
    """A network of 6n + 2 layers for images of 32 x 32 pixels.

    Args:
        n: Modules per block.
        seed: Seed of the initial weights: the same seed, the same weights of every group, on any
            device and whichever blocks are present.
        module: Class of the modules.
        block: Class of the blocks.
        present: The blocks that are there; a stand-in without parameters takes the place of
            each other one (report, III.B).
        classes: Number of classes.

    Attributes:
        frozen: Names of the blocks that are held still: they compute as at test time, and their
            weights and statistics do not change (see ``freeze``).
    """

    def __init__(
        self,
        n: int,
        seed: int = 0,
        module: type[chainer.Chain] = ResidualModule,
        block: type[Block] = Block,
        present: Collection[str] = BLOCKS,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.n = n
        self.frozen: frozenset[str] = frozenset()
        first, second, third = CHANNELS
        shapes = ((first, first, 1), (first, second, 2), (second, third, 2))
        rngs = [np.random.RandomState([seed, i]) for i in range(len(GROUPS))]
        with self.init_scope():
            self.conv1 = Stem(first, rngs[0])
            for name, shape, rng in zip(BLOCKS, shapes, rngs[1:], strict=False):
                here = name in present
                setattr(self, name, block(n, *shape, rng, module) if here else AbsentBlock(*shape))
            self.fc = L.Linear(third, classes, initialW=HeNormal(rng=rngs[-1]))

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of Table I that are present."""
        return tuple(name for name in GROUPS if not isinstance(self[name], AbsentBlock))

    def freeze(self, names: Collection[str]) -> None:
        """Hold the blocks ``names`` still from here on; call it once the optimizer is set up."""
        self.frozen = frozenset(names)
        for name in names:
            self[name].disable_update()

    def forward(self, x):
        """Logits of a batch of images: (N, 3, 32, 32) float32 -> (N, classes)."""
        h = x
        for name in GROUPS[:-1]:
            with chainer.using_config("train", chainer.config.train and name not in self.frozen):
                h = functions.finished(self[name](h))
        return functions.linear(functions.average_pooling(h), self.fc.W, self.fc.b)


def plain(n: int, seed: int = 0, present: Collection[str] = BLOCKS) -> Network:
    """The plain network of 6n + 2 layers (report, Fig. 1 and 2a)."""
    return Network(n, seed, module=PlainModule, present=present)


def resnet(n: int, seed: int = 0, present: Collection[str] = BLOCKS) -> Network:
    """The residual network of 6n + 2 layers (report, II)."""
    return Network(n, seed, present=present)


def resresnet(n: int, seed: int = 0, present: Collection[str] = BLOCKS) -> Network:
    """The residual of residual network of 6n + 2 layers (report, III.A)."""
    return Network(n, seed, block=ResidualBlock, present=present)


ARCHITECTURES = {"plain": plain, "resnet": resnet, "resresnet": resresnet}
