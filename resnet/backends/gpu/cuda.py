"""The CUDA backend: cuDNN's convolutions, and kernels of our own for what lies between them.

Activations stay channels last from the first convolution to the pooling, float32 or, with
precision fp16, float16; weights, statistics, pooled features, loss and optimizer are float32
always. A float16 gradient is ``SCALE`` times the gradient, so that small ones are not lost; a
float32 gradient is the gradient. What does not fit is handed to Chainer's own functions.

Kernels are in ``kernels.cu``, built by CuPy at run time; convolutions in ``cudnn.py``.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import chainer
import numpy as np
from chainer import functions as F

from resnet.backends.flat import FlatMomentumSGD
from resnet.backends.fused import Fused, Layer, Unfinished
from resnet.backends.gpu import cudnn
from resnet.backends.gpu.cudnn import Missing
from resnet.backends.node import Node, accumulated, normalized
from resnet.backends.reference import REFERENCE, widened

ARRAY = chainer.backends.cuda.ndarray  # CuPy's; a stand-in of Chainer's where there is none
SOURCE = Path(__file__).with_name("kernels.cu")
THREADS = 256  # per block, as in kernels.cu
BLOCKS = 256  # of a sum: enough for a large GPU, few enough for one block to add their results
VECTORS = 4  # of 16 bytes: the least that a thread of a sum should have to add
SCALE = 1024  # of float16 gradients: those of a mean over 128 images are about 1e-7 to 1e-3

OF_ACTIVATIONS = ("moments", "normalize", "gradient_sums", "input_gradient", "masked", "add",
                  "shortcut_gradient", "pack", "unpack", "average", "average_gradient")  # fmt: skip
OF_FLOATS = ("fixed_moments", "linear", "linear_input_gradient", "linear_gradients",
             "cross_entropy", "multiply", "find_overflow", "momentum_step",
             "count_overflow", "augment", "centre", "finish_step")  # fmt: skip
TYPES = {np.dtype("f4"): "float", np.dtype("f2"): "Half"}
KERNELS = (*(f"{name}<{type}>" for name in OF_ACTIVATIONS for type in TYPES.values()), *OF_FLOATS)


def available() -> tuple[bool, str]:
    """Whether this backend can run here, and one line that says what it is or what is missing."""
    problem = _without_gpu()
    if problem:
        return False, problem
    try:
        version = cudnn.version()
    except Missing as reason:
        return False, str(reason)
    return True, f"cuDNN {version}, CuPy {chainer.cuda.cupy.__version__}"


def count_gpus() -> int:
    """GPUs that CuPy can compute on; 0 without CuPy, too."""
    if not chainer.cuda.available:
        return 0
    try:
        return _xp().cuda.runtime.getDeviceCount()
    except _xp().cuda.runtime.CUDARuntimeError:  # CuPy and CUDA are here, but no driver
        return 0


def _without_gpu() -> str | None:
    """Why CuPy cannot compute here, in one line, or None."""
    if count_gpus():
        return None
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is missing: pip install 'cupy-cuda13x[ctk]>=14'"
    if chainer.cuda.available:
        return "CuPy finds no GPU or no driver"
    try:
        chainer.cuda.check_cuda_available()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("#installation).")[2]
    return f"CuPy misses libraries ({reason}): pip install 'cupy-cuda13x[ctk]>=14', or -cuda12x"


class Cuda(Fused):
    """cuDNN's convolutions and our kernels; nothing to prepare, all is built when first needed.

    Args:
        precision: One of ``cudnn.PRECISIONS``.

    Attributes:
        dtype: Type of the activations.
    """

    def __init__(self, precision: str = "tf32") -> None:
        self.precision = precision
        self.dtype = np.dtype("f2" if precision == "fp16" else "f4")

    def describe(self) -> str:
        return f"cuda ({available()[1]}, {self.precision})"

    def float32(self, x):
        return _Cast(self).apply((x,))[0] if x.dtype == np.float16 else x

    def fits(self, x, W) -> bool:
        images = () if isinstance(x, Unfinished) else (x,)
        channels, _, *size = W.shape
        return (
            self._are_activations(*images)
            and _are_floats(W)
            and size == [cudnn.KERNEL] * 2
            and channels % _width(self.dtype) == 0
            and channels <= THREADS
        )

    def convolution(self, x, W, b=None, stride: int = 1):
        if not self.fits(x, W):
            return REFERENCE.convolution(self.float32(chainer.as_variable(x)), W, b, stride)
        return super().convolution(x, W, b, stride)

    def convolve(self, x, W, stride: int):
        return REFERENCE.convolution(self.float32(x), W, stride=stride)

    def normalization(self, x, bn):
        return super().normalization(x if isinstance(x, Unfinished) else self.float32(x), bn)

    def relu(self, x):
        return self.finished(super().relu(x))  # nothing spans two layers

    def layer(self, layer: Layer):
        bn, images = layer.bn, [layer.x]
        if layer.shortcut is not None:
            images.append(layer.shortcut)
        if (
            not self._are_activations(*images)
            or not _are_floats(bn.gamma, bn.beta, bn.avg_mean, bn.avg_var)
            or any(x.shape[1] % _width(self.dtype) for x in images[1:])
        ):
            return self.one_by_one(layer)
        x, *shortcut = images
        return _Layer(self, layer).apply((x, layer.W, bn.gamma, bn.beta, *shortcut))[0]

    def add_relu(self, x, shortcut):
        arrays = _arrays(x, shortcut)
        width = _width(self.dtype)
        fits = all(a.dtype == self.dtype and a.shape[1] % width == 0 for a in arrays)
        if not fits or not self._are_activations(*arrays):
            x, shortcut = map(self.float32, (x, shortcut))
            return REFERENCE.relu(x + widened(shortcut, x))
        return _AddReLU(self).apply((x, shortcut))[0]

    def average_pooling(self, x):
        (array,) = _arrays(x)
        if not self._are_activations(array) or array.dtype != self.dtype:
            return REFERENCE.average_pooling(self.float32(x))
        return _AveragePooling(self).apply((x,))[0]

    def linear(self, x, W, b):
        if not _are_floats(x, W, b):
            return REFERENCE.linear(x, W, b)
        return _Linear(self).apply((x, W, b))[0]

    def softmax_cross_entropy(self, y, t):
        (t,) = _arrays(t)
        if not _are_floats(y) or not isinstance(t, ARRAY) or t.dtype != np.int32:
            return REFERENCE.softmax_cross_entropy(y, t)
        return _SoftmaxCrossEntropy(self, t).apply((y,))[0]

    def momentum_sgd(self, network, momentum: float, weight_decay: float):
        if not _are_floats(*network.params()):
            return REFERENCE.momentum_sgd(network, momentum, weight_decay)
        return _FlatMomentumSGD(momentum, weight_decay, self.dtype).setup(network)

    def _are_activations(self, *variables) -> bool:
        """Whether every kernel can take these images as they are, or once they are packed."""
        width = _width(self.dtype)
        return all(
            isinstance(a, ARRAY)
            and a.size
            and a.dtype in (np.float32, self.dtype)
            and (a.dtype == np.float32 or a.shape[1] % width == 0)
            for a in _arrays(*variables)
        )


@functools.cache
def _module():
    return chainer.cuda.cupy.RawModule(
        code=SOURCE.read_text(), options=("-std=c++17",), name_expressions=KERNELS
    )


@functools.cache
def _function(name: str):
    return _module().get_function(name)


def _launch(name: str, threads: int, *arguments) -> None:
    """Run a kernel in at least so many threads; None is a null pointer."""

    def argument(value):
        if value is None:
            return np.intp(0)
        return {int: np.int32, float: np.float32}.get(type(value), lambda v: v)(value)

    blocks = -(-threads // THREADS)
    _function(name)((blocks,), (THREADS,), tuple(map(argument, arguments)))


def _launch_on(x, name: str, threads: int, *arguments) -> None:
    """The same for a kernel that comes in two types: that of the activations x."""
    _launch(f"{name}<{TYPES[x.dtype]}>", threads, *arguments)


def _width(dtype) -> int:
    """Values of 16 bytes: channels are a multiple of it."""
    return 16 // np.dtype(dtype).itemsize


def _unscale(dtype) -> float:
    """What a gradient of this type is multiplied by to be the gradient."""
    return 1 / SCALE if dtype == np.float16 else 1.0


def _arrays(*variables) -> list:
    return [getattr(v, "array", v) for v in variables]


def _are_floats(*variables) -> bool:
    return all(
        isinstance(a, ARRAY) and a.dtype == np.float32 and a.size for a in _arrays(*variables)
    )


def _rows(x):
    """A logical (N, C, H, W) as (N, H, W, C) in the order of its memory; a copy if it must be."""
    return _xp().ascontiguousarray(x.transpose(0, 2, 3, 1))


def _images(rows):
    """(N, H, W, C) as a logical (N, C, H, W)."""
    return rows.transpose(0, 3, 1, 2)


def _packed(x, channels: int, dtype):
    """float32 (N, C, H, W) of any strides as (N, H, W, channels), zeros appended."""
    n, c, h, w = x.shape
    y = _xp().empty((n, h, w, channels), dtype)
    strides = (stride // x.itemsize for stride in x.strides)
    _launch_on(y, "pack", y.size, x, y, y.size, c, h, w, channels, *strides)
    return y


def _unpacked(x, y, factor: float) -> None:
    """Fill float32 (N, C, H, W) from (N, H, W, at least C)."""
    _, c, h, w = y.shape
    _launch_on(x, "unpack", y.size, x, y, y.size, c, h * w, x.shape[3], factor)


def _activation(x, dtype):
    """(N, C, H, W) as (N, H, W, C) of the type of the activations, C widened to fit."""
    channels = -(-x.shape[1] // _width(dtype)) * _width(dtype)
    if x.dtype == dtype and x.shape[1] == channels:
        return _rows(x)
    return _packed(x, channels, dtype)


def _as_gradient_of(x, rows):
    """The gradient of x, given that of its ``_activation``."""
    if rows.dtype == x.dtype and rows.shape[3] == x.shape[1]:
        return _images(rows)
    gx = _xp().empty(x.shape, x.dtype)
    _unpacked(rows, gx, _unscale(rows.dtype))
    return gx


def _blocks(rows, channels: int) -> tuple[int, int]:
    """Blocks that a sum over the rows is divided among, and rows of a block."""
    vectors = rows.size // _width(rows.dtype)
    count = rows.size // channels
    blocks = max(1, min(BLOCKS, vectors // (THREADS * VECTORS), count))
    chunk = -(-count // blocks)
    return -(-count // chunk), chunk


@functools.cache
def _arrived():
    """The counter with which the last block of a sum finds out that it is the last."""
    return _xp().zeros(1, np.uint32)


def _xp():
    return chainer.cuda.cupy


def _geometry(y, shortcut) -> tuple[int, ...]:
    """Height and width of y, step of option A, height, width and channels of the shortcut."""
    _, height, width, _ = y.shape
    _, *size, channels = y.shape if shortcut is None else shortcut.shape
    return height, width, -(-size[0] // height), *size, channels


def _normalize(x, stats, shortcut, y) -> None:
    channels = x.shape[3]
    rows, width = x.size // channels, _width(x.dtype)
    shape = _geometry(y, shortcut)
    _launch_on(x, "normalize", x.size // width, x, stats, shortcut, y, rows, channels, *shape)


def _shortcut_gradient(g, shape: tuple[int, ...]):
    """Gradient of a shortcut (N, H, W, C) from that of A(shortcut)."""
    if g.shape == shape:
        return g
    gx = _xp().empty(shape, g.dtype)
    rows = gx.size // shape[3]
    threads = gx.size // _width(g.dtype)
    arguments = (rows, g.shape[3], *_geometry(g, gx))
    _launch_on(g, "shortcut_gradient", threads, g, gx, *arguments)
    return gx


class _Node(Node):
    def __init__(self, backend: Cuda) -> None:
        super().__init__()
        self.backend = backend

    def backward_accumulate(self, indexes, grad_outputs, grad_inputs):
        if chainer.config.enable_backprop and self.backend.dtype == np.float16:
            raise RuntimeError("gradients of gradients: not in fp16; legal: fp32 and tf32")
        return super().backward_accumulate(indexes, grad_outputs, grad_inputs)

    def place(self, index: int, earlier):
        """Where to put the gradient of a parameter: in the optimizer's flat array if it may."""
        parameter = self.inputs[index].get_variable_or_none()
        place = getattr(parameter, "place_of_gradient", None)
        if place is not None and earlier is None:  # else what is there is still needed
            return place
        return _xp().empty(self.inputs[index].shape, np.float32)


