"""The numerical operations of the network: one door, one file per backend behind it.

Activations are Chainer variables of shape (N, C, H, W), float32. The links call these functions
and nothing else; which backend computes them is decided here and nowhere else.
"""

from __future__ import annotations

import os
import warnings

from resnet.functions import onednn, stock

BACKENDS = ("auto", "chainer", "onednn")
_backend = stock


def use(name: str = "auto") -> str:
    """Choose what computes from here on.

    Args:
        name: One of ``BACKENDS``; ``auto`` takes the fastest that is installed.

    Returns:
        One line for the header of a run: which backend computes, and why.

    Raises:
        ValueError: ``name`` is unknown or cannot run here; the message says what is missing.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"found '{name}', legal: {', '.join(BACKENDS)}")
    possible, reason = onednn.available()
    if name == "onednn" and not possible:
        raise ValueError(reason)
    _backend = onednn if possible and name in ("auto", "onednn") else stock
    _backend.start()
    if name == "auto" and not possible:
        return f"{_backend.describe()}; faster on a CPU with oneDNN: {reason}"
    return _backend.describe()


def _after_fork() -> None:
    """In a forked child: leave a backend whose threads stayed behind in the parent."""
    global _backend
    if _backend is onednn:
        _backend = stock
        warnings.warn(
            f"{onednn.available()[1]}. Chainer's own functions compute here", stacklevel=2
        )


os.register_at_fork(after_in_child=_after_fork)


def layer(x, W, bn, stride: int = 1, shortcut=None):
    """``relu(BN(convolution(x, W)) + A(shortcut))``; A is the option A shortcut.

    3x3 convolution with padding 1 and no bias: (N, C, H, W) -> (N, K, H/stride, W/stride). BN is
    the link ``bn``: in training mode the statistics are the batch's and its running averages are
    updated as ``chainer.functions.batch_normalization`` does; otherwise the averages are used.
    """
    return _backend.layer(x, W, bn, stride, shortcut)


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
