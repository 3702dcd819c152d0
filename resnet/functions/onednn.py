"""The CPU backend: oneDNN's convolutions, and compiled kernels for what lies between them.

Activations stay channels last in memory from the first convolution to the pooling. Whatever is
not float32 on the CPU, or asks for gradients of gradients, is handed to Chainer's own functions.
"""

from __future__ import annotations

import ctypes
import math
import os

import chainer
import numpy as np
from chainer import functions as F

from resnet.functions import primitives, stock
from resnet.functions.flat import FlatMomentumSGD
from resnet.functions.node import Node, accumulated
from resnet.functions.primitives import Missing

try:
    from resnet.functions import kernels
except ImportError:  # without Numba; available() says so
    kernels = None

WIDTH = 256  # values of a row: vectors are well used, a row stays in the innermost cache

average_pooling = stock.average_pooling
linear = stock.linear
softmax_cross_entropy = stock.softmax_cross_entropy


_started = _forked = False  # OpenMP's threads; whether this process is a fork of one that had them


def available() -> tuple[bool, str]:
    """Whether this backend can run here, and one line that says what it is or what is missing."""
    if _forked:
        return False, "OpenMP does not survive a fork; start processes with 'spawn' instead"
    if kernels is None:
        return False, "Numba is missing: pip install numba"
    try:
        version = primitives.version()
    except Missing as reason:
        return False, str(reason)
    return True, f"oneDNN {version}, Numba {kernels.numba.__version__}, {threads()} threads"


def threads() -> int:
    """Threads that compute: ``OMP_NUM_THREADS``, or as many as this process has processors."""
    here = len(os.sched_getaffinity(0))
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(int(wanted), here) if wanted.isdigit() and int(wanted) else here


def describe() -> str:
    return f"onednn ({available()[1]})"


def start() -> None:
    """Prepare this process: its threads and its memory."""
    global _started
    _started = True
    kernels.numba.set_num_threads(min(threads(), kernels.numba.config.NUMBA_NUM_THREADS))
    primitives.set_threads(threads())  # after Numba, which has just told OpenMP of all processors
    _reuse_memory()


def _after_fork() -> None:
    global _forked
    _forked = _forked or _started


os.register_at_fork(after_in_child=_after_fork)


def _reuse_memory() -> None:
    # By default glibc returns arrays of this size to the system at once, and fresh ones fault in
    # page by page. From these sizes up only: M_MMAP_THRESHOLD (-3) and M_TRIM_THRESHOLD (-1).
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(-3, 32 << 20)
    mallopt(-1, 1 << 30)


def _fits(*variables) -> bool:
    return all(
        isinstance(v, np.ndarray) and v.dtype == np.float32 and v.size
        for v in (getattr(v, "array", v) for v in variables)
    )


def _channels_last(x: np.ndarray) -> np.ndarray:
    """x itself when it is channels last in memory, else a copy that is."""
    if x.transpose(0, 2, 3, 1).flags.c_contiguous:
        return x
    y = primitives.empty(x.shape)
    y[...] = x
    return y


