"""What the compiled backends share: operations that wait until several can be computed in one pass.

A module says one operation after the other, as the report's figures do. The compiled backends are
fast because they compute several of them at once: a layer, or all layers in a row. So their
operations return variables that have no array yet, and remember what they are. The first look at
one computes it: its ``array``, a gradient, any other function of Chainer, ``finished``.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import chainer
import numpy as np
from chainer import functions as F
from chainer import links as L

from resnet.backends.reference import Reference, widened

SETTINGS = ("train", "enable_backprop")  # of chainer.config, those that a result depends on


def settings() -> list[bool]:
    return [getattr(chainer.config, name) for name in SETTINGS]


class Convolution(NamedTuple):
    x: chainer.Variable
    W: chainer.Parameter
    stride: int


@dataclass(eq=False)
class Normalization:
    x: Unfinished  # a convolution
    bn: L.BatchNormalization
    counts: bool = True  # for the running averages: once, however often it is computed

    def counted(self) -> None:
        """Note that it has been computed, so that the running averages move no more."""
        self.counts = self.counts and not chainer.config.train


class Shortcut(NamedTuple):
    x: chainer.Variable
    channels: int
    stride: int


class Sum(NamedTuple):
    x: chainer.Variable
    y: chainer.Variable


class Layer:
    """``relu(BN(convolution(x, W)) + A(shortcut) + ...)``; A is option A, shortcuts may be none."""

    def __init__(self, normalization: Normalization, shortcuts: Sequence = ()) -> None:
        self.normalization, self.bn = normalization, normalization.bn
        self.x, self.W, self.stride = normalization.x.operation
        self.shortcuts = tuple(shortcuts)


class Unfinished(chainer.Variable):
    """A variable that is an operation on others until somebody looks at it.

    It is computed under the configuration in which it was made, with the parameters as they are
    then.

    Args:
        backend: What computes it.
        shape: (N, C, H, W) of the array to come.
        operation: What it is: one of the classes above.
    """

    def __init__(self, backend: Fused, shape: tuple[int, ...], operation) -> None:
        # Not Variable's own, which wants the array; see ``__getattr__``.
        self.backend, self.operation, self._shape = backend, operation, shape
        self.settings = settings()

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def __add__(self, other):
        if isinstance(other, chainer.Variable) and other.shape == self.shape:
            return Unfinished(self.backend, self.shape, Sum(self, other))
        return super().__add__(other)

    def __radd__(self, other):
        return self + other

    def __getattr__(self, name: str):
        """Compute it: asked for is what a variable has, and this one has not yet."""
        if name.startswith("__") or self.operation is None:
            raise AttributeError(name)
        self.look()
        return getattr(self, name)

    def look(self) -> None:
        """Compute it, unless it is."""
        if self.operation is None:
            return
        with contextlib.ExitStack() as stack:
            for setting, value in zip(SETTINGS, self.settings, strict=True):
                stack.enter_context(chainer.using_config(setting, value))
            finished = self.backend.compute(self.operation)
        self.operation = None  # and with it what was needed for it
        vars(self).update(vars(finished))
        self._node._variable = weakref.ref(self)


def is_waiting(x, *kinds: type) -> bool:
    """Whether ``x`` is one of these operations, and not computed yet."""
    return isinstance(x, Unfinished) and isinstance(x.operation, kinds)


def terms(x) -> list:
    """What is added up in a sum that is not computed yet; of anything else, itself."""
    if not is_waiting(x, Sum):
        return [x]
    return [term for part in x.operation for term in terms(part)]


def chain(layer: Layer) -> tuple[list[Layer], dict[int, list[int]]]:
    """Find the layers in a row up to this one that nobody has looked at.

    Returns:
        The layers, and where the shortcuts that end at input i start, {i: [j, ...]}; input i is
        what layer i reads, the last one the output. Without layers if one is elsewhere.
    """
    row = [layer]
    while is_waiting(x := row[0].x, Layer) and x.settings == settings():
        row.insert(0, x.operation)
    for begin in range(len(row)):
        some = row[begin:]
        inputs = [id(each.x) for each in some]
        ends = {i: [*map(id, each.shortcuts)] for i, each in enumerate(some, 1) if each.shortcuts}
        if all(start in inputs[:i] for i, starts in ends.items() for start in starts):
            return some, {i: [*map(inputs.index, starts)] for i, starts in ends.items()}
    return [], {}


def _without_a(x):
    """x, or what it is option A of."""
    return x.operation.x if is_waiting(x, Shortcut) else x


class Fused(Reference):
    """A backend that computes whole layers; what it is not made for, Chainer computes."""

    # What a subclass has.

    def fits(self, x, W) -> bool:
        """Whether this backend can convolve ``x`` with ``W``; not a look at ``x``."""
        raise NotImplementedError

    def convolve(self, x, W, stride: int):
        """A convolution by itself."""
        raise NotImplementedError

    def layer(self, layer: Layer):
        """A layer, and with it those before it in a ``chain`` if that is faster."""
        raise NotImplementedError

    def add_relu(self, x, shortcut):
        """``relu(x + A(shortcut))``."""
        raise NotImplementedError

    # The operations.

    def convolution(self, x, W, b=None, stride: int = 1):
        x = chainer.as_variable(x)
        if len(x.shape) != 4 or W.shape[1:2] != x.shape[1:2] or not self.fits(x, W):
            return super().convolution(x, W, b, stride)  # where Chainer says what does not fit
        y = Unfinished(self, strided(x.shape, len(W), stride), Convolution(x, W, stride))
        return y if b is None else F.bias(y, b)

    def normalization(self, x, bn: L.BatchNormalization):
        if is_waiting(x, Convolution) and np.shape(bn.avg_mean) == x.shape[1:2]:
            counts = not chainer.config.in_recomputing  # by F.forget, which computes twice
            return Unfinished(self, x.shape, Normalization(x, bn, counts))
        return super().normalization(x, bn)

    def option_a(self, x, channels: int, stride: int):
        x = chainer.as_variable(x)
        shape = strided(x.shape, channels, stride)
        if shape == x.shape:
            return x
        if channels < x.shape[1]:
            return super().option_a(x, channels, stride)  # says that it cannot
        return Unfinished(self, shape, Shortcut(x, channels, stride))

    def relu(self, x):
        if is_waiting(x, Normalization):
            return Unfinished(self, x.shape, Layer(x.operation))
        if not is_waiting(x, Sum):
            return super().relu(x)
        added = terms(x)
        for i, y in enumerate(added):
            if is_waiting(y, Normalization):
                shortcuts = map(_without_a, added[:i] + added[i + 1 :])
                return Unfinished(self, x.shape, Layer(y.operation, shortcuts))
        if len(added) > 2:
            return super().relu(x)
        y, other = reversed(added) if is_waiting(added[0], Shortcut) else added
        shortcut = self.finished(_without_a(other))  # first, as y may come out of it
        return self.add_relu(self.finished(y), shortcut)

    def gated(self, h, x, z):
        return super().gated(*map(self.float32, (h, x, z)))

    def finished(self, x):
        if isinstance(x, Unfinished):
            x.look()
        return x

    def one_by_one(self, layer: Layer):
        """Compute a layer out of a convolution and Chainer's own functions."""
        y = self._normalized(self.convolve(layer.x, layer.W, layer.stride), layer.normalization)
        for shortcut in layer.shortcuts:
            y += widened(self.float32(shortcut), y)
        return F.relu(y)

    def _normalized(self, x, normalization: Normalization):
        with chainer.using_config("in_recomputing", not normalization.counts):
            y = super().normalization(x, normalization.bn)
        normalization.counted()
        return y

    def float32(self, x):
        """An activation as Chainer's own functions take it."""
        return x

    def compute(self, operation) -> chainer.Variable:
        """What an operation gives, computed now."""
        match operation:
            case Convolution(x, W, stride):
                return self.convolve(x, W, stride)
            case Normalization(x):
                return self._normalized(x, operation)
            case Shortcut(x, channels, stride):
                return super().option_a(x, channels, stride)
            case Sum(x, y):
                return F.add(x, y)
            case Layer():
                return self.layer(operation)


def strided(shape: tuple[int, ...], channels: int, stride: int) -> tuple[int, ...]:
    """(N, C, H, W) -> (N, ``channels``, H / stride, W / stride), rounded up."""
    n, _, *size = shape
    return n, channels, *(-(-length // stride) for length in size)
