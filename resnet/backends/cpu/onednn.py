"""The CPU backend: oneDNN's convolutions, and compiled kernels for what lies between them.

Activations stay channels last in memory from the first convolution to the pooling. Whatever is
not float32 on the CPU, or asks for gradients of gradients, is handed to Chainer's own functions.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import chainer
import numpy as np
from chainer import functions as F

from resnet import command, record
from resnet.backends.cpu import primitives
from resnet.backends.cpu.primitives import Missing
from resnet.backends.flat import FlatMomentumSGD
from resnet.backends.fused import Fused, Layer, Unfinished, chain
from resnet.backends.node import Node, accumulated, normalized
from resnet.backends.reference import REFERENCE, step, widened


def _without_numba(error: Exception) -> str:
    """Say in one line why Numba does not compile here, and which settings may be to blame."""
    if isinstance(error, ModuleNotFoundError) and error.name in ("numba", "llvmlite"):
        return _NO_NUMBA
    found = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("NUMBA_")]
    settings = f" with {', '.join(found)}" if found else ""
    return f"Numba does not work here{settings}: {command.reason(error)}"


_why_not = _NO_NUMBA = "Numba is missing: pip install numba"
try:
    from resnet.backends.cpu import kept, kernels, vectors, winograd
except (ImportError, ValueError) as error:  # available() says so
    _why_not = _without_numba(error)
    kept = kernels = vectors = winograd = None

WIDTH = 256  # values of a row: vectors are well used, a row stays in the innermost cache

_started = _forked = False  # OpenMP's threads; whether this process is a fork of one that had them


def available(by_tiles: bool = False) -> tuple[bool, str]:
    """Whether this backend can run here, and one line that says what it is or what is missing.

    Args:
        by_tiles: Whether it can with Winograd's convolution, too.
    """
    if _forked:
        return False, "OpenMP does not survive a fork; start processes with 'spawn' instead"
    if kernels is None:
        return False, _why_not
    try:
        version = primitives.version()
    except Missing as reason:
        return False, str(reason)
    if by_tiles and not vectors.name():
        return False, "needs a processor with AVX2 or AVX-512; legal here: auto, onednn, chainer"
    return True, f"oneDNN {version}, Numba {kernels.numba.__version__}, {threads()} threads"


def threads() -> int:
    """Threads that compute: as many as this process has processors, or the environment allows.

    In a container that may take the time of fewer, as many as those, unless ``OMP_NUM_THREADS``
    says more. A value that OpenMP refuses, which it says itself, is none.
    """
    most = [len(record.PROCESSORS)]
    if kernels is not None:
        most.append(kernels.numba.config.NUMBA_NUM_THREADS)
    wanted, limit = (
        re.match(r"\s*\+?0*([1-9][0-9]{0,8})\s*(,|$)", os.environ.get(name, ""))
        for name in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT")
    )
    most += [int(found[1]) for found in (wanted, limit) if found]
    if not wanted and (quota := record.quota()):
        most.append(quota)
    return min(most)


class OneDNN(Fused):
    """oneDNN's convolutions, and Winograd's in the place of those it can be.

    Args:
        by_tiles: Whether Winograd's may.
    """

    def __init__(self, by_tiles: bool = True) -> None:
        global _started
        _started = True
        self.by_tiles = by_tiles and bool(vectors.name())
        self.threads = threads()
        try:
            kernels.numba.set_num_threads(self.threads)
        except ValueError as error:
            layer = kernels.numba.config.THREADING_LAYER
            found = f"NUMBA_THREADING_LAYER: found '{layer}' ({command.reason(error)})"
            raise ValueError(f"{found}, legal: omp, workqueue, or no such variable") from None
        _reuse_memory()

    def describe(self) -> str:
        _, libraries = available()
        if self.by_tiles:
            return f"winograd (F(4x4, 3x3) with {vectors.name()}, {libraries})"
        without = "" if vectors.name() else "; without Winograd's convolution: no AVX2"
        return f"onednn ({libraries}{without})"

    def first_start(self) -> str:
        if not kernels.KEEPS:
            return (
                "The kernels are compiled now, about a minute, at every start: neither beside the "
                "code nor in the home can they be kept; NUMBA_CACHE_DIR=FOLDER says where else."
            )
        # What is compiled is kept: it is said, and waited for, once.
        if kept.exist(Path(kernels.convolve.stats.cache_path)):
            return ""
        return "First start: the kernels are compiled now, about a minute, once."

    def fits(self, x, W) -> bool:
        images = () if isinstance(x, Unfinished) else (x,)
        return _fits(W, *images) and W.shape[2:] == (primitives.KERNEL,) * 2

    def prepare(self, shape: tuple[int, ...], channels: int, stride: int):
        """What computes ``channels`` filters on (N, C, H, W)."""
        if self.by_tiles and winograd.fits(shape, channels, stride):
            return winograd.convolution(shape, channels, stride, self.threads)
        return primitives.convolution(shape, channels, stride, self.threads)

    def convolve(self, x, W, stride: int):
        return _Convolution(self, stride).apply((x, W))[0]

    def layer(self, layer: Layer):
        row, starts = chain(layer)
        if not row or not all(_fits(each.bn.gamma, each.bn.beta) for each in row):
            return self.one_by_one(layer)
        inputs = [row[0].x]
        for each in row:
            inputs += [each.W, each.bn.gamma, each.bn.beta]
        (y,) = _Layers(self, row, starts).apply(inputs)
        for each in row:
            each.normalization.counted()
        return y

    def add_relu(self, x, shortcut):
        if not _fits(x, shortcut):
            return REFERENCE.relu(x + widened(shortcut, x))
        return _AddReLU().apply((x, shortcut))[0]

    def gated(self, h, x, z):
        if not _fits(h, x, z) or not h.shape == x.shape == z.shape:
            return super().gated(h, x, z)
        return _Gated().apply((h, x, z))[0]

    def momentum_sgd(self, network, momentum: float, weight_decay: float):
        if not _fits(*network.params()):
            return super().momentum_sgd(network, momentum, weight_decay)
        return _FlatMomentumSGD(momentum, weight_decay).setup(network)


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
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def _row_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Of (N, C, H, W) as rows of pixels, joined up to ``WIDTH`` values of a row of an image."""
    n, channels, height, width = shape
    joined = math.gcd(width, max(1, WIDTH // channels))
    return n, height * width // joined, joined * channels


def _rows(x: np.ndarray) -> np.ndarray:
    """A channels-last (N, C, H, W) as rows."""
    return x.transpose(0, 2, 3, 1).reshape(_row_shape(x.shape))


def _images(rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Rows as (N, C, H, W), channels last in memory."""
    n, c, h, w = shape
    return rows.reshape(n, h, w, c).transpose(0, 3, 1, 2)


def _empty_rows(shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(_row_shape(shape), np.float32)


_NOTHING = np.empty((0, 0), np.float32)
_NO_ROWS = np.empty((0, 0, 0), np.float32)


_computing = threading.RLock()


def _alone(method):
    """Let one thread of Python at a time compute: they share the kernels' working memory."""

    @functools.wraps(method)
    def locked(*args):
        with _computing:
            return method(*args)

    return locked


class _Convolution(Node):
    """A convolution by itself, without what is computed along with it in a layer."""

    def __init__(self, backend: OneDNN, stride: int) -> None:
        super().__init__()
        self.backend, self.stride = backend, stride

    def reference(self, x, W):
        return REFERENCE.convolution(x, W, stride=self.stride)

    @_alone
    def forward(self, inputs):
        self.retain_inputs((0, 1))
        x, w = inputs
        self.convolution = self.backend.prepare(x.shape, len(w), self.stride)
        y = _empty_rows(self.convolution.out_shape)
        x = _rows(_channels_last(x))
        self.convolution.convolve(x, _NOTHING, _NO_ROWS, _NO_ROWS, w, y)
        return (_images(y, self.convolution.out_shape),)

    @_alone
    def gradients(self, indexes, gy, before):
        x, w = (v.array for v in self.get_retained_inputs())
        g, gw = _rows(_channels_last(gy)), np.empty_like(w)
        gx = _empty_rows(x.shape) if 0 in indexes else _NO_ROWS
        as_it_is = np.zeros((3, g.shape[2]), np.float32)  # 1 * g + 0 * g + 0
        as_it_is[0] = 1
        rows = _rows(_channels_last(x))
        self.convolution.gradients(g, g, as_it_is, rows, _NOTHING, _NO_ROWS, w, gw, gx, adds=False)
        results = {1: gw}
        if 0 in indexes:
            results[0] = _images(gx, x.shape)
        return accumulated(indexes, results, before)


class _Done(NamedTuple):
    """What a layer leaves for the way back."""

    convolution: primitives.Convolution
    h: np.ndarray  # rows of what the convolution wrote
    normalization: np.ndarray  # of h, from kernels.scale_and_shift


class _Layers(Node):
    """Layers in a row, with shortcuts around some of them.

    What lies between two layers is kept only where a shortcut begins or ends; elsewhere it is made
    again from what the convolution wrote, part of the batch by part, in the cache. "Input i" is
    what layer i reads; the last one is the output.
    """

    def __init__(
        self, backend: OneDNN, layers: Sequence[Layer], starts: dict[int, list[int]]
    ) -> None:
        super().__init__()
        self.backend, self.starts = backend, starts
        self.strides = [layer.stride for layer in layers]
        self.bns = [layer.bn for layer in layers]
        self.decays = [layer.bn.decay if layer.normalization.counts else 1.0 for layer in layers]
        self.trains = chainer.config.train

    def reference(self, *parameters):
        inputs = [parameters[0]]
        for i, (stride, bn) in enumerate(zip(self.strides, self.bns, strict=True)):
            W, gamma, beta = parameters[3 * i + 1 : 3 * i + 4]
            y = REFERENCE.convolution(inputs[i], W, stride=stride)
            y = normalized(y, gamma, beta, bn, self.trains)
            for start in self.starts.get(i + 1, ()):
                y += widened(inputs[start], y)
            inputs.append(F.relu(y))
        return inputs[-1]

    @_alone
    def forward(self, inputs):
        self.retain_inputs(tuple(range(len(inputs))))
        x, *parameters = inputs
        self.shapes = [x.shape]  # of input i
        self.kept = {0: _rows(_channels_last(x))}  # the rows of input i, if they are kept
        self.done: list[_Done] = []
        starts, begins = self.starts, set().union(*self.starts.values())
        h, normalization = self.kept[0], _NOTHING
        for i, stride in enumerate(self.strides):
            w, gamma, beta = parameters[3 * i : 3 * i + 3]
            convolution = self.backend.prepare(self.shapes[i], len(w), stride)
            y = _empty_rows(convolution.out_shape)
            if i > 0 and (i in starts or i in begins):
                self.kept[i] = np.empty_like(h)
            shortcut, out = self._shortcut(i), self.kept.get(i, _NO_ROWS)
            parts = convolution.convolve(h, normalization, shortcut, out, w, y)
            h, normalization = y, self._normalization(i, parts, convolution, gamma, beta)
            self.shapes.append(convolution.out_shape)
            if chainer.config.enable_backprop:
                self.done.append(_Done(convolution, h, normalization))
            else:
                later = set().union(*(some for end, some in starts.items() if end > i))
                self.kept = {k: rows for k, rows in self.kept.items() if k in later}
        last = len(self.bns)
        self.kept[last] = np.empty_like(h)
        kernels.finish(h, normalization, self._shortcut(last), self.kept[last])
        return (_images(self.kept[last], self.shapes[last]),)

    def _shortcut(self, end: int) -> np.ndarray:
        """The sum of the shortcuts that end at input ``end``, of its shape."""
        starts = self.starts.get(end, ())
        rows = [_widen(self.kept[i], self.shapes[i], self.shapes[end]) for i in starts]
        if len(rows) < 2:
            return rows[0] if rows else _NO_ROWS
        total = rows[0].copy()
        for more in rows[1:]:
            kernels.add(more, total)
        return total

    def _normalization(self, i: int, parts, convolution, gamma, beta) -> np.ndarray:
        """scale, shift, mean and 1 / deviation, each repeated for the pixels that a row joins."""
        n, channels, *size = convolution.out_shape
        width, bn = parts.shape[2], self.bns[i]
        if self.trains:
            pixels = math.prod(size) // (width // channels)
            mean, var = kernels.batch_statistics(
                parts, convolution.images, n, pixels, bn.avg_mean, bn.avg_var, self.decays[i]
            )
        else:
            mean, var = bn.avg_mean, bn.avg_var
        return kernels.scale_and_shift(mean, var, gamma, beta, np.float32(bn.eps), width)

    @_alone
    def gradients(self, indexes, gy, before):
        weights = [v.array for v in self.get_retained_inputs()[1::3]]
        last = len(self.bns)
        convolution, h, normalization = self.done[-1]
        gy = _rows(_channels_last(gy))
        g = np.empty_like(gy)  # of what layer i normalized
        parts = kernels.output_gradient(
            convolution.images, h, gy, self.kept[last], normalization[2], g
        )
        results = {}
        added = {}  # by shortcuts, to the gradient of input i
        for i in reversed(range(last)):
            for start in self.starts.get(i + 1, ()):
                more = _shortcut_gradient(g, self.shapes[i + 1], self.shapes[start])
                if more is g and any(other is g for other in added.values()):
                    more = g.copy()  # g itself will be added to once, after this layer has read it
                    if added.get(start) is g:
                        added[start], more = more, g
                if start in added:
                    kernels.add(more, added[start])
                else:
                    added[start] = more
            adds, gx = i in added, _NO_ROWS
            if i > 0 or 0 in indexes:
                gx = added.pop(i) if adds else np.empty(_row_shape(self.shapes[i]), np.float32)
            gw = results[1 + 3 * i] = np.empty(weights[i].shape, np.float32)
            results[2 + 3 * i], results[3 + 3 * i], parts = self._layer_gradients(
                i, weights[i], g, parts, gw, gx, adds
            )
            g = gx
        if 0 in indexes:
            results[0] = _images(g, self.shapes[0])
            earlier, *before = before
            if earlier is not None:  # the one sum that is large
                kernels.add(_rows(_channels_last(earlier)), g)
            before = [None, *before]
        return accumulated(indexes, results, before)

    def _layer_gradients(self, i, w, g, parts, gw, gx, adds):
        """Of layer i: writes gw and gx; those of gamma and beta, and the sums over gx."""
        convolution, h, normalization = self.done[i]
        n, channels, *size = convolution.out_shape
        ggamma, gbeta, coefficients = kernels.input_coefficients(
            parts, normalization, n * math.prod(size), channels, not self.trains
        )
        x, before, out = self.kept[0], _NOTHING, _NO_ROWS
        if i > 0:
            _, x, before = self.done[i - 1]
            out = self.kept.get(i, _NO_ROWS)
        parts = convolution.gradients(g, h, coefficients, x, before, out, w, gw, gx, adds)
        return ggamma, gbeta, parts


def _widen(rows: np.ndarray, shape: tuple[int, ...], wanted: tuple[int, ...]) -> np.ndarray:
    """A(rows): themselves, or subsampled with channels of zeros appended (option A)."""
    if shape == wanted:
        return rows
    n, c, h, w = wanted
    y = np.empty((n, h, w, c), np.float32)
    kernels.widen(_nhwc(rows, shape), step(shape[2:], wanted[2:]), y)
    return y.reshape(_row_shape(wanted))


def _shortcut_gradient(g, shape: tuple[int, ...], wanted: tuple[int, ...]) -> np.ndarray:
    """Gradient of the rows of ``_widen``, of shape ``wanted``, from that of its result."""
    if shape == wanted:
        return g
    n, c, h, w = wanted
    gx = np.empty((n, h, w, c), np.float32)
    kernels.widen_gradient(_nhwc(g, shape), step(wanted[2:], shape[2:]), gx)
    return gx.reshape(_row_shape(wanted))


def _nhwc(rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    n, c, h, w = shape
    return rows.reshape(n, h, w, c)


class _AddReLU(Node):
    """relu(x + A(shortcut))."""

    def reference(self, x, shortcut):
        return F.relu(x + widened(shortcut, x))

    def forward(self, inputs):
        self.retain_inputs((0, 1))
        x, shortcut = inputs
        self.y = _empty_rows(x.shape)
        added = _widen(_rows(_channels_last(shortcut)), shortcut.shape, x.shape)
        kernels.add_relu(_rows(_channels_last(x)), added, self.y)
        return (_images(self.y, x.shape),)

    def gradients(self, indexes, gy, before):
        x, shortcut = self.get_retained_inputs()
        g = np.empty_like(self.y)
        kernels.masked(_rows(_channels_last(gy)), self.y, g)
        other = _shortcut_gradient(g, x.shape, shortcut.shape)
        results = _images(g, x.shape), _images(other, shortcut.shape)
        return accumulated(indexes, results, before)


class _Gated(Node):
    """h T + x (1 - T) with T = sigmoid(z)."""

    def reference(self, h, x, z):
        return REFERENCE.gated(h, x, z)

    def forward(self, inputs):
        self.retain_inputs((0, 1, 2))
        y = _empty_rows(inputs[0].shape)
        kernels.gated(*(_rows(_channels_last(each)) for each in inputs), y)
        return (_images(y, inputs[0].shape),)

    def gradients(self, indexes, gy, before):
        inputs = [_rows(_channels_last(v.array)) for v in self.get_retained_inputs()]
        results = [np.empty_like(each) for each in inputs]
        kernels.gated_gradients(*inputs, _rows(_channels_last(gy)), *results)
        return accumulated(indexes, [_images(each, gy.shape) for each in results], before)


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