def _rows(x: np.ndarray) -> np.ndarray:
    """A channels-last (N, C, H, W) seen as rows of pixels, joined up to ``WIDTH`` values."""
    channels = x.shape[1]
    pixels = x.size // channels
    joined = math.gcd(pixels, max(1, WIDTH // channels))
    return x.transpose(0, 2, 3, 1).reshape(-1, joined * channels)


class _Layer(Node):
    """relu(BN(convolution(x, W)) + A(shortcut)) with the statistics of the batch."""

    def __init__(self, bn, stride: int) -> None:
        super().__init__()
        self.bn = bn
        self.stride = stride

    def reference(self, x, w, gamma, beta, shortcut=None):
        h = stock.convolution(x, w, self.stride)
        y = F.batch_normalization(h, gamma, beta, eps=self.bn.eps)
        return F.relu(y if shortcut is None else y + stock.as_shortcut(shortcut, y))

    def forward(self, inputs):
        self.retain_inputs(tuple(range(len(inputs))))
        x, w, gamma, beta, *shortcut = inputs
        self.x = _channels_last(x)
        self.convolution = primitives.convolution(x.shape, len(w), self.stride)
        self.h = self.convolution.forward(self.x, np.ascontiguousarray(w))
        rows = _rows(self.h)
        mean, var = kernels.moments(kernels.partial_moments(rows), len(rows), len(w))
        self._update_averages(self.h.size // len(w), mean, var)
        self.normalization = _scale_and_shift(self.h, mean, var, gamma, beta, self.bn.eps)
        y = primitives.empty(self.h.shape)
        _finish(self.h, self.normalization, shortcut, y)
        if shortcut:  # otherwise its mask is computed again: to read y costs more
            self.y = y
        return (y,)

    def _update_averages(self, count: int, mean: np.ndarray, var: np.ndarray) -> None:
        # As chainer.functions.batch_normalization does, with the unbiased variance.
        bn = self.bn
        bn.avg_mean *= bn.decay
        bn.avg_mean += (1 - bn.decay) * mean
        bn.avg_var *= bn.decay
        bn.avg_var += (1 - bn.decay) * (count / max(count - 1.0, 1.0)) * var

    def gradients(self, indexes, gy, before):
        _, w, _, _, *shortcut = (v.array for v in self.get_retained_inputs())
        gy = _channels_last(gy)
        h, g = _rows(self.h), _rows(gy)
        scale, shift, mean, deviation = self.normalization
        if shortcut:
            before_relu = primitives.empty(gy.shape)
            parts = kernels.masked_gradient_sums(h, g, _rows(self.y), mean, _rows(before_relu))
            gy, g = before_relu, _rows(before_relu)
        else:
            parts = kernels.gradient_sums(h, g, scale, shift, mean)
        count = np.float32(self.h.size // len(w))
        ggamma, gbeta, coefficients = kernels.input_coefficients(
            parts, scale, mean, deviation, count, len(w)
        )
        gh = primitives.empty(gy.shape)
        if shortcut:
            kernels.input_gradient(h, g, *coefficients, _rows(gh))
        else:
            kernels.relu_input_gradient(h, g, scale, shift, *coefficients, _rows(gh))
        results = {2: ggamma, 3: gbeta, 1: self.convolution.backward_weights(self.x, gh)}
        if indexes[0] == 0:
            results[0] = gx = self.convolution.backward_data(gh, np.ascontiguousarray(w))
            earlier, *before = before
            if earlier is not None:  # the shortcut's, the one sum that is large
                kernels.add(_rows(_channels_last(earlier)), _rows(gx))
            before.insert(0, None)
        if shortcut:
            results[4] = _shortcut_gradient(gy, shortcut[0].shape)
        return accumulated(indexes, results, before)


def _scale_and_shift(h, mean, var, gamma, beta, eps) -> np.ndarray:
    """scale, shift, mean and 1 / deviation, each repeated for the pixels that a row joins."""
    width = _rows(h).shape[1]
    return kernels.scale_and_shift(mean, var, gamma, beta, np.float32(eps), width)


def layer(x, W, bn, stride: int = 1, shortcut=None):
    inputs = (x, W, bn.gamma, bn.beta) + (() if shortcut is None else (shortcut,))
    trains = chainer.config.train
    if (
        not _fits(*inputs)
        or W.shape[2:] != (primitives.KERNEL,) * 2
        or (chainer.config.enable_backprop and not trains)
    ):
        return stock.layer(x, W, bn, stride, shortcut)
    if trains:
        return _Layer(bn, stride).apply(inputs)[0]
    x, w, gamma, beta, *added = (getattr(v, "array", v) for v in inputs)
    x, w = _channels_last(x), np.ascontiguousarray(w)
    y = primitives.convolution(x.shape, len(w), stride).forward(x, w)
    normalization = _scale_and_shift(y, bn.avg_mean, bn.avg_var, gamma, beta, bn.eps)
    _finish(y, normalization, added, y)
    return chainer.as_variable(y)


def _finish(h, normalization, shortcut, y) -> None:
    """y = relu(BN(h) [+ A(shortcut)])."""
    scale, shift = normalization[:2]
    if shortcut:
        added = _rows(_widen(shortcut[0], h.shape))
        kernels.scale_shift_add_relu(_rows(h), scale, shift, added, _rows(y))
    else:
        kernels.scale_shift_relu(_rows(h), scale, shift, _rows(y))


def _widen(shortcut: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A(shortcut): itself, or subsampled with channels of zeros appended (option A)."""
    if shortcut.shape == shape:
        return _channels_last(shortcut)
    y = np.zeros((shape[0], *shape[2:], shape[1]), np.float32).transpose(0, 3, 1, 2)
    step = -(-shortcut.shape[2] // shape[2])
    y[:, : shortcut.shape[1]] = shortcut[:, :, ::step, ::step]
    return y


def _shortcut_gradient(g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Gradient of the shortcut's input, from that of A(shortcut)."""
    if g.shape == shape:
        return g
    n, c, h, w = shape
    gx = np.zeros((n, h, w, c), np.float32).transpose(0, 3, 1, 2)
    step = -(-h // g.shape[2])
    gx[:, :, ::step, ::step] = g[:, :c]
    return gx


class _AddReLU(Node):
    """relu(x + A(shortcut))."""

    def reference(self, x, shortcut):
        return stock.add_relu(x, shortcut)

    def forward(self, inputs):
        self.retain_inputs((0, 1))
        x, shortcut = inputs
        self.y = primitives.empty(x.shape)
        added = _widen(shortcut, x.shape)
        kernels.add_relu(_rows(_channels_last(x)), _rows(added), _rows(self.y))
        return (self.y,)

    def gradients(self, indexes, gy, before):
        g = primitives.empty(gy.shape)
        kernels.masked(_rows(_channels_last(gy)), _rows(self.y), _rows(g))
        shape = self.get_retained_inputs()[1].shape
        results = (g, _shortcut_gradient(g, shape))
        return accumulated(indexes, results, before)


def add_relu(x, shortcut):
    if not _fits(x, shortcut):
        return stock.add_relu(x, shortcut)
    return _AddReLU().apply((x, shortcut))[0]


class _FlatMomentumSGD(FlatMomentumSGD):
    def step(self) -> None:
        kernels.momentum_step(
            self.values,
            self.gradients,
            self.velocities,
            np.float32(self.lr),
            np.float32(self.momentum),
            np.float32(self.weight_decay),
        )


def momentum_sgd(network, momentum: float, weight_decay: float):
    if not _fits(*network.params()):
        return stock.momentum_sgd(network, momentum, weight_decay)
    return _FlatMomentumSGD(momentum, weight_decay).setup(network)
