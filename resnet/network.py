"""The networks of the report: conv1, three blocks, average pooling, fc (Fig. 4, Table I).

``ARCHITECTURES`` has one entry for each kind of network; whatever trains, saves, loads, exports or
draws one learns of it from there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import chainer
import numpy as np
from chainer import links as L
from chainer.initializers import HeNormal

from resnet import functions, random
from resnet.blocks import AbsentBlock, Block, ResidualBlock, TwiceRectifiedBlock
from resnet.command import InputError
from resnet.modules import Convolution, HighwayModule, Normalization, PlainModule, ResidualModule

CHANNELS = (16, 32, 64)  # of conv2, conv3, conv4 (report, Table I)
BLOCKS = ("conv2", "conv3", "conv4")  # Table I, in the order of the forward pass
GROUPS = ("conv1", *BLOCKS, "fc")


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


class Head(L.Linear, chainer.Chain):  # a Chain, so that others can add links to it
    """The last layer, group fc of Table I: the mean over the pixels, fully connected to classes."""

    def __init__(self, channels: int, classes: int, rng: np.random.RandomState) -> None:
        super().__init__(channels, classes, initialW=HeNormal(rng=rng))

    def forward(self, x):
        """(N, channels, H, W) -> logits (N, classes)."""
        return functions.linear(functions.average_pooling(x), self.W, self.b)


class Network(chainer.Chain):
    """A network for images of 32 x 32 pixels: the groups of Table I in a row.

    Args:
        architecture: Which kind of network.
        n: Modules per block.
        seed: Seed of the initial weights: the same seed, the same weights of every group, on any
            device and whichever blocks are present.
        present: The blocks that are there; a stand-in without parameters takes the place of
            each other one (report, III.B).
        classes: Number of classes.

    Raises:
        ValueError: There is no such network; the message names the argument.

    Attributes:
        frozen: Names of the groups that are held still: they compute as at test time, and their
            weights and statistics do not change (see ``freeze``).
    """

    def __init__(
        self,
        architecture: Architecture,
        n: int,
        seed: int = 0,
        present: Collection[str] = BLOCKS,
        classes: int = 10,
    ) -> None:
        super().__init__()
        for name, value, least in (("n", n, 1), ("seed", seed, 0), ("classes", classes, 1)):
            if not isinstance(value, int | np.integer) or not least <= value < 1 << 32:
                raise ValueError(f"{name}: found {value!r}, legal: whole numbers from {least} up")
        _check_names("present", present)
        self.n = n
        self.frozen: frozenset[str] = frozenset()
        first, second, third = CHANNELS
        shapes = ((first, first, 1), (first, second, 2), (second, third, 2))
        with self.init_scope():
            with _generator(seed, "conv1") as rng:
                self.conv1 = architecture.stem(first, rng)
            for name, shape in zip(BLOCKS, shapes, strict=True):
                with _generator(seed, name) as rng:
                    if name in present:
                        setattr(self, name, architecture.block(n, *shape, rng, architecture.module))
                    else:
                        setattr(self, name, AbsentBlock(*shape))
            with _generator(seed, "fc") as rng:
                self.fc = architecture.head(third, classes, rng)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of Table I that are present."""
        return tuple(name for name in GROUPS if not isinstance(self[name], AbsentBlock))

    def freeze(self, names: Collection[str]) -> None:
        """Hold the groups ``names`` still from here on; call it once the optimizer is set up.

        Raises:
            ValueError: There is no such group; none is frozen then.
        """
        _check_names("freeze", names)
        self.frozen = frozenset(names)
        for name in names:
            self[name].disable_update()

    def forward(self, x):
        """(N, 3, 32, 32) -> logits (N, classes)."""
        for name in GROUPS:
            with chainer.using_config("train", chainer.config.train and name not in self.frozen):
                x = self[name](x)
        return functions.finished(x)


def _check_names(what: str, names: Collection[str]) -> None:
    if isinstance(names, str) or not set(names) <= set(GROUPS):
        found = names if isinstance(names, str) else ", ".join(map(str, names))
        raise ValueError(f"{what}: found {found}, legal: a list of {', '.join(GROUPS)}")


