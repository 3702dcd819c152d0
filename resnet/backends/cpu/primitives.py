"""oneDNN's convolutions, through the C API of its version 3 and ctypes.

Arrays are float32, logically NCHW, channels last in memory. A primitive is built once per shape
and kept; oneDNN chooses the layout of the weights, so they are reordered on their way in and out.
A convolution goes through a batch in parts of a few images, each of them computed by one thread, so
that what comes before and after it finds the part in the cache (see ``kernels``).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import importlib.metadata
import math
import os
import sys
from ctypes import byref, c_int, c_size_t, c_void_p
from typing import NamedTuple

import numpy as np

try:
    import llvmlite.binding

    from resnet.backends.cpu import kernels
except (ImportError, ValueError):  # without Numba, or settings of it that are illegal
    kernels = None

F32, CPU, IN_ORDER = 3, 1, 1  # dnnl_f32, dnnl_cpu, dnnl_stream_in_order
TAG_ANY = 1  # dnnl_format_tag_any: oneDNN chooses
FORWARD_TRAINING, DIRECT = 64, 1  # dnnl_forward_training, dnnl_convolution_direct
SCRATCHPAD_OF_USER = 1  # dnnl_scratchpad_mode_user
SRC, DST, WEIGHTS, DIFF_SRC, DIFF_DST, DIFF_WEIGHTS = 1, 17, 33, 129, 145, 161  # arguments
SCRATCHPAD = 80
QUERY_WEIGHTS, QUERY_DIFF_WEIGHTS, QUERY_SCRATCHPAD = 131, 132, 136  # dnnl_query_..._md
KERNEL, PAD = 3, 1
PART = 1 << 18  # bytes of the larger of a part's two arrays: a few of them fit the L2 cache


class Missing(Exception):
    """The library is not here, or not one that these calls fit."""


class _Argument(ctypes.Structure):
    _fields_ = (("index", c_int), ("memory", c_void_p))


class _Version(ctypes.Structure):
    _fields_ = (("major", c_int), ("minor", c_int), ("patch", c_int))


@functools.cache
def library() -> ctypes.CDLL:
    """oneDNN, loaded once.

    Raises:
        Missing: It is not installed, or its major version is not 3.
    """
    folders = {os.path.join(sys.prefix, "lib")}
    try:  # a wheel puts it under the prefix it was installed to
        for file in importlib.metadata.files("onednn-cpu-gomp") or ():
            if file.name.startswith("libdnnl.so.3"):
                folders.add(os.path.dirname(os.path.realpath(file.locate())))
    except importlib.metadata.PackageNotFoundError:
        pass
    # Threads that wait for each other spin for a while before they sleep. libgomp's default, some
    # milliseconds, stalls a step a hundredfold once another program wants the processors; this
    # many rounds cost a free machine some 2 % and a shared one a factor of 2 to 3.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    found = [path for folder in folders for path in sorted(glob.glob(f"{folder}/libdnnl.so.3*"))]
    for name in (*found, "libdnnl.so.3"):
        try:
            lib = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        raise Missing("oneDNN or its libgomp1 is missing: pip install onednn-cpu-gomp")
    lib.dnnl_version.restype = ctypes.POINTER(_Version)
    if lib.dnnl_version().contents.major != 3:
        raise Missing("oneDNN is not version 3")
    lib.dnnl_primitive_desc_query_md.restype = c_void_p
    lib.dnnl_primitive_desc_query_md.argtypes = (c_void_p, c_int, c_int)
    lib.dnnl_memory_desc_get_size.restype = c_size_t
    lib.dnnl_memory_desc_get_size.argtypes = (c_void_p,)
    for name in kernels.FUNCTIONS if kernels else ():  # what is compiled calls them by name
        llvmlite.binding.add_symbol(name, ctypes.cast(getattr(lib, name), c_void_p).value)
    return lib


def version() -> str:
    """Version of the library, such as 3.2.0."""
    v = library().dnnl_version().contents
    return f"{v.major}.{v.minor}.{v.patch}"


@contextlib.contextmanager
def _one_thread():
    """Primitives built in here run on the thread that calls them."""
    lib = library()
    before = lib.omp_get_max_threads()
    lib.omp_set_num_threads(c_int(1))
    yield
    lib.omp_set_num_threads(c_int(before))


def _create(function: str, *arguments: object) -> c_void_p:
    handle = c_void_p()
    status = getattr(library(), function)(byref(handle), *arguments)
    if status:
        raise RuntimeError(f"{function}: oneDNN status {status}")
    return handle


@functools.cache
def _engine() -> c_void_p:
    return _create("dnnl_engine_create", c_int(CPU), c_size_t(0))


def _dimensions(values) -> ctypes.Array:
    return (ctypes.c_int64 * 12)(*values)


def _strided(shape: tuple[int, ...], strides: tuple[int, ...]) -> c_void_p:
    name = "dnnl_memory_desc_create_with_strides"
    return _create(name, c_int(4), _dimensions(shape), c_int(F32), _dimensions(strides))


def _channels_last(shape: tuple[int, ...]) -> c_void_p:
    _, c, h, w = shape
    return _strided(shape, (h * w * c, 1, w * c, c))


def _plain(shape: tuple[int, ...]) -> c_void_p:
    _, c, h, w = shape
    return _strided(shape, (c * h * w, h * w, w, 1))


def _chosen(shape: tuple[int, ...]) -> c_void_p:
    name = "dnnl_memory_desc_create_with_tag"
    return _create(name, c_int(4), _dimensions(shape), c_int(F32), c_int(TAG_ANY))


class _Primitive:
    """A primitive and one memory object for each argument, to be pointed at arrays on each call."""

    def __init__(self, descriptor: c_void_p, arguments: list[tuple[int, c_void_p]]) -> None:
        self.primitive = _create("dnnl_primitive_create", descriptor)
        self.memories = [
            _create("dnnl_memory_create", layout, _engine(), c_void_p()) for _, layout in arguments
        ]
        pairs = zip(arguments, self.memories, strict=True)
        self.arguments = (_Argument * len(arguments))(*(_Argument(i, m) for (i, _), m in pairs))
        self.stream = _create("dnnl_stream_create", _engine(), ctypes.c_uint(IN_ORDER))

    def call(self) -> np.ndarray:
        """A ``kernels.CALL`` of it, (1,)."""
        call = np.zeros(1, kernels.CALL)
        call["primitive"], call["stream"] = self.primitive.value, self.stream.value
        call["count"], call["arguments"] = len(self.arguments), ctypes.addressof(self.arguments)
        call["memories"][0, : len(self.memories)] = [memory.value for memory in self.memories]
        return call


def _reorder(source: c_void_p, target: c_void_p) -> _Primitive:
    name = "dnnl_reorder_primitive_desc_create"
    descriptor = _create(name, source, _engine(), target, _engine(), None)
    return _Primitive(descriptor, [(SRC, source), (DST, target)])


def _layout(of: c_void_p, query: int) -> c_void_p:
    return c_void_p(library().dnnl_primitive_desc_query_md(of, query, 0))


def _floats(layout: c_void_p) -> int:
    return -(-library().dnnl_memory_desc_get_size(layout) // 4)


class _Descriptors:
    """The three convolutions of ``shape`` (N, C, H, W) with ``channels`` filters.

    Args:
        like: Others, of another N, whose layouts of the weights are taken over.
    """

    def __init__(
        self, shape: tuple[int, ...], channels: int, stride: int, like: _Descriptors | None = None
    ) -> None:
        n, c, *size = shape
        out = [(length + 2 * PAD - KERNEL) // stride + 1 for length in size]
        self.x, self.y = _channels_last(shape), _channels_last((n, channels, *out))
        weights = _chosen((channels, c, KERNEL, KERNEL))
        layouts = like.layouts if like else (weights, weights, weights)
        right = [
            (o - 1) * stride + KERNEL - length - PAD for o, length in zip(out, size, strict=True)
        ]
        geometry = (
            *map(_dimensions, ((stride, stride), (0, 0), (PAD, PAD))), _dimensions(right)
        )  # fmt: skip
        attributes = _create("dnnl_primitive_attr_create")
        library().dnnl_primitive_attr_set_scratchpad_mode(attributes, c_int(SCRATCHPAD_OF_USER))

        def descriptor(kind: str, *arguments: object) -> c_void_p:
            name = f"dnnl_convolution_{kind}_primitive_desc_create"
            return _create(name, _engine(), *arguments, attributes)

        x, y, w, direct = self.x, self.y, layouts, c_int(DIRECT)
        kind = c_int(FORWARD_TRAINING)
        self.forward = forward = descriptor("forward", kind, direct, x, w[0], None, y, *geometry)
        self.data = descriptor("backward_data", direct, x, w[1], y, *geometry, forward)
        self.weights = descriptor("backward_weights", direct, x, w[2], None, y, *geometry, forward)
        self.layouts = (
            _layout(self.forward, QUERY_WEIGHTS),
            _layout(self.data, QUERY_WEIGHTS),
            _layout(self.weights, QUERY_DIFF_WEIGHTS),
        )


class Calls(NamedTuple):
    """How ``kernels`` computes a convolution, part by part of the batch."""

    parts: np.ndarray  # a kernels.CALL for each part
    reorder: np.ndarray  # the one that reorders the weights, or their gradient; (1,)
    weights: np.ndarray  # the reordered weights; of the gradient, a row for each part


class Convolution:
    """The three 3x3 convolutions of a layer.

    Args:
        shape: (N, C, H, W) of the input.
        channels: K, channels of the output.
        stride: 1 or 2.
        threads: That many threads have something to do, if there are as many images.

    Attributes:
        forward, data, weights: Calls: y of x and w, the gradients of x and of w.
        out_shape: (N, K, H', W').
        images: Images of a part; the last one may have fewer.
        scratch: Floats of working memory that a call needs.
        work: As many and those of a part of the output and two of the input.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], channels: int, stride: int, threads: int
    ) -> None:
        n, c, *size = shape
        out = [(length + 2 * PAD - KERNEL) // stride + 1 for length in size]
        self.out_shape = (n, channels, *out)
        self.weights_shape = (channels, c, KERNEL, KERNEL)
        largest = 4 * max(c * math.prod(size), channels * math.prod(out))
        self.images = max(1, min(PART // largest, -(-n // threads)))
        with _one_thread():
            whole, rest = divmod(n, self.images)
            parts = [_Descriptors((self.images, c, *size), channels, stride)] * whole
            if rest:
                parts.append(_Descriptors((rest, c, *size), channels, stride, like=parts[0]))
            plain = _plain(self.weights_shape)
            forward, data, weights = parts[0].layouts
            self._primitives: list[_Primitive] = []  # keeps what the calls point to
            self.scratch = 0
            self.forward = self._calls(
                ((d.forward, [(SRC, d.x), (WEIGHTS, forward), (DST, d.y)]) for d in parts),
                (plain, forward),
                (_floats(forward),),
            )
            self.data = self._calls(
                ((d.data, [(DIFF_DST, d.y), (WEIGHTS, data), (DIFF_SRC, d.x)]) for d in parts),
                (plain, data),
                (_floats(data),),
            )
            self.weights = self._calls(
                (
                    (d.weights, [(SRC, d.x), (DIFF_DST, d.y), (DIFF_WEIGHTS, weights)])
                    for d in parts
                ),
                (weights, plain),
                (len(parts), _floats(weights)),
            )
        values = 2 * c * math.prod(size) + channels * math.prod(out)
        self.work = self.scratch + self.images * values

    def convolve(self, x, normalization, shortcut, out, w, h) -> np.ndarray:
        """As ``kernels.convolve``."""
        return kernels.convolve(
            self.forward,
            self.images,
            x,
            normalization,
            shortcut,
            out,
            np.ascontiguousarray(w),
            h,
            _work(self.work),
            self.scratch,
        )

    def gradients(self, g, h, coefficients, x, normalization, out, w, gw, gx, adds) -> np.ndarray:
        """As ``kernels.convolve_backward``."""
        return kernels.convolve_backward(
            self.weights,
            self.data,
            self.images,
            g,
            h,
            coefficients,
            x,
            normalization,
            out,
            np.ascontiguousarray(w),
            gw,
            gx,
            adds,
            _work(self.work),
            self.scratch,
        )

    def _calls(self, parts, layouts, shape: tuple[int, ...]) -> Calls:
        """Of a (descriptor, arguments) for each part, a reorder, and the shape of the weights."""
        calls = []
        for descriptor, arguments in parts:
            scratch = _layout(descriptor, QUERY_SCRATCHPAD)
            self.scratch = max(self.scratch, _floats(scratch))
            self._primitives.append(_Primitive(descriptor, [*arguments, (SCRATCHPAD, scratch)]))
            calls.append(self._primitives[-1].call())
        self._primitives.append(_reorder(*layouts))
        reorder = self._primitives[-1].call()
        return Calls(np.concatenate(calls), reorder, np.empty(shape, np.float32))


@functools.cache
def _work(floats: int) -> np.ndarray:
    """Working memory of every thread."""
    return np.empty((kernels.numba.config.NUMBA_NUM_THREADS, floats), np.float32)


convolution = functools.cache(Convolution)
