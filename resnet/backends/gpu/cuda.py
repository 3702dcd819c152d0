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

import chainer
import numpy as np
from chainer import functions as F

from resnet.backends.flat import FlatMomentumSGD
from resnet.backends.fused import Convolution, Fused, Layer, Sum, Unfinished, is_waiting
from resnet.backends.gpu import cudnn, programs, tensor_cores
from resnet.backends.gpu.cudnn import Missing
from resnet.backends.gpu.programs import THREADS, launch, launch_on
from resnet.backends.node import Node, accumulated, normalized
from resnet.backends.reference import REFERENCE, step, widened

BLOCKS = 256  # of a sum: enough for a large GPU, few enough for one block to add their results
VECTORS = 4  # of 16 bytes: the least that a thread of a sum should have to add
SCALE = 1024  # of float16 gradients: those of a mean over 128 images are about 1e-7 to 1e-3


def available() -> tuple[bool, str]:
    """Whether this backend can run here, and one line that says what it is or what is missing."""
    problem = why_no_gpu()
    if problem:
        return False, problem
    try:
        version = cudnn.version()
    except Missing as reason:
        return False, str(reason)
    return True, f"cuDNN {version}, CuPy {chainer.cuda.cupy.__version__}"


def count_gpus() -> int:
    """GPUs that CuPy can compute on; 0 without CuPy, too."""
    return 0 if why_no_gpu() else programs.cupy().cuda.runtime.getDeviceCount()


def why_no_gpu() -> str | None:
    """Why CuPy cannot compute here, in one line, or None."""
    if chainer.cuda.available:
        runtime = programs.cupy().cuda.runtime
        try:
            return None if runtime.getDeviceCount() else "CuPy finds no GPU"
        except runtime.CUDARuntimeError as error:  # CuPy and CUDA are here, but no driver
            words = " ".join(str(error).split())
            return f"CuPy finds no GPU or no driver new enough for its CUDA ({words})"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is missing: pip install 'cupy-cuda13x[ctk]>=14', or -cuda12x"
    try:
        chainer.cuda.check_cuda_available()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("#installation).")[2]
    return f"CuPy misses libraries ({reason}): pip install 'cupy-cuda13x[ctk]>=14', or -cuda12x"


class Cuda(Fused):
    """cuDNN's convolutions and our kernels; nothing to prepare, all is built when first needed.

    Args:
        precision: One of ``cudnn.PRECISIONS``.
        own: Whether to convolve with kernels of our own where there are some.

    Attributes:
        dtype: Type of the activations.
    """

    def __init__(self, precision: str = "tf32", own: bool = False) -> None:
        self.precision, self.own = precision, own
        self.dtype = np.dtype("f2" if precision == "fp16" else "f4")

    def describe(self) -> str:
        return f"{'tensorcores' if self.own else 'cuda'} ({available()[1]}, {self.precision})"

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
        return super().normalization(x if is_waiting(x, Convolution) else self.float32(x), bn)

    def relu(self, x):
        return self.finished(super().relu(x))  # nothing spans two layers

    def layer(self, layer: Layer):
        bn, images = layer.bn, [layer.x]
        if layer.shortcuts:
            images.append(self._added(layer.shortcuts))
        if (
            not self._are_activations(*images)
            or not _are_floats(bn.gamma, bn.beta, bn.avg_mean, bn.avg_var)
            or any(x.shape[1] % _width(self.dtype) for x in images[1:])
        ):
            return self.one_by_one(layer)
        x, *shortcut = images
        (y,) = _Layer(self, layer).apply((x, layer.W, bn.gamma, bn.beta, *shortcut))
        layer.normalization.counted()
        return y

    def add_relu(self, x, shortcut):
        y = self._add(x, shortcut, rectify=True)
        return REFERENCE.relu(self._sum(x, shortcut)) if y is None else y

    def compute(self, operation):
        match operation:
            case Sum(x, y) if x.dtype != y.dtype:  # a layer and what Chainer's functions computed
                return F.add(self.float32(x), self.float32(y))
        return super().compute(operation)

    def _added(self, shortcuts):
        """The sum of shortcuts, the widest of them widening the others."""
        total, *others = sorted(shortcuts, key=lambda x: -x.shape[1])
        for other in others:
            y = self._add(total, other, rectify=False)
            total = self._sum(total, other) if y is None else y
        return total

    def _sum(self, x, shortcut):
        x, shortcut = map(self.float32, (x, shortcut))
        return x + widened(shortcut, x)

    def _add(self, x, shortcut, rectify: bool):
        """x + A(shortcut), rectified or not; None where no kernel fits."""
        arrays = _arrays(x, shortcut)
        width = _width(self.dtype)
        fits = all(a.dtype == self.dtype and a.shape[1] % width == 0 for a in arrays)
        if not fits or not self._are_activations(*arrays):
            return None
        return _Add(self, rectify).apply((x, shortcut))[0]

    def average_pooling(self, x):
        (array,) = _arrays(x)
        if not self._are_activations(array) or array.dtype != self.dtype:
            return REFERENCE.average_pooling(self.float32(x))
        return _AveragePooling(self).apply((x,))[0]

    def linear(self, x, W, b):
        x = self.float32(x)
        if not _are_floats(x, W, b):
            return REFERENCE.linear(x, W, b)
        return _Linear(self).apply((x, W, b))[0]

    def softmax_cross_entropy(self, y, t):
        y, (t,) = self.float32(y), _arrays(t)
        if not _are_floats(y) or not isinstance(t, programs.ARRAY) or t.dtype != np.int32:
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
            isinstance(a, programs.ARRAY)
            and a.size
            and a.dtype in (np.float32, self.dtype)
            and (a.dtype == np.float32 or a.shape[1] % width == 0)
            for a in _arrays(*variables)
        )


