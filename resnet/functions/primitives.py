"""oneDNN's convolutions, through the C API of its version 3 and ctypes.

Arrays are float32, logically NCHW, channels last in memory. A primitive is built once per shape
and kept; oneDNN chooses the layout of the weights, so they are reordered on their way in and out.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import importlib.metadata
import os
import sys
from ctypes import byref, c_int, c_size_t, c_void_p

import numpy as np

F32, CPU, IN_ORDER = 3, 1, 1  # dnnl_f32, dnnl_cpu, dnnl_stream_in_order
TAG_ANY = 1  # dnnl_format_tag_any: oneDNN chooses
FORWARD_TRAINING, DIRECT = 64, 1  # dnnl_forward_training, dnnl_convolution_direct
SRC, DST, WEIGHTS, DIFF_SRC, DIFF_DST, DIFF_WEIGHTS = 1, 17, 33, 129, 145, 161  # arguments
QUERY_WEIGHTS, QUERY_DIFF_WEIGHTS = 131, 132  # dnnl_query_weights_md, dnnl_query_diff_weights_md
KERNEL, PAD = 3, 1


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
    lib.dnnl_memory_set_data_handle.argtypes = (c_void_p, c_void_p)
    lib.dnnl_primitive_execute.argtypes = (c_void_p, c_void_p, c_int, ctypes.POINTER(_Argument))
    return lib


def version() -> str:
    """Version of the library, such as 3.2.0."""
    v = library().dnnl_version().contents
    return f"{v.major}.{v.minor}.{v.patch}"


def set_threads(count: int) -> None:
    """Let this process's OpenMP, which Numba shares, compute with so many threads."""
    library().omp_set_num_threads(c_int(count))


def _create(function: str, *arguments: object) -> c_void_p:
    handle = c_void_p()
    status = getattr(library(), function)(byref(handle), *arguments)
    if status:
        raise RuntimeError(f"{function}: oneDNN status {status}")
    return handle


@functools.cache
def _engine() -> c_void_p:
    return _create("dnnl_engine_create", c_int(CPU), c_size_t(0))


@functools.cache
def _stream() -> c_void_p:
    return _create("dnnl_stream_create", _engine(), ctypes.c_uint(IN_ORDER))


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
    """A primitive and one memory object for each argument, pointed at arrays on each call."""

    def __init__(self, descriptor: c_void_p, arguments: list[tuple[int, c_void_p]]) -> None:
        self.primitive = _create("dnnl_primitive_create", descriptor)
        self.memories = [
            _create("dnnl_memory_create", layout, _engine(), c_void_p()) for _, layout in arguments
        ]
        pairs = zip(arguments, self.memories, strict=True)
        self.arguments = (_Argument * len(arguments))(*(_Argument(i, m) for (i, _), m in pairs))

    def __call__(self, *arrays: np.ndarray) -> None:
        lib = library()
        for memory, array in zip(self.memories, arrays, strict=True):
            lib.dnnl_memory_set_data_handle(memory, array.ctypes.data)
        status = lib.dnnl_primitive_execute(
            self.primitive, _stream(), len(self.arguments), self.arguments
        )
        if status:
            raise RuntimeError(f"dnnl_primitive_execute: oneDNN status {status}")


def _reorder(source: c_void_p, target: c_void_p) -> _Primitive:
    name = "dnnl_reorder_primitive_desc_create"
    descriptor = _create(name, source, _engine(), target, _engine(), None)
    return _Primitive(descriptor, [(SRC, source), (DST, target)])


def empty(shape: tuple[int, ...]) -> np.ndarray:
    """An array of logical shape (N, C, H, W), channels last in memory."""
    n, c, h, w = shape
    return np.empty((n, h, w, c), np.float32).transpose(0, 3, 1, 2)


class Convolution:
    """The three 3x3 convolutions of a layer: forward, and backward for the data and the weights.

    Args:
        shape: (N, C, H, W) of the input.
        channels: K, channels of the output.
        stride: 1 or 2.
    """

    def __init__(self, shape: tuple[int, int, int, int], channels: int, stride: int) -> None:
        n, c, *size = shape
        out = [(length + 2 * PAD - KERNEL) // stride + 1 for length in size]
        self.shape, self.out_shape = shape, (n, channels, *out)
        self.weights_shape = (channels, c, KERNEL, KERNEL)
        x, y, w = _channels_last(shape), _channels_last(self.out_shape), _chosen(self.weights_shape)
        right = [
            (o - 1) * stride + KERNEL - length - PAD for o, length in zip(out, size, strict=True)
        ]
        geometry = (
            *map(_dimensions, ((stride, stride), (0, 0), (PAD, PAD))), _dimensions(right)
        )  # fmt: skip

        def descriptor(kind: str, *arguments: object) -> c_void_p:
            name = f"dnnl_convolution_{kind}_primitive_desc_create"
            return _create(name, _engine(), *arguments, None)  # no attributes

        forward = descriptor(
            "forward", c_int(FORWARD_TRAINING), c_int(DIRECT), x, w, None, y, *geometry
        )
        data = descriptor("backward_data", c_int(DIRECT), x, w, y, *geometry, forward)
        weights = descriptor("backward_weights", c_int(DIRECT), x, w, None, y, *geometry, forward)

        def layout(of: c_void_p, query: int) -> c_void_p:
            return c_void_p(library().dnnl_primitive_desc_query_md(of, query, 0))

        def buffer(of: c_void_p) -> np.ndarray:
            return np.empty(library().dnnl_memory_desc_get_size(of) // 4, np.float32)

        plain = _plain(self.weights_shape)
        chosen = layout(forward, QUERY_WEIGHTS)
        self._forward = _Primitive(forward, [(SRC, x), (WEIGHTS, chosen), (DST, y)])
        self._forward_weights, self._forward_reorder = buffer(chosen), _reorder(plain, chosen)
        chosen = layout(data, QUERY_WEIGHTS)
        self._data = _Primitive(data, [(DIFF_DST, y), (WEIGHTS, chosen), (DIFF_SRC, x)])
        self._data_weights, self._data_reorder = buffer(chosen), _reorder(plain, chosen)
        chosen = layout(weights, QUERY_DIFF_WEIGHTS)
        self._weights = _Primitive(weights, [(SRC, x), (DIFF_DST, y), (DIFF_WEIGHTS, chosen)])
        self._diff_weights, self._weights_reorder = buffer(chosen), _reorder(chosen, plain)

    def forward(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        """x (N, C, H, W), w (K, C, 3, 3) -> y."""
        y = empty(self.out_shape)
        self._forward_reorder(w, self._forward_weights)
        self._forward(x, self._forward_weights, y)
        return y

    def backward_data(self, gy: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Gradient of the input."""
        gx = empty(self.shape)
        self._data_reorder(w, self._data_weights)
        self._data(gy, self._data_weights, gx)
        return gx

    def backward_weights(self, x: np.ndarray, gy: np.ndarray) -> np.ndarray:
        """Gradient of the weights."""
        gw = np.empty(self.weights_shape, np.float32)
        self._weights(x, gy, self._diff_weights)
        self._weights_reorder(self._diff_weights, gw)
        return gw


convolution = functools.cache(Convolution)
