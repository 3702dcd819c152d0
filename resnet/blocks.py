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
        module: Class of the modules.
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

    As in a residual module, the sum is rectified, and nothing is rectified before the sum: the
    block's input joins what the last module adds up. The report's words allow
    ``TwiceRectifiedBlock``, too. Modules are ``ResidualModule``.
    """

    def forward(self, x):
        """(N, channels_in, H, W) -> (N, channels, H / stride, W / stride)."""
        *modules, last = self
        h = x
        for module in modules:
            h = module(h)
        return relu(last.residual(h) + last.shortcut(h) + option_a(x, self.channels, self.stride))


class TwiceRectifiedBlock(Block):
    """The other reading of III.A: the block's input is added to what its last ReLU lets through.

    The report says that the sum is rectified. Here both of its terms are so already: the last ReLU
    does nothing, and a block can add to its input, but not take away from it.
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
