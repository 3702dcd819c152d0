"""The CPU backend: oneDNN's convolutions, and compiled kernels for what lies between them.

Activations stay channels last in memory from the first convolution to the pooling. Whatever is
not float32 on the CPU, or asks for gradients of gradients, is handed to Chainer's own functions.
"""

from __future__ import annotations

import ctypes
import os

import chainer
import numpy as np
from chainer import function_node
from chainer import functions as F

from resnet.functions import primitives, stock
from resnet.functions.primitives import Missing

try:
    from resnet.functions import kernels
except ImportError:  # without Numba; available() says so
    kernels = None

average_pooling = stock.average_pooling
linear = stock.linear
softmax_cross_entropy = stock.softmax_cross_entropy
momentum_sgd = stock.momentum_sgd


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
    """Prepare this process; oneDNN reads ``OMP_NUM_THREADS`` itself, Numba has to be told."""
    global _started
    _started = True
    kernels.numba.set_num_threads(min(threads(), kernels.numba.config.NUMBA_NUM_THREADS))
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


def _pixels(x: np.ndarray) -> np.ndarray:
    """A channels-last (N, C, H, W) seen as (N * H * W, C)."""
    return x.transpose(0, 2, 3, 1).reshape(-1, x.shape[1])


class _Node(function_node.FunctionNode):
    """A node whose first-order gradients are arrays; higher orders go through Chainer's own."""

    def backward(self, indexes, grad_outputs):
        if chainer.config.enable_backprop:  # gradients of gradients are wanted
            # Behind F.identity, the gradient of one input leaves out its ways through another.
            inputs = [F.identity(x) for x in self.get_retained_inputs()]
            y = self.reference(*inputs)
            wanted = [inputs[i] for i in indexes]
            return chainer.grad([y], wanted, [grad_outputs[0]], enable_double_backprop=True)
        gradients = self.gradients(indexes, _channels_last(grad_outputs[0].array))
        return tuple(None if g is None else chainer.as_variable(g) for g in gradients)


class _Convolution(_Node):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def reference(self, x, w):
        return stock.convolution(x, w, self.stride)

    def forward(self, inputs):
        self.retain_inputs((0, 1))
        x, w = inputs
        x = self.x = _channels_last(x)
        self.primitive = primitives.convolution(x.shape, len(w), self.stride)
        return (self.primitive.forward(x, np.ascontiguousarray(w)),)

    def gradients(self, indexes, gy):
        w = np.ascontiguousarray(self.get_retained_inputs()[1].array)
        compute = {
            0: lambda: self.primitive.backward_data(gy, w),
            1: lambda: self.primitive.backward_weights(self.x, gy),
        }
        return [compute[i]() for i in indexes]


def convolution(x, W, stride: int = 1):
    if not _fits(x, W) or W.shape[2:] != (3, 3):
        return stock.convolution(x, W, stride)
    return _Convolution(stride).apply((x, W))[0]


class _Normalize(_Node):
    """relu(BN(x) + A(shortcut)) with the statistics of the batch."""

    def __init__(self, bn, relu: bool) -> None:
        super().__init__()
        self.bn = bn
        self.relu = relu

    def reference(self, x, gamma, beta, shortcut=None):
        y = F.batch_normalization(x, gamma, beta, eps=self.bn.eps)
        if shortcut is not None:
            y = y + stock.as_shortcut(shortcut, y)
        return F.relu(y) if self.relu else y

    def forward(self, inputs):
        self.retain_inputs(tuple(range(len(inputs))))
        x, gamma, beta, *shortcut = inputs
        x = self.x = _channels_last(x)
        pixels = _pixels(x)
        self.mean, var = kernels.moments(pixels)
        self.deviation = np.float32(1) / np.sqrt(var + np.float32(self.bn.eps))
        self._update_averages(len(pixels), var)
        scale = gamma * self.deviation
        self.y = _apply(x, scale, beta - self.mean * scale, shortcut, self.relu)
        return (self.y,)

    def _update_averages(self, count: int, var: np.ndarray) -> None:
        # As chainer.functions.batch_normalization does, with the unbiased variance.
        bn = self.bn
        bn.avg_mean *= bn.decay
        bn.avg_mean += (1 - bn.decay) * self.mean
        bn.avg_var *= bn.decay
        bn.avg_var += (1 - bn.decay) * (count / max(count - 1.0, 1.0)) * var

    def gradients(self, indexes, gy):
        _, gamma, _, *shortcut = (v.array for v in self.get_retained_inputs())
        x, g = _pixels(self.x), _pixels(gy)
        if self.relu:
            before = primitives.empty(gy.shape)
            kernels.masked(g, _pixels(self.y), _pixels(before))
            gy, g = before, _pixels(before)
        gbeta, product = kernels.gradient_sums(x, g, self.mean)
        ggamma = product * self.deviation
        # gx = gamma / s * (g - mean(g) - xhat * mean(g * xhat)), xhat = (x - mean) / s
        factor = gamma * self.deviation
        slope = -factor * ggamma * self.deviation / np.float32(len(x))
        offset = -factor * gbeta / np.float32(len(x)) - slope * self.mean
        gx = primitives.empty(self.x.shape)
        kernels.input_gradient(x, g, factor, slope, offset, _pixels(gx))
        results = [gx, ggamma, gbeta]
        if shortcut:
            results.append(_shortcut_gradient(gy, shortcut[0].shape))
        return [results[i] for i in indexes]