class _Layer(_Node):
    """relu(BN(convolution(x, W)) + A(shortcut)), with the statistics of the batch if it trains."""

    def __init__(self, backend: Cuda, layer: Layer) -> None:
        super().__init__(backend)
        self.bn, self.stride = layer.bn, layer.stride
        self.trains = chainer.config.train

    def reference(self, x, w, gamma, beta, shortcut=None):
        h = REFERENCE.convolution(x, w, stride=self.stride)
        y = normalized(h, gamma, beta, self.bn, self.trains)
        return F.relu(y if shortcut is None else y + widened(shortcut, y))

    def forward(self, inputs):
        self.retain_inputs(tuple(range(len(inputs))))
        x, w, gamma, beta, *shortcut = inputs
        bn, xp, dtype = self.bn, _xp(), self.backend.dtype
        self.x = _activation(x, dtype)
        n, height, width, channels_in = self.x.shape
        shape, channels = (n, channels_in, height, width), len(w)
        self.filters = _packed(w, channels_in, dtype)
        self.convolution = cudnn.convolution(shape, channels, self.stride, self.backend.precision)
        _, _, height, width = self.convolution.out_shape
        self.h = h = xp.empty((n, height, width, channels), dtype)
        self.convolution.forward(self.x, self.filters, h)
        self.stats = xp.empty((4, channels), np.float32)
        averages = bn.avg_mean, bn.avg_var
        if self.trains:
            (blocks, chunk), count = _blocks(h, channels), h.size // channels
            parts = xp.empty((blocks, 2, channels), np.float32)
            sums = h, count, channels, chunk, parts, _arrived()
            moments = gamma, beta, float(bn.eps), float(bn.decay), *averages, self.stats
            _launch_on(h, "moments", blocks * THREADS, *sums, *moments)
        else:
            moments = gamma, beta, float(bn.eps), *averages, channels, self.stats
            _launch("fixed_moments", channels, *moments)
        self.y = xp.empty_like(h)
        self.shortcut = _activation(shortcut[0], dtype) if shortcut else None
        _normalize(h, self.stats, self.shortcut, self.y)
        y = _images(self.y)
        if not shortcut:  # its mask is computed again: to read y costs more
            self.y = None
        return (y,)

    def gradients(self, indexes, gy, before):
        x, _, gamma, _, *shortcut = (v.array for v in self.get_retained_inputs())
        earlier = dict(zip(indexes, before, strict=True))
        xp, h, stats, gy = _xp(), self.h, self.stats, _rows(gy)
        channels = h.shape[3]
        (blocks, chunk), count = _blocks(h, channels), h.size // channels
        g = xp.empty_like(gy) if shortcut else None
        coefficients = xp.empty((3, channels), np.float32)
        results = {i: self.place(i, earlier.get(i)) for i in (1, 2, 3)}
        unscale = _unscale(h.dtype)
        parts = xp.empty((blocks, 2, channels), np.float32)
        images = h, gy, self.y, g, stats, gamma, count, channels, chunk, parts, _arrived()
        sums = int(self.trains), unscale, results[2], results[3], coefficients
        _launch_on(h, "gradient_sums", blocks * THREADS, *images, *sums)
        gh = xp.empty_like(h)
        masked = (g, None) if shortcut else (gy, stats)
        threads = h.size // _width(h.dtype)
        arguments = (h, *masked, coefficients, gh, count, channels)
        _launch_on(h, "input_gradient", threads, *arguments)
        filters = xp.empty_like(self.filters)
        self.convolution.backward_weights(self.x, gh, filters)
        _unpacked(filters, results[1], unscale)
        if 4 in earlier:
            rows = _shortcut_gradient(g, self.shortcut.shape)  # or g, which has been read by now
            results[4] = self.sum(_as_gradient_of(shortcut[0], rows), earlier[4])
            earlier[4] = None
        if 0 in earlier:
            gx = xp.empty_like(self.x)
            self.convolution.backward_data(gh, self.filters, gx)
            results[0] = self.sum(_as_gradient_of(x, gx), earlier[0])
            earlier[0] = None
        return accumulated(indexes, results, earlier.values())

    def sum(self, gx, earlier):
        """gx, which is not in use elsewhere, plus the gradient that was there before or None."""
        if earlier is None:
            return gx
        if gx.dtype != self.backend.dtype or gx.shape[1] % _width(gx.dtype):
            return gx + earlier
        total, rows = _rows(gx), _rows(earlier)
        _launch_on(rows, "add", rows.size // _width(rows.dtype), rows, total, rows.size)
        return _images(total)


class _Cast(_Node):
    """float16 activations as float32 ones; their gradient as the scaled one."""

    def forward(self, inputs):
        (x,) = inputs
        return (x.astype(np.float32),)

    def gradients(self, indexes, gy, before):
        return accumulated(indexes, {0: (gy * np.float32(SCALE)).astype(np.float16)}, before)


class _AddReLU(_Node):
    """relu(x + A(shortcut))."""

    def reference(self, x, shortcut):
        return F.relu(x + widened(shortcut, x))

    def forward(self, inputs):
        self.retain_inputs((0, 1))
        x, shortcut = map(_rows, inputs)
        self.y = _xp().empty_like(x)
        _normalize(x, None, shortcut, self.y)
        return (_images(self.y),)

    def gradients(self, indexes, gy, before):
        gy = _rows(gy)
        g = _xp().empty_like(gy)
        _launch_on(g, "masked", g.size // _width(g.dtype), gy, self.y, g, g.size)
        n, c, h, w = self.get_retained_inputs()[1].shape
        results = _images(g), _images(_shortcut_gradient(g, (n, h, w, c)))
        return accumulated(indexes, results, before)


class _AveragePooling(_Node):
    """Mean over the pixels, float32."""

    def reference(self, x):
        return REFERENCE.average_pooling(x)

    def forward(self, inputs):
        self.retain_inputs((0,))
        x = _rows(inputs[0])
        n, h, w, c = x.shape
        y = _xp().empty((n, c), np.float32)
        _launch_on(x, "average", y.size, x, y, y.size, c, h * w)
        return (y,)

    def gradients(self, indexes, gy, before):
        (x,) = self.get_retained_inputs()
        n, c, h, w = x.shape
        gx = _xp().empty((n, h, w, c), x.dtype)
        factor = 1 / _unscale(x.dtype) / (h * w)
        gy = _xp().ascontiguousarray(gy)
        _launch_on(gx, "average_gradient", gx.size, gy, gx, gx.size, c, h * w, factor)
        return accumulated(indexes, [_images(gx)], before)


class _Linear(_Node):
    """x W^T + b."""

    def reference(self, x, w, b):
        return REFERENCE.linear(x, w, b)

    def forward(self, inputs):
        self.retain_inputs((0, 1, 2))
        x, w, b = map(_xp().ascontiguousarray, inputs)
        (rows, channels), classes = x.shape, len(w)
        y = _xp().empty((rows, classes), np.float32)
        _launch("linear", y.size, x, w, b, y, rows, classes, channels)
        return (y,)

    def gradients(self, indexes, gy, before):
        x, w, _ = (_xp().ascontiguousarray(v.array) for v in self.get_retained_inputs())
        gy = _xp().ascontiguousarray(gy)
        earlier = dict(zip(indexes, before, strict=True))
        shape = len(x), len(w), x.shape[1]
        results = {0: _xp().empty_like(x), **{i: self.place(i, earlier.get(i)) for i in (1, 2)}}
        sums = results[1].size + results[2].size
        _launch("linear_gradients", sums * THREADS, x, gy, results[1], results[2], *shape)
        if 0 in earlier:
            _launch("linear_input_gradient", x.size, gy, w, results[0], *shape)
        return accumulated(indexes, results, before)


class _SoftmaxCrossEntropy(_Node):
    """Mean cross entropy; its gradient is computed along with it."""

    def __init__(self, backend: Cuda, t) -> None:
        super().__init__(backend)
        self.t = t

    def reference(self, y):
        return F.softmax_cross_entropy(y, self.t, enable_double_backprop=True)

    def forward(self, inputs):
        self.retain_inputs((0,))
        y, t = map(_xp().ascontiguousarray, (inputs[0], self.t))
        loss = _xp().empty((), np.float32)
        self.g = _xp().empty_like(y)
        _launch("cross_entropy", THREADS, y, t, *y.shape, loss, self.g)
        return (loss,)

    def gradients(self, indexes, gy, before):
        g = _xp().empty_like(self.g)
        _launch("multiply", g.size, self.g, gy, g, g.size)
        return accumulated(indexes, [g], before)


class _FlatMomentumSGD(FlatMomentumSGD):
    """Gradients are written straight to their places, and stay there until the next backward pass.

    See ``_Node.place``.

    Attributes:
        rate: The rate of the coming step, float32 (1,) on the GPU.
        skipped: How many steps were not taken because a gradient was infinite or no number, which
            float16 ones may be; int64 () on the GPU. None at another precision: all are taken.
    """

    def __init__(self, momentum: float, weight_decay: float, dtype) -> None:
        super().__init__(momentum, weight_decay)
        self.rate = _xp().zeros(1, np.float32)
        self._sent = 0.0
        halves = dtype == np.float16
        self.skipped = _xp().zeros((), np.int64) if halves else None
        self._overflow = _xp().zeros(1, np.int32) if halves else None

    def send_rate(self) -> None:
        """Bring ``lr`` to the GPU; a captured step reads it there."""
        if self.lr != self._sent:
            self.rate.fill(self.lr)
            self._sent = self.lr

    def step(self) -> None:
        self.send_rate()
        size = self.values.size
        arrays = self.values, self.gradients, self.velocities, self.rate, self._overflow
        numbers = float(self.momentum), float(self.weight_decay), size
        if self.skipped is not None:
            _launch("find_overflow", size, self.gradients, self._overflow, size)
        _launch("momentum_step", size, *arrays, *numbers)
        if self.skipped is not None:
            _launch("count_overflow", 1, self._overflow, self.skipped)

    def gather(self, parameter, place) -> None:
        if parameter.grad is not parameter.place_of_gradient:
            place[...] = parameter.grad.ravel()

    def _flatten(self) -> None:
        super()._flatten()
        for parameter, part in self._parts:
            gradient = None if part is None else self.gradients[part].reshape(parameter.shape)
            parameter.place_of_gradient = gradient
