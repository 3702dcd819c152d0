"""The kernels of ``kernels.cu`` and ``convolutions.cu``: which there are, built once, launched."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import chainer
import numpy as np

ARRAY = chainer.backends.cuda.ndarray  # CuPy's; a stand-in of Chainer's where there is none
SOURCE = Path(__file__).with_name("kernels.cu")
CONVOLUTIONS = Path(__file__).with_name("convolutions.cu")  # after the other, in one program
CAPABILITY = 80  # that convolutions.cu needs
THREADS = 256  # per block, as in kernels.cu

OF_ACTIVATIONS = ("moments", "normalize", "gradient_sums", "input_gradient", "masked", "add",
                  "shortcut_gradient", "pack", "unpack", "average", "average_gradient")  # fmt: skip
OF_FLOATS = ("fixed_moments", "linear", "linear_input_gradient", "linear_gradients",
             "cross_entropy", "multiply", "find_overflow", "momentum_step",
             "count_overflow", "augment", "centre", "finish_step")  # fmt: skip
TYPES = {np.dtype("f4"): "float", np.dtype("f2"): "Half"}
KERNELS = (*(f"{name}<{type}>" for name in OF_ACTIVATIONS for type in TYPES.values()), *OF_FLOATS)


class Tile(NamedTuple):
    """What a block of convolutions.cu computes at once.

    Attributes:
        filters: KB, channels of the output.
        rows: ROWS of the output.
        images: IMAGES.
    """

    filters: int
    rows: int
    images: int


class Shape(NamedTuple):
    """A convolution of the report's networks: channels in memory, filters, width of y, stride."""

    channels: int
    filters: int
    width: int
    stride: int

    @property
    def padded(self) -> int:
        """Channels in shared memory."""
        return max(self.channels, 8)

    def pixels(self, tile: Tile) -> int:
        """Of the input, in the shared memory of a tile."""
        height, breadth = ((n - 1) * self.stride + 3 for n in (tile.rows, self.width))
        return tile.images * height * breadth

    def back(self) -> Shape:
        """The convolution of the gradient of y that gives the input's, at stride 1."""
        return Shape(self.filters, self.channels, self.width, 1)

    def convolve(self, tile: Tile, back: bool, type: str, exact: bool) -> tuple[str, int]:
        """Name and bytes of shared memory of the kernel."""
        numbers = type, *self[:2], tile.filters, self.width, *tile[1:], self.stride
        size = self.pixels(tile) * (self.padded + 4) + 9 * (self.padded * (tile.filters + 8) + 1)
        return _name("convolve", *numbers, back, exact), 4 * size

    def gradient(self, tile: Tile, type: str, exact: bool) -> tuple[str, int]:
        """Name and bytes of shared memory of the kernel for the gradient of the filters."""
        numbers = type, *self[:2], tile.filters, self.width, *tile[1:], self.stride
        size = self.pixels(tile) * (self.padded + 8 * (self.channels > 8))
        size += tile.images * tile.rows * self.width * (tile.filters + 8)
        return _name("filter_gradient", *numbers, exact), 4 * size


def _name(kernel: str, *values) -> str:
    words = (str(value).lower() if isinstance(value, bool) else str(value) for value in values)
    return f"{kernel}<{', '.join(words)}>"


# Of the convolution and of its filters' gradient: a block for each multiprocessor at batch 128, and
# eight warps with the same work.
TILES = {
    Shape(4, 16, 32, 1): (Tile(16, 8, 1), Tile(16, 8, 1)),  # of RGB images: 16 bytes in float32,
    Shape(8, 16, 32, 1): (Tile(16, 8, 1), Tile(16, 8, 1)),  # and in float16
    Shape(16, 16, 32, 1): (Tile(16, 8, 1), Tile(16, 8, 1)),
    Shape(16, 32, 16, 2): (Tile(32, 8, 1), Tile(32, 8, 1)),
    Shape(32, 32, 16, 1): (Tile(32, 16, 1), Tile(32, 16, 1)),
    Shape(32, 64, 8, 2): (Tile(32, 8, 2), Tile(64, 8, 1)),
    Shape(64, 64, 8, 1): (Tile(32, 8, 2), Tile(32, 8, 2)),
}
KINDS = {"fp32": ("float", True), "tf32": ("float", False), "fp16": ("Half", False)}  # T, EXACT
ON_TENSOR_CORES = {"add_parts": 0} | dict(
    kernel
    for shape, (tile, of_gradient) in TILES.items()
    for kind in KINDS.values()
    if shape.channels != (4 if kind[0] == "Half" else 8)
    for kernel in (
        shape.convolve(tile, False, *kind),
        *([shape.convolve(tile, True, *kind)] if shape == shape.back() else []),
        shape.gradient(of_gradient, *kind),
    )
)  # the kernels of convolutions.cu, and bytes of shared memory


def cupy():
    """The module CuPy."""
    return chainer.cuda.cupy


@functools.cache
def shared_memory() -> int:
    """Bytes of shared memory that a block may have on CuPy's current GPU."""
    return cupy().cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]


def program(on_tensor_cores: bool) -> tuple[str, tuple[str, ...]]:
    """Source and names of the kernels of ``kernels.cu``, or of ``convolutions.cu``."""
    if on_tensor_cores:
        return SOURCE.read_text() + CONVOLUTIONS.read_text(), tuple(ON_TENSOR_CORES)
    return SOURCE.read_text(), KERNELS


@functools.cache
def _module(on_tensor_cores: bool):
    source, names = program(on_tensor_cores)
    return cupy().RawModule(code=source, options=("-std=c++17",), name_expressions=names)


@functools.cache
def _function(name: str):
    function = _module(name in ON_TENSOR_CORES).get_function(name)
    if size := ON_TENSOR_CORES.get(name):
        function.max_dynamic_shared_size_bytes = size
    return function


def launch(name: str, threads: int, *arguments) -> None:
    """Run a kernel in at least so many threads; None is a null pointer."""

    def argument(value):
        if value is None:
            return np.intp(0)
        return {int: np.int32, float: np.float32}.get(type(value), lambda v: v)(value)

    size = ON_TENSOR_CORES.get(name, 0)
    blocks = -(-threads // THREADS)
    _function(name)((blocks,), (THREADS,), tuple(map(argument, arguments)), shared_mem=size)


def launch_on(x, name: str, threads: int, *arguments) -> None:
    """The same for a kernel that comes in two types: that of the activations x."""
    launch(f"{name}<{TYPES[x.dtype]}>", threads, *arguments)
