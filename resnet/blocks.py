"""Blocks: n modules in a row with the same number of output channels (report, Fig. 3b and 7)."""

from __future__ import annotations

import chainer
import numpy as np

from resnet.functions import option_a, pool, relu
from resnet.modules import ResidualModule


class Block(chainer.ChainList):
    """``n`` modules in a row; the first one changes the shape where it has to change.

    Args:
        n: Number of modules.
        channels_in: Channels of the input.
        channels: Channels of every module's output.
        stride: Stride of the first module.
        rng: Source of the initial weights.
        module: Class of the modules, ``PlainModule`` or ``ResidualModule``.
    """

    def __init__(
        self,
        n: int,
        channels_in: int,
        channels: int,
        stride: int,
        rng: np.random.RandomState,
        module: type[chainer.Chain] = ResidualModule,
    ) -> None:
        first = module(channels_in, channels, stride, rng)
        super().__init__(first, *(module(channels, channels, 1, rng) for _ in range(n - 1)))
        self.channels, self.stride = channels, stride

    def forward(self, x):
        """(N, channels_in, H, W) -> (N, channels, H / stride, W / stride)."""
        for module in self:
            x = module(x)
        return x


class ResidualBlock(Block):
    """A block with one more shortcut, from its input to its output (report, III.A, Fig. 7).

    The sum is rectified, as the report says, though both of its terms come out of a ReLU already.
    """

    def forward(self, x):
        """(N, channels_in, H, W) -> (N, channels, H / stride, W / stride)."""
        return relu(super().forward(x) + option_a(x, self.channels, self.stride))


class AbsentBlock(chainer.Link):
    """Stands in for a block that is not there yet, without parameters (report, III.B).

    It brings the shape to what the next part expects: average pooling where the block would have
    a stride of 2, then channels of zeros. Thus every other block has the same shape in each stage
    of partial training.

    Args:
        channels_in: Channels of the input.
        channels: Channels of the output.
        stride: Side of the square that is averaged.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.channels = channels
        self.stride = stride

    def forward(self, x):
        """(N, channels_in, H, W) -> (N, channels, H / stride, W / stride)."""
        if self.stride > 1:
            x = pool(x, self.stride)
        return option_a(x, self.channels, 1)
