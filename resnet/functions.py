"""The numerical operations of the network: one door, one backend at a time behind it.

Activations are Chainer variables of shape (N, C, H, W), float32. The links call these functions
and nothing else; which backend computes them is decided here and nowhere else. What a backend does
not do itself, it leaves to the class it extends, in the end ``Reference``: Chainer's own functions.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import warnings
from collections.abc import Iterator

import chainer
from chainer import links  # noqa: F401  chainer.links is an attribute only once it is imported

from resnet.backends.cpu import onednn
from resnet.backends.gpu import capture, cuda
from resnet.backends.gpu.cudnn import PRECISIONS
from resnet.backends.reference import REFERENCE

count_gpus, why_no_gpu = cuda.count_gpus, cuda.why_no_gpu
ON_GPU = ("cuda", "tensorcores")
BACKENDS = ("auto", "chainer", "onednn", "winograd", *ON_GPU)
_backend = REFERENCE


def use(name: str = "auto", gpu: bool = False, precision: str | None = None) -> str:
    """Choose what computes from here on.

    Args:
        name: One of ``BACKENDS``; ``auto`` takes the fastest that is installed on a CPU, and
            ``cuda`` on a GPU, which has been seen to run on one.
        gpu: Whether the arrays will be on a GPU.
        precision: One of ``PRECISIONS``, on a GPU only; None is ``tf32``.

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
    missing = ""
    if name in ON_GPU or (name == "auto" and gpu):
        possible, reason = cuda.available()
        if not possible and (name != "auto" or precision is not None):
            raise ValueError(reason)
        if not gpu:
            raise ValueError("computes on a GPU; legal: with --device 0")
        if possible:
            _backend = capture.Recorded(precision or "tf32", own=name == "tensorcores")
            return _backend.describe()
        missing = f"; not --backend cuda: {reason}"
    if precision is not None:
        legal = f"with --backend {' and '.join(ON_GPU)}, on a GPU"
        raise ValueError(f"has no --precision {precision}; legal: {legal}")
    if name in ("onednn", "winograd"):
        if gpu:
            legal = ", ".join(("auto", "chainer", *ON_GPU))
            raise ValueError(f"computes on the CPU; legal with a GPU: {legal}")
        possible, reason = _fast_cpu(by_tiles=name == "winograd")
        if not possible:
            raise ValueError(reason)
    possible, reason = _fast_cpu()
    here = possible and not gpu and name != "chainer"
    _backend = onednn.OneDNN(by_tiles=name != "onednn") if here else REFERENCE
    if name == "auto" and not possible and not gpu:
        return f"{_backend.describe()}; faster on a CPU with oneDNN: {reason}"
    return _backend.describe() + missing


@contextlib.contextmanager
def by_chainer() -> Iterator[None]:
    """Have Chainer's own functions compute for a while, as for what reads their graph."""
    global _backend
    before, _backend = _backend, REFERENCE
    try:
        yield
    finally:
        _backend = before


def _fast_cpu(by_tiles: bool = False) -> tuple[bool, str]:
    """Ask ``onednn.available``; where its packages are not made for, that is the reason."""
    possible, reason = onednn.available(by_tiles=by_tiles)
    here = f"{sys.platform} {platform.machine()}"
    if possible or here == "linux x86_64":
        return possible, reason
    return False, f"its package is for Linux on x86-64, found {here}"


def first_start() -> str:
    """Say what the first step will have to wait for, such as kernels to be compiled; else ''."""
    return _backend.first_start()


def _after_fork() -> None:
    """Leave, in a forked child, a backend whose threads stayed behind in the parent."""
    global _backend
    if isinstance(_backend, onednn.OneDNN):
        _backend = REFERENCE
        warnings.warn(
            f"{onednn.available()[1]}. Chainer's own functions compute here", stacklevel=2
        )


os.register_at_fork(after_in_child=_after_fork)


def convolution(x, W, b=None, stride: int = 1):
    """Convolve with 3x3 filters, padding 1: (N, C, H, W) -> (N, K, H / stride, W / stride).

    Args:
        x: Images, (N, C, H, W).
        W: Filters, (K, C, 3, 3).
        b: Biases, (K,), or None.
        stride: 1 or 2.
    """
    return _backend.convolution(x, W, b, stride)


def normalization(x, bn: chainer.links.BatchNormalization):
    """Normalize (N, C, H, W) by the batch's statistics and update the averages of ``bn``.

    At test time by those averages, as ``chainer.functions.batch_normalization`` does.
    """
    return _backend.normalization(x, bn)


def relu(x):
    """max(x, 0); NaN stays NaN."""
    return _backend.relu(x)


def gated(h, x, z):
    """h T + x (1 - T) with T = sigmoid(z), all (N, C, H, W) (Srivastava et al. 2015, eq. 3)."""
    return _backend.gated(h, x, z)


def option_a(x, channels: int, stride: int):
    """Subsample by ``stride`` and append channels of zeros: option A (He et al. 2015, 3.3)."""
    return _backend.option_a(x, channels, stride)


def finished(x):
    """Have ``x`` computed now, if its backend has put that off (see ``fused``); returns ``x``.

    Needed where weights change before somebody looks at ``x``, and for a gradient with respect to
    it: ``chainer.grad`` finds none of a variable that is not computed.
    """
    return _backend.finished(x)


def pool(x, side: int):
    """Average over squares: (N, C, H, W) -> (N, C, H / side, W / side)."""
    return _backend.pool(x, side)


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


def recorded_step(optimizer, batches, loss, correct):
    """Make a training step that is recorded once and replayed; None if the backend has none.

    See ``capture.Step`` for the arguments and for how it is called.
    """
    return _backend.recorded_step(optimizer, batches, loss, correct)


def recorded_evaluation(network, images, batchsize: int):
    """Make an evaluation that is recorded once and replayed; None if the backend has none.

    See ``capture.Evaluation``.
    """
    return _backend.recorded_evaluation(network, images, batchsize)