def _width(dtype) -> int:
    """Values of 16 bytes: channels are a multiple of it."""
    return 16 // np.dtype(dtype).itemsize


def _unscale(dtype) -> float:
    """What a gradient of this type is multiplied by to be the gradient."""
    return 1 / SCALE if dtype == np.float16 else 1.0


def _arrays(*variables) -> list:
    return [getattr(v, "array", v) for v in variables]


def _are_floats(*variables) -> bool:
    arrays = _arrays(*variables)
    return all(isinstance(a, programs.ARRAY) and a.dtype == np.float32 and a.size for a in arrays)


def _rows(x):
    """A logical (N, C, H, W) as (N, H, W, C) in the order of its memory; a copy if it must be."""
    return programs.cupy().ascontiguousarray(x.transpose(0, 2, 3, 1))


def _images(rows):
    """(N, H, W, C) as a logical (N, C, H, W)."""
    return rows.transpose(0, 3, 1, 2)


def _packed(x, channels: int, dtype):
    """float32 (N, C, H, W) of any strides as (N, H, W, channels), zeros appended."""
    n, c, h, w = x.shape
    y = programs.cupy().empty((n, h, w, channels), dtype)
    strides = (stride // x.itemsize for stride in x.strides)
    launch_on(y, "pack", y.size, x, y, y.size, c, h, w, channels, *strides)
    return y


def _unpacked(x, y, factor: float) -> None:
    """Fill float32 (N, C, H, W) from (N, H, W, at least C)."""
    _, c, h, w = y.shape
    launch_on(x, "unpack", y.size, x, y, y.size, c, h * w, x.shape[3], factor)


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
    gx = programs.cupy().empty(x.shape, x.dtype)
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
    return programs.cupy().zeros(1, np.uint32)


def _geometry(y, shortcut) -> tuple[int, ...]:
    """Height and width of y, step of option A, height, width and channels of the shortcut."""
    _, height, width, _ = y.shape
    _, *size, channels = y.shape if shortcut is None else shortcut.shape
    return height, width, step(size, (height, width)), *size, channels


def _normalize(x, stats, shortcut, y, rectify: bool = True) -> None:
    channels = x.shape[3]
    rows, width = x.size // channels, _width(x.dtype)
    shape, numbers = _geometry(y, shortcut), (int(rectify), rows, channels)
    launch_on(x, "normalize", x.size // width, x, stats, shortcut, y, *numbers, *shape)


def _shortcut_gradient(g, shape: tuple[int, ...]):
    """Gradient of a shortcut (N, H, W, C) from that of A(shortcut)."""
    if g.shape == shape:
        return g
    gx = programs.cupy().empty(shape, g.dtype)
    rows = gx.size // shape[3]
    threads = gx.size // _width(g.dtype)
    arguments = (rows, g.shape[3], *_geometry(g, gx))
    launch_on(g, "shortcut_gradient", threads, g, gx, *arguments)
    return gx


class _Convolution:
    """The convolutions of a layer, by our kernels if they are asked for and there are some.

    Args:
        shape: (N, C, H, W) of the input in memory.
        channels: K, channels of the output.
        stride: 1 or 2.
        precision: As of ``cudnn.Convolution``.
        own: As of ``Cuda``.
    """

    def __init__(
        self, shape: tuple[int, ...], channels: int, stride: int, precision: str, own: bool
    ) -> None:
        self.cudnn = cudnn.Convolution(shape, channels, stride, precision)
        self.own = tensor_cores.find(shape, channels, stride, precision) if own else None
        self.out_shape = self.cudnn.out_shape

    def forward(self, x, w, y) -> None:
        """Fill y (N, H, W, K) with the convolution of x (N, H, W, C) and filters (K, C, 3, 3)."""
        if self.own is not None:
            self.own.forward(x, programs.cupy().ascontiguousarray(w), y)
            return
        self.cudnn.forward(x, self._filters(w, x), y)

    def backward_data(self, gy, w, gx) -> None:
        """Fill gx with the gradient of the input."""
        if self.own is not None and self.own.has_backward_data:
            self.own.backward_data(gy, programs.cupy().ascontiguousarray(w), gx)
            return
        self.cudnn.backward_data(gy, self._filters(w, gx), gx)

    def backward_weights(self, x, gy, gw) -> None:
        """Fill gw, float32 (K, C, 3, 3), with the gradient of the filters."""
        if self.own is not None:
            self.own.backward_weights(x, gy, gw, _unscale(x.dtype))
            return
        k, _, *size = gw.shape
        filters = programs.cupy().empty((k, *size, x.shape[3]), x.dtype)
        self.cudnn.backward_weights(x, gy, filters)
        _unpacked(filters, gw, _unscale(x.dtype))

    def _filters(self, w, x):
        """As cuDNN takes them: channels last, of the type and the channels of x."""
        return _packed(w, x.shape[3], x.dtype)


_convolution = functools.cache(_Convolution)


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
        return programs.cupy().empty(self.inputs[index].shape, np.float32)

    def sum(self, gx, earlier):
        """gx, which is not in use elsewhere, plus the gradient that was there before or None."""
        if earlier is None:
            return gx
        if gx.dtype != self.backend.dtype or gx.shape[1] % _width(gx.dtype):
            return gx + earlier
        total, rows = _rows(gx), _rows(earlier)
        launch_on(rows, "add", rows.size // _width(rows.dtype), rows, total, rows.size)
        return _images(total)


class _Layer(_Node):
    """relu(BN(convolution(x, W)) + A(shortcut)), with the statistics of the batch if it trains."""

    def __init__(self, backend: Cuda, layer: Layer) -> None:
        super().__init__(backend)
        self.bn, self.stride = layer.bn, layer.stride
        self.decay = layer.bn.decay if layer.normalization.counts else 1.0
        self.trains = chainer.config.train

    def reference(self, x, w, gamma, beta, shortcut=None):
        h = REFERENCE.convolution(x, w, stride=self.stride)
        y = normalized(h, gamma, beta, self.bn, self.trains)
        return F.relu(y if shortcut is None else y + widened(shortcut, y))

    def forward(self, inputs):
        self.retain_inputs(tuple(range(len(inputs))))
        x, w, gamma, beta, *shortcut = inputs
        bn, xp, dtype = self.bn, programs.cupy(), self.backend.dtype
        self.x = _activation(x, dtype)
        n, height, width, channels_in = self.x.shape
        shape, channels = (n, channels_in, height, width), len(w)
        kind = self.backend.precision, self.backend.own
        self.convolution = _convolution(shape, channels, self.stride, *kind)
        _, _, height, width = self.convolution.out_shape
        self.h = h = xp.empty((n, height, width, channels), dtype)
        self.convolution.forward(self.x, w, h)
        self.stats = xp.empty((4, channels), np.float32)
        averages = bn.avg_mean, bn.avg_var
        if self.trains:
            (blocks, chunk), count = _blocks(h, channels), h.size // channels
            parts = xp.empty((blocks, 2, channels), np.float32)
            sums = h, count, channels, chunk, parts, _arrived()
            moments = gamma, beta, float(bn.eps), float(self.decay), *averages, self.stats
            launch_on(h, "moments", blocks * THREADS, *sums, *moments)
        else:
            moments = gamma, beta, float(bn.eps), *averages, channels, self.stats
            launch("fixed_moments", channels, *moments)
        self.y = xp.empty_like(h)
        self.shortcut = _activation(shortcut[0], dtype) if shortcut else None
        _normalize(h, self.stats, self.shortcut, self.y)
        y = _images(self.y)
        if not shortcut:  # its mask is computed again: to read y costs more
            self.y = None
        return (y,)

    def gradients(self, indexes, gy, before):
        x, w, gamma, _, *shortcut = (v.array for v in self.get_retained_inputs())
        earlier = dict(zip(indexes, before, strict=True))
        xp, h, stats, gy = programs.cupy(), self.h, self.stats, _rows(gy)
        channels = h.shape[3]
        (blocks, chunk), count = _blocks(h, channels), h.size // channels
        g = xp.empty_like(gy) if shortcut else None
        coefficients = xp.empty((3, channels), np.float32)
        results = {i: self.place(i, earlier.get(i)) for i in (1, 2, 3)}
        unscale = _unscale(h.dtype)
        parts = xp.empty((blocks, 2, channels), np.float32)
        images = h, gy, self.y, g, stats, gamma, count, channels, chunk, parts, _arrived()
        sums = int(self.trains), unscale, results[2], results[3], coefficients
        launch_on(h, "gradient_sums", blocks * THREADS, *images, *sums)
        gh = xp.empty_like(h)
        masked = (g, None) if shortcut else (gy, stats)
        threads = h.size // _width(h.dtype)
        arguments = (h, *masked, coefficients, gh, count, channels)
        launch_on(h, "input_gradient", threads, *arguments)
        self.convolution.backward_weights(self.x, gh, results[1])
        if 4 in earlier:
            rows = _shortcut_gradient(g, self.shortcut.shape)  # or g, which has been read by now
            results[4] = self.sum(_as_gradient_of(shortcut[0], rows), earlier[4])
            earlier[4] = None
        if 0 in earlier:
            gx = xp.empty_like(self.x)
            self.convolution.backward_data(gh, w, gx)
            results[0] = self.sum(_as_gradient_of(x, gx), earlier[0])
            earlier[0] = None
        return accumulated(indexes, results, earlier.values())


class _Cast(_Node):
    """float16 activations as float32 ones; their gradient as the scaled one."""

    def forward(self, inputs):
        (x,) = inputs
        return (x.astype(np.float32),)

    def gradients(self, indexes, gy, before):
        return accumulated(indexes, {0: (gy * np.float32(SCALE)).astype(np.float16)}, before)


class _Add(_Node):
    """x + A(shortcut), rectified if wanted."""

    def __init__(self, backend: Cuda, rectify: bool) -> None:
        super().__init__(backend)
        self.rectify = rectify

    def reference(self, x, shortcut):
        y = x + widened(shortcut, x)
        return F.relu(y) if self.rectify else y

    def forward(self, inputs):
        self.retain_inputs((0, 1))
        x, shortcut = map(_rows, inputs)
        y = programs.cupy().empty_like(x)
        _normalize(x, None, shortcut, y, self.rectify)
        self.y = y if self.rectify else None
        return (_images(y),)

    def gradients(self, indexes, gy, before):
        gy = _rows(gy)
        n, c, h, w = self.get_retained_inputs()[1].shape

        def own():
            """The gradient of the sum, in an array that nobody else has."""
            g = programs.cupy().empty_like(gy)
            if self.rectify:
                launch_on(g, "masked", g.size // _width(g.dtype), gy, self.y, g, g.size)
            else:
                _normalize(gy, None, None, g, rectify=False)
            return g

        g = own()
        of_shortcut = _shortcut_gradient(g, (n, h, w, c))
        if of_shortcut is g and any(earlier is not None for earlier in before):
            of_shortcut = own()  # one of the two will be added to
        results = _images(g), _images(of_shortcut)
        return tuple(
            self.sum(results[i], earlier) for i, earlier in zip(indexes, before, strict=True)
        )


class _AveragePooling(_Node):
    """Mean over the pixels, float32."""

    def reference(self, x):
        return REFERENCE.average_pooling(x)

    def forward(self, inputs):
        self.retain_inputs((0,))
        x = _rows(inputs[0])
        n, h, w, c = x.shape
        y = programs.cupy().empty((n, c), np.float32)
        launch_on(x, "average", y.size, x, y, y.size, c, h * w)
        return (y,)

    def gradients(self, indexes, gy, before):
        (x,) = self.get_retained_inputs()
        n, c, h, w = x.shape
        gx = programs.cupy().empty((n, h, w, c), x.dtype)
        factor = 1 / _unscale(x.dtype) / (h * w)
        gy = programs.cupy().ascontiguousarray(gy)
        launch_on(gx, "average_gradient", gx.size, gy, gx, gx.size, c, h * w, factor)
        return accumulated(indexes, [_images(gx)], before)


class _Linear(_Node):
    """x W^T + b."""

    def reference(self, x, w, b):
        return REFERENCE.linear(x, w, b)

    def forward(self, inputs):
        self.retain_inputs((0, 1, 2))
        x, w, b = map(programs.cupy().ascontiguousarray, inputs)
        (rows, channels), classes = x.shape, len(w)
        y = programs.cupy().empty((rows, classes), np.float32)
        launch("linear", y.size, x, w, b, y, rows, classes, channels)
        return (y,)

    def gradients(self, indexes, gy, before):
        x, w, _ = (programs.cupy().ascontiguousarray(v.array) for v in self.get_retained_inputs())
        gy = programs.cupy().ascontiguousarray(gy)
        earlier = dict(zip(indexes, before, strict=True))
        shape = len(x), len(w), x.shape[1]
        results = {i: self.place(i, earlier.get(i)) for i in (1, 2)}
        results[0] = programs.cupy().empty_like(x)
        sums = results[1].size + results[2].size
        launch("linear_gradients", sums * THREADS, x, gy, results[1], results[2], *shape)
        if 0 in earlier:
            launch("linear_input_gradient", x.size, gy, w, results[0], *shape)
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
        y, t = map(programs.cupy().ascontiguousarray, (inputs[0], self.t))
        loss = programs.cupy().empty((), np.float32)
        self.g = programs.cupy().empty_like(y)
        launch("cross_entropy", THREADS, y, t, *y.shape, loss, self.g)
        return (loss,)

    def gradients(self, indexes, gy, before):
        g = programs.cupy().empty_like(self.g)
        launch("multiply", g.size, self.g, gy, g, g.size)
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
        self.rate = programs.cupy().zeros(1, np.float32)
        self._sent = 0.0
        halves = dtype == np.float16
        self.skipped = programs.cupy().zeros((), np.int64) if halves else None
        self._overflow = programs.cupy().zeros(1, np.int32) if halves else None

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
            launch("find_overflow", size, self.gradients, self._overflow, size)
        launch("momentum_step", size, *arrays, *numbers)
        if self.skipped is not None:
            launch("count_overflow", 1, self._overflow, self.skipped)

    def gather(self, parameter, place) -> None:
        if parameter.grad is not parameter.place_of_gradient:
            place[...] = parameter.grad.ravel()

    def _flatten(self) -> None:
        super()._flatten()
        for parameter, part in self._parts:
            gradient = None if part is None else self.gradients[part].reshape(parameter.shape)
            parameter.place_of_gradient = gradient
