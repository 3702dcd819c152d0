"""Random numbers as a pure function of their place, the same on CPU and GPU.

A number depends on the seed, on what it is for and on where it is used (iteration, position in
the batch), never on what was drawn before. So a run that is resumed, split over processes or
replayed draws the same numbers, and there is no generator state to save.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np

SHUFFLE, AUGMENT, OTHERS = 1, 2, 3  # what a number is for

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def bits(xp, *keys):
    """Draw 64 random bits for each combination of keys: the finalizer of SplitMix64 over every key.

    Args:
        xp: ``numpy`` or ``cupy``.
        keys: Non-negative integers or integer arrays that broadcast.

    Returns:
        uint64 array of at least one dimension.
    """
    h = xp.zeros(1, np.uint64)
    for key in keys:
        # A number goes along with the kernel; as an array it would be a copy from the host.
        number = isinstance(key, int | np.integer)
        key = np.uint64(key) if number else xp.asarray(key, dtype=np.uint64)
        h = h + key + _GOLDEN
        h = (h ^ (h >> np.uint64(30))) * _FIRST
        h = (h ^ (h >> np.uint64(27))) * _SECOND
        h = h ^ (h >> np.uint64(31))
    return h


def below(xp, bound: int, *keys):
    """Draw random integers from 0 to ``bound - 1``, int64, one for each combination of keys."""
    high = bits(xp, *keys) >> np.uint64(32)
    return ((high * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def seed_numpy(*keys: int) -> None:
    """Seed NumPy's own generator: what others draw from it is a function of the keys, too.

    Those are Chainer's dropout on a CPU, and initializers that are given no generator.
    """
    np.random.seed(int(bits(np, OTHERS, *keys)[0] >> np.uint64(32)))


@contextlib.contextmanager
def numpy_seeded(*keys: int) -> Iterator[None]:
    """Call ``seed_numpy`` for a while: afterwards NumPy's generator is as it was before."""
    before = np.random.get_state()
    seed_numpy(*keys)
    try:
        yield
    finally:
        np.random.set_state(before)


@contextlib.contextmanager
def nothing_drawn() -> Iterator[None]:
    """Refuse draws from NumPy's own generator and from Python's, and leave both as they were.

    Raises:
        RuntimeError: Something has been drawn.
    """
    before = np.random.get_state(), random.getstate()
    try:
        yield
        (_, words, *place), of_python = np.random.get_state(), random.getstate()
        (_, words_before, *place_before), of_python_before = before
        same = place == place_before and np.array_equal(words, words_before)
        if not same or of_python != of_python_before:
            raise RuntimeError("numbers drawn on the host, which every replay would repeat")
    finally:
        np.random.set_state(before[0])
        random.setstate(before[1])


def permutation(xp, size: int, *keys):
    """Draw a random order of ``size`` items, int64 array (size,)."""
    return xp.argsort(bits(xp, *keys, xp.arange(size)), kind="stable")
