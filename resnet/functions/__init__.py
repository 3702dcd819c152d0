"""The numerical operations of the network: one door, one file per backend behind it.

Activations are Chainer variables of shape (N, C, H, W), float32. The links call these functions
and nothing else; which backend computes them is decided here and nowhere else.
"""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import chainer
from chainer import links  # noqa: F401  chainer.links is an attribute only once it is imported

from resnet.functions import capture, cuda, onednn, stock
from resnet.functions.cudnn import PRECISIONS

count_gpus = cuda.count_gpus
BACKENDS = ("auto", "chainer", "onednn", "winograd", "cuda")
_backend = stock


def use(name: str = "auto", gpu: bool = False, precision: str | None = None) -> str:
    """Choose what computes from here on.

    Args:
        name: One of ``BACKENDS``; ``auto`` takes the fastest that is installed and, on a GPU,
            Chainer's own functions until the CUDA backend has been seen to run on one.
        gpu: Whether the arrays will be on a GPU.
        precision: One of ``PRECISIONS``, of the CUDA backend only; None is its ``tf32``.

    Returns:
        One line for the header of a run: which backend computes, and why.

    Raises:
        ValueError: ``name`` is unknown or cannot run here; the message says what is missing.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"found '{name}', legal: {', '.join(BACKENDS)}")
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"found precision '{precision}', legal: {', '.join(PRECISIONS)}")
    if precision is not None and name != "cuda":
        raise ValueError(f"has no --precision {precision}; legal: with --backend cuda")
    if name == "cuda":
        possible, reason = cuda.available()
        if not possible:
            raise ValueError(reason)
        if not gpu:
            raise ValueError("computes on a GPU; legal: with --device 0")
        _backend, cuda.precision = cuda, precision or "tf32"
        return _backend.describe()
    if name in ("onednn", "winograd"):
        if gpu:
            raise ValueError("computes on the CPU; legal with a GPU: auto, chainer, cuda")
        possible, reason = _fast_cpu(by_tiles=name == "winograd")
        if not possible:
            raise ValueError(reason)
    possible, reason = _fast_cpu()
    _backend = onednn if possible and not gpu and name != "chainer" else stock
    if _backend is onednn:
        onednn.start(by_tiles=name != "onednn")
    if name == "auto" and gpu:
        possible, reason = cuda.available()
        missing = "" if possible else f"; {reason}"
        return f"{_backend.describe()}; --backend cuda has never run on a GPU yet{missing}"
    if name == "auto" and not possible:
        return f"{_backend.describe()}; faster on a CPU with oneDNN: {reason}"
    return _backend.describe()


def _fast_cpu(by_tiles: bool = False) -> tuple[bool, str]:
    """``onednn.available``; where its packages are not made for, that is the reason."""
    possible, reason = onednn.available(by_tiles=by_tiles)
    here = f"{sys.platform} {platform.machine()}"
    if possible or here == "linux x86_64":
        return possible, reason
    return False, f"its package is for Linux on x86-64, found {here}"


def first_start() -> str:
    """What to say before the first step where kernels are still to be compiled, else ''.

    Numba keeps what it has compiled, so that it is said and waited for once.
    """
    if _backend is not onednn:
        return ""
    compiled = Path(onednn.kernels.convolve.stats.cache_path).glob("kernels.*.nbc")
    return (
        "" if any(compiled) else "First start: the kernels are compiled now, about a minute, once."
    )


def _after_fork() -> None:
    """In a forked child: leave a backend whose threads stayed behind in the parent."""
    global _backend
    if _backend is onednn:
        _backend = stock
        warnings.warn(
            f"{onednn.available()[1]}. Chainer's own functions compute here", stacklevel=2
        )


os.register_at_fork(after_in_child=_after_fork)


class Layer(NamedTuple):
    """``relu(BN(convolution(x, W)) + A(shortcut))``; A is the option A shortcut.

    Args:
        W: Weights of a 3x3 convolution with padding 1 and no bias, (K, C, 3, 3).
        bn: Link; in training mode the statistics are the batch's and its running averages are
            updated as ``chainer.functions.batch_normalization`` does, else the averages are used.
        stride: 1 or 2: (N, C, H, W) -> (N, K, H/stride, W/stride).
        around: Number of layers, this one included, that the shortcut goes around; 0: no shortcut.
    """

    W: chainer.Parameter
    bn: chainer.links.BatchNormalization
    stride: int = 1
    around: int = 0


def layers(x, layers: Sequence[Layer]):
    """Layers in a row. A backend may keep little of what lies between them."""
    return _backend.layers(x, layers)


def add_relu(x, shortcut):
    """``relu(x + A(shortcut))``: the shortcut round a whole block (report, Fig. 7)."""
    return _backend.add_relu(x, shortcut)


def option_a(x, channels: int, stride: int):
    """Option A of He et al. 2015, 3.3: subsample by ``stride``, append channels of zeros."""
    return stock.option_a(x, channels, stride)


def pool(x, side: int):
    """Average over squares: (N, C, H, W) -> (N, C, H / side, W / side)."""
    return stock.pool(x, side)


def average_pooling(x):
    """Global average pooling: (N, C, H, W) -> (N, C)."""
    return _backend.average_pooling(x)


def linear(x, W, b):
    """The fully connected layer: (N, C) -> (N, classes)."""
    return _backend.linear(x, W, b)


def softmax_cross_entropy(y, t):
    """Mean cross entropy of logits (N, classes) and labels (N,) int32; a scalar variable."""
    return _backend.softmax_cross_entropy(y, t)


def momentum_sgd(network, momentum: float, weight_decay: float):
    """Momentum SGD with weight decay on every parameter, set up on ``network``.

    g += weight_decay * p; v = momentum * v - lr * g; p += v (He et al. 2015, 3.4). The rate is
    the attribute ``lr``, set before each step.
    """
    return _backend.momentum_sgd(network, momentum, weight_decay)


def recorded_step(optimizer, images, **settings):
    """A training step that is recorded once and replayed, where the backend has one, else None.

    See ``capture.Step`` for the arguments and for how it is called.
    """
    if _backend is not cuda or not isinstance(optimizer, cuda.FlatMomentumSGD):
        return None
    return capture.Step(optimizer, images, **settings)


def recorded_evaluation(network, images, batchsize: int):
    """An evaluation that is recorded once and replayed, where the backend has one, else None.

    See ``capture.Evaluation``.
    """
    if _backend is not cuda or len(images) % batchsize or not cuda._are_floats(*network.params()):
        return None
    return capture.Evaluation(network, images, batchsize)