@contextlib.contextmanager
def _generator(seed: int, group: str) -> Iterator[np.random.RandomState]:
    """Seed a group's first weights; for links that are given no generator, NumPy's own, too."""
    keys = seed, GROUPS.index(group)
    with random.numpy_seeded(*keys):
        yield np.random.RandomState(keys)


@dataclass(frozen=True)
class Architecture:
    """A kind of network; called with ``Network``'s other arguments, it makes one.

    Attributes:
        title: What it is called in a sentence, such as "plain network".
        label: What it is called in tables and plots, such as "Plain".
        formula: What a module computes, for blocks.h5; a file with another is refused, so change it
            with what is computed, and not else.
        module: Class of the modules: (channels_in, channels, stride, rng).
        block: Class of the blocks: (n, channels_in, channels, stride, rng, module).
        stem: Class of conv1: (channels, rng).
        head: Class of fc: (channels, classes, rng).
        layers: Weighted layers of a module, one after the other: gates and shortcuts do not count.
        beside: Name of the architecture whose numbers tables set beside its own; None: its own
            column is the report's.
    """

    title: str
    label: str
    formula: str
    module: type[chainer.Chain]
    block: type[chainer.Chain] = Block
    stem: type[chainer.Chain] = Stem
    head: type[chainer.Link] = Head
    layers: int = 2
    beside: str | None = None

    def __call__(
        self, n: int, seed: int = 0, present: Collection[str] = BLOCKS, classes: int = 10
    ) -> Network:
        return Network(self, n, seed, present, classes)

    def depth(self, n: int) -> int:
        """Count the weighted layers: 6n + 2 where a module has two (report, II)."""
        return len(BLOCKS) * n * self.layers + 2

    def describe(self, n: int) -> str:
        """Say what a network is, such as "ResNet, 20 layers"."""
        return f"{self.title}, {self.depth(n)} layers"


TWO_LAYERS = "F = bn2(conv2(ReLU(bn1(conv1(x)))))"
ARCHITECTURES = {
    # The report, Fig. 1 and 2a; II; III.A.
    "plain": Architecture("plain network", "Plain", f"{TWO_LAYERS}; ReLU(F)", PlainModule),
    "resnet": Architecture("ResNet", "ResNet", f"{TWO_LAYERS}; ReLU(F + A(x))", ResidualModule),
    "resresnet": Architecture(
        "ResResNet",
        "ResResNet",
        f"{TWO_LAYERS}; ReLU(F + A(x)); a block's last module: ReLU(F + A(x) + A(block's input))",
        ResidualModule,
        ResidualBlock,
    ),
    # The other reading of III.A.
    "resresnet_twice": Architecture(
        "twice-rectified ResResNet",
        "Twice-rectified ResResNet",
        f"{TWO_LAYERS}; ReLU(F + A(x)); a block's output y is ReLU(y + A(x)), x its input",
        ResidualModule,
        TwiceRectifiedBlock,
        beside="resresnet",
    ),
    # Not trained in the report.
    "highway": Architecture(
        "Highway network",
        "Highway",
        f"{TWO_LAYERS}; H = ReLU(F), T = sigmoid(gate(x)), gate with bias b: H T + A(x) (1 - T)",
        HighwayModule,
        beside="resnet",
    ),
}
plain, resnet, resresnet, highway = (
    ARCHITECTURES[name] for name in ("plain", "resnet", "resresnet", "highway")
)
DEPTHS = {n: resnet.depth(n) for n in (3, 5, 7, 9, 18)}  # the report's: 20, 32, 44, 56 and 110


def find_architecture(name: str) -> Architecture:
    """Look up an architecture, maybe one that a script has added.

    Raises:
        InputError: There is none of this name, or none of the name that its ``beside`` says.
    """
    if name not in ARCHITECTURES:
        raise InputError(f"architecture: found '{name}', legal: {', '.join(ARCHITECTURES)}")
    others = [other for other in ARCHITECTURES if other != name]
    if (beside := ARCHITECTURES[name].beside) not in (None, *others):
        raise InputError(f"{name}: beside: found '{beside}', legal: {', '.join(others)}")
    return ARCHITECTURES[name]
