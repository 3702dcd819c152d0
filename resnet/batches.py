"""Which images a network is trained on in which iteration, and how they are augmented."""

from __future__ import annotations

import copy

import chainer
import numpy as np

from resnet import augmentation, random


class Images:
    """A set of images on the device of the network.

    Args:
        x: uint8 (N, 3, 32, 32).
        y: Labels, int32 (N,).
        mean: Per-pixel mean of the training images, float32 (3, 32, 32), in units of 0..1.
        device: ``chainer.backend.Device`` that keeps the arrays.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, mean: np.ndarray, device) -> None:
        self.x, self.y, self.mean = device.send(x), device.send(y), device.send(mean)

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, where):
        """Pick images without their mean, float32 in 0..1, and labels, by the indices ``where``."""
        return self.x[where] * np.float32(1 / 255) - self.mean, self.y[where]

    def part(self, where: slice) -> Images:
        """Keep the images of ``where`` alone."""
        part = copy.copy(self)
        part.x, part.y = self.x[where], self.y[where]
        return part


class Batches:
    """An endless stream of batches: one pass over the images after the other.

    Each pass is in a new random order; a batch may reach over the end of a pass, so iterations
    count as in He et al. Order and augmentation are functions of the seed and the iteration:
    nothing of them needs saving.

    Args:
        images: The training set, N images.
        size: Images per batch, B; at most N.
        seed: Of order and augmentation.
        augment: What is random about the images, one of ``augmentation.KINDS``.

    Attributes:
        orders: int64 (2, N) on the images' device. That of the pass e is in the row e % 2, from
            ``order(e)`` on until the pass after the next is asked for.
    """

    def __init__(self, images: Images, size: int, seed: int = 0, augment: str = "report") -> None:
        self.images, self.size, self.seed, self.augment = images, size, seed, augment
        self._xp = chainer.backend.get_array_module(images.x)
        self.orders = self._xp.zeros((2, len(images)), np.int64)
        self._passes = [-1, -1]  # whose orders these are

    def order(self, epoch: int):
        """Draw the random order of a pass: indices of all images, int64 (N,)."""
        if self._passes[epoch % 2] != epoch:
            keys = self.seed, random.SHUFFLE, epoch
            self.orders[epoch % 2] = random.permutation(self._xp, len(self.images), *keys)
            self._passes[epoch % 2] = epoch
        return self.orders[epoch % 2]

    def prepare(self, iteration: int) -> None:
        """Draw the orders that the batch of ``iteration`` needs, one or two, into ``orders``."""
        first, last = iteration * self.size, (iteration + 1) * self.size - 1
        for epoch in (first // len(self.images), last // len(self.images)):
            self.order(epoch)

    def indices(self, iteration: int):
        """Find which images are in the batch of ``iteration``: int64 (B,)."""
        self.prepare(iteration)
        places = iteration * self.size + self._xp.arange(self.size)
        return self.orders[places // len(self.images) % 2, places % len(self.images)]

    def batch(self, iteration: int, share: slice = slice(None)):
        """Make the batch of ``iteration``, augmented: float32 (B, 3, 32, 32) and int32 (B,).

        Args:
            iteration: Counted from 0.
            share: Which images of the batch, all of them by default.
        """
        x, t = self.images.batch(self.indices(iteration)[share])
        places = augmentation.draw(self._xp, self.seed, iteration, self.size, self.augment)
        return augmentation.crop_and_flip(x, *(values[share] for values in places)), t

    @property
    def draws(self) -> tuple[int, np.int64, int]:
        """What a kernel needs that draws its crops and flips itself: padding, seed, purpose."""
        return augmentation.PADDING, np.int64(self.seed), random.AUGMENT