def _apply(x, scale, shift, shortcut, relu: bool) -> np.ndarray:
    """[relu](x * scale + shift [+ A(shortcut)])."""
    y = primitives.empty(x.shape)
    if shortcut and relu:
        added = _pixels(_widen(shortcut[0], x.shape))
        kernels.scale_shift_add(_pixels(x), scale, shift, added, _pixels(y))
        return y
    kernels.scale_shift(_pixels(x), scale, shift, relu, _pixels(y))
    if shortcut:
        y += _widen(shortcut[0], x.shape)
    return y


def _widen(shortcut: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A(shortcut): itself, or subsampled with channels of zeros appended (option A)."""
    if shortcut.shape == shape:
        return _channels_last(shortcut)
    y = np.zeros((shape[0], *shape[2:], shape[1]), np.float32).transpose(0, 3, 1, 2)
    step = shortcut.shape[2] // shape[2]
    y[:, : shortcut.shape[1]] = shortcut[:, :, ::step, ::step]
    return y


def _shortcut_gradient(g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Gradient of the shortcut's input, from that of A(shortcut)."""
    if g.shape == shape:
        return g
    n, c, h, w = shape
    gx = np.zeros((n, h, w, c), np.float32).transpose(0, 3, 1, 2)
    step = h // g.shape[2]
    gx[:, :, ::step, ::step] = g[:, :c]
    return gx


def normalize(x, bn, shortcut=None, relu: bool = True):
    inputs = (x, bn.gamma, bn.beta) + (() if shortcut is None else (shortcut,))
    trains = chainer.config.train
    if not _fits(*inputs) or (chainer.config.enable_backprop and not trains):
        return stock.normalize(x, bn, shortcut, relu)
    if trains:
        return _Normalize(bn, relu).apply(inputs)[0]
    scale = bn.gamma.array / np.sqrt(bn.avg_var + np.float32(bn.eps))
    shift = bn.beta.array - bn.avg_mean * scale
    arrays = [getattr(v, "array", v) for v in (x, *inputs[3:])]
    return chainer.as_variable(_apply(_channels_last(arrays[0]), scale, shift, arrays[1:], relu))


class _AddReLU(_Node):
    """relu(x + A(shortcut))."""

    def reference(self, x, shortcut):
        return stock.add_relu(x, shortcut)

    def forward(self, inputs):
        self.retain_inputs((0, 1))
        x, shortcut = inputs
        one, zero = np.ones(x.shape[1], np.float32), np.zeros(x.shape[1], np.float32)
        self.y = _apply(_channels_last(x), one, zero, [shortcut], True)
        self.shortcut_shape = shortcut.shape
        return (self.y,)

    def gradients(self, indexes, gy):
        g = primitives.empty(gy.shape)
        kernels.masked(_pixels(gy), _pixels(self.y), _pixels(g))
        results = [g, _shortcut_gradient(g, self.shortcut_shape)]
        return [results[i] for i in indexes]


def add_relu(x, shortcut):
    if not _fits(x, shortcut):
        return stock.add_relu(x, shortcut)
    return _AddReLU().apply((x, shortcut))[0]
