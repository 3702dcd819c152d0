"""Winograd's convolution F(4x4, 3x3), built from the points of its transforms.

A tile of 4 x 4 outputs of a 3x3 convolution is (Lavin and Gray, 2015)

    Y = A^T [(G g G^T) * (B^T d B)] A

of a tile d of 6 x 6 inputs and the filter g: 36 products instead of 144. Summed over channels, each
of the 36 is a product of matrices, tiles by channels and channels by channels. The gradient of the
input is such a convolution, too; that of the filter is G^T [(B^T d B) * (A dY A^T)] G, summed over
the tiles.

The code is made for one shape (``vectors``): sizes and strides are constants in it.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import cgutils, config

from resnet.backends.cpu import kernels, vectors
from resnet.backends.cpu.vectors import LINE, WORD, Code, Vector

TILE = 4  # outputs of a tile, in each direction
# +-1 and +-2 instead would round twice as much and save nothing. The last point is infinity.
POINTS = (0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))
SIDE = len(POINTS) + 1  # inputs of a tile, in each direction
TILES, GRADIENT_TILES = 8, 16  # that go through all steps together, in the cache
GROUP = 1 << 16  # bytes of images whose passes before and after are taken together
PART = 1 << 19  # bytes of images whose gradients of the filters are summed together
GAP = 16  # floats between the points' matrices: else their addresses share a set of the cache
KEPT = Path(kernels.convolve.stats.cache_path)  # where Numba keeps its kernels: the code beside


def matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A (6, 4), G (6, 3) and B^T (6, 6), float64; a row for each point, the last for infinity."""
    others = [[p for p in POINTS if p != point] for point in POINTS]
    scales = [
        math.prod(point - p for p in rest) for point, rest in zip(POINTS, others, strict=True)
    ]
    a = np.array([[point**k for k in range(TILE)] for point in POINTS] + [[0] * TILE], np.float64)
    g = a[:, :3] / np.array([*scales, 1])[:, None]
    a[-1, -1] = g[-1, -1] = 1
    b = [[*np.poly(rest)[::-1], 0] for rest in others] + [np.poly(POINTS)[::-1]]
    return a, g, np.round(b, 12)  # what should be 0 and 1 is


A, G, BT = matrices()


def dot(row: Sequence[float], vectors: Sequence[Vector]) -> Vector:
    """sum of row[i] * vectors[i]; zeros cost nothing, and one factor becomes 1."""
    terms = [(factor, v) for factor, v in zip(row, vectors, strict=True) if factor]
    scale = 1 if any(factor == 1 for factor, _ in terms) else terms[-1][0]
    terms = sorted(((f / scale, v) for f, v in terms), key=lambda term: term[0] != 1)
    total = terms[0][1]
    for factor, vector in terms[1:]:
        total = total + factor * vector if factor > 0 else total - -factor * vector
    return scale * total


def to_points(matrix: np.ndarray, x: Sequence[Vector]) -> list[Vector]:
    """matrix @ x; the rows of a point and of its negative share their even and odd terms."""
    values = [dot(matrix[0], x)]
    for row in matrix[1:-1:2]:
        even, odd = dot(row[::2], x[::2]), dot(row[1::2], x[1::2])
        values += [even + odd, even - odd]
    return [*values, dot(matrix[-1], x)]


def from_points(matrix: np.ndarray, m: Sequence[Vector]) -> list[Vector]:
    """matrix^T @ m, likewise."""
    pairs = list(zip(m[1:-1:2], m[2:-1:2], strict=True))
    terms = [p + q for p, q in pairs], [p - q for p, q in pairs]  # of even and of odd powers
    powers = matrix[[0, *range(1, len(m) - 1, 2), -1]].T
    return [dot(row, [m[0], *terms[k % 2], m[-1]]) for k, row in enumerate(powers)]


def transform(
    code: Code, how, matrix, size: int, x, x_steps, y, y_steps, adds: bool = False
) -> None:
    """y = ``how`` by the matrix, in both directions, of size x size vectors at x.

    Steps are the floats from one row to the next, and from one column. With ``adds``, y is added to
    what is there.
    """
    tile = [[code.load(x, p * x_steps[0] + q * x_steps[1]) for q in range(size)]
            for p in range(size)]  # fmt: skip
    columns = [how(matrix, column) for column in zip(*tile, strict=True)]
    for p, row in enumerate(zip(*columns, strict=True)):
        for q, value in enumerate(how(matrix, row)):
            place = p * y_steps[0] + q * y_steps[1]
            code.store(value + code.load(y, place) if adds else value, y, place)


class Steps:
    """The steps of a convolution of images of ``side`` x ``side`` pixels, a block of tiles each.

    A block is ``some`` rows of tiles from ``row`` on, counted through all images. Images that are
    read have a border of zeros: ``side`` + 2 pixels to a row. ``points`` are 36 matrices of tiles
    by channels.
    """

    def __init__(self, code: Code, channels: int, side: int, tiles: int) -> None:
        self.code, self.channels, self.side = code, channels, side
        self.across = side // TILE  # tiles of a row
        self.rows = max(1, tiles // self.across)  # of a block
        self.columns = min(2, channels // code.lanes)  # vectors of a product that stay in
        self.height = 8 if code.lanes == 16 else 4  # registers, for each of so many of its rows
        self.tiles = -(-self.rows * self.across // self.height) * self.height  # room for them
        self.point = self.tiles * channels + GAP  # floats of a point's matrix
        self.points = SIDE * self.point, self.point  # from one to the next, in each direction
        self.line = TILE * side * channels  # floats of a row of tiles
        self.share = -(-self.rows * self.line // LINE // SIDE**2)  # of a block's lines, to a point

    @contextlib.contextmanager
    def blocks(self, images):
        """For each block of ``images`` images: its first row of tiles, and how many it has."""
        code = self.code
        rows = code.sum((images, self.across))
        with code.loop(code.builder.udiv(code.sum(rows, self.rows - 1), WORD(self.rows))) as block:
            row = code.sum((block, self.rows))
            yield row, code.minimum(code.builder.sub(rows, row), self.rows)

    @contextlib.contextmanager
    def _tiles(self, some, points):
        """For each row, tile in it and vector of channels: these, and the place at a point."""
        code = self.code
        parts = self.channels // code.lanes
        with code.loop(some) as i, code.loop(self.across) as j, code.loop(parts) as part:
            k = code.sum((part, code.lanes))
            yield i, j, k, code.at(points, (i, self.across * self.channels), (j, self.channels), k)

    def fetch(self, x, row, point, to_write: bool = False) -> None:
        """Have a share of the block's lines of x brought into the cache, unless x is null."""
        code = self.code
        nothing = code.builder.icmp_unsigned("==", x, ir.Constant(x.type, None))
        with code.loop(code.builder.select(nothing, WORD(0), WORD(self.share))) as i:
            line = code.at(x, (row, self.line), (point, self.share * LINE), (i, LINE))
            code.prefetch(line, to_write)

    def read(self, x, row, some, points, matrix: np.ndarray) -> None:
        """points = the transform by ``matrix`` of tiles of x, of its centre if it is smaller."""
        code, size, width = self.code, len(matrix[0]), self.channels
        line = (self.side + 2) * width  # floats of a row of pixels
        border = (SIDE - size) // 2 * (line + width)
        with self._tiles(some, points) as (i, j, k, target):
            number = code.sum(row, i)
            image, above = (divide(number, WORD(self.across))
                            for divide in (code.builder.udiv, code.builder.urem))  # fmt: skip
            corner = (image, (self.side + 2) * line), (above, TILE * line), (j, TILE * width)
            source = code.at(x, border, *corner, k)
            transform(code, to_points, matrix, size, source, (line, width), target, self.points)

    def write(self, points, y, row, some, adds: bool) -> None:
        """y = A^T points A; with ``adds``, added to what is there."""
        code, width = self.code, self.channels
        with self._tiles(some, points) as (i, j, k, source):
            target = code.at(y, (row, self.line), (i, self.line), (j, TILE * width), k)
            steps = self.side * width, width
            transform(code, from_points, A, SIDE, source, self.points, target, steps, adds)

    def product(self, a, row: int, step: int, b, out, rows: int, count, adds: bool) -> None:
        """out[r] = sum over k < count of a[r * row + k * step] b[k], for r < rows.

        ``b`` and ``out`` are matrices of as many columns as there are channels. A few rows by a few
        vectors of the sums stay in registers. ``rows`` is a multiple of ``height``, ``count`` even
        if there is an even number of tiles to a row.
        """
        code, builder, width = self.code, self.code.builder, self.columns * self.code.lanes
        unroll = 2 - self.across % 2
        with code.loop(rows // self.height) as i, code.loop(self.channels // width) as j:
            a = code.at(a, (i, self.height * row))
            b = code.at(b, (j, width))
            out = code.at(out, (i, self.height * self.channels), (j, width))
            sums = {}  # variables, by row and vector
            for r in range(self.height):
                for v in range(0, width, code.lanes):
                    start = code.load(out, r * self.channels + v).value if adds else code.zero
                    sums[r, v] = cgutils.alloca_once(builder, code.vector)
                    builder.store(start, sums[r, v])
            with code.loop(builder.udiv(code.sum(count), WORD(unroll))) as block:
                for k in (code.sum((block, unroll), more) for more in range(unroll)):
                    factors, values = code.at(a, (k, step)), code.at(b, (k, self.channels))
                    for (r, v), total in sums.items():
                        product = code.broadcast(factors, r * row) * code.load(values, v)
                        product = Vector(builder, builder.load(total)) + product
                        builder.store(product.value, total)
            for (r, v), total in sums.items():
                code.store(Vector(builder, builder.load(total)), out, r * self.channels + v)


def convolve(code: Code, channels: int, side: int, adds: bool) -> None:
    """y (+)= convolution of x: (x with borders, filters at the points, y, working memory, images).

    Filters are 36 matrices of input's channels by output's channels. While the processor computes,
    memory is fetched: the lines of y, and of up to three arrays of y's shape (see ``kernels``).
    """
    x, u, y, points, images, *ahead = code.function.args
    steps = Steps(code, channels, side, TILES)
    products = code.at(points, SIDE**2 * steps.point)
    with steps.blocks(images) as (row, some):
        steps.read(x, row, some, points, BT)
        with code.loop(SIDE**2) as point:
            steps.fetch(y, row, point, to_write=True)
            for each in ahead:
                steps.fetch(each, row, point)
            a, out = (code.at(matrices, (point, steps.point)) for matrices in (points, products))
            b = code.at(u, (point, channels**2))
            steps.product(a, channels, 1, b, out, steps.tiles, channels, adds=False)
        steps.write(products, y, row, some, adds)
    code.builder.ret_void()


def gradient(code: Code, channels: int, side: int) -> None:
    """Add the gradient of the filters at the points: (x, gradient of y, sums, memory, images).

    Both have borders. The sums are 36 matrices of input's channels by output's channels. Up to
    three arrays are fetched as by ``convolve``.
    """
    x, g, sums, points, images, *ahead = code.function.args
    steps = Steps(code, channels, side, GRADIENT_TILES)
    others = code.at(points, SIDE**2 * steps.point)
    with steps.blocks(images) as (row, some):
        steps.read(x, row, some, points, BT)
        steps.read(g, row, some, others, A)
        with code.loop(SIDE**2) as point:
            for each in ahead:
                steps.fetch(each, row, point)
            a, b = (code.at(matrices, (point, steps.point)) for matrices in (points, others))
            out, tiles = code.at(sums, (point, channels**2)), code.sum((some, steps.across))
            steps.product(a, 1, channels, b, out, channels, tiles, adds=True)
    code.builder.ret_void()


def filters(code: Code, channels: int, how, matrix: np.ndarray, size: int, result: int) -> None:
    """y = the transform of filters: (size^2 matrices x, result^2 matrices y, .., floats, ..).

    u = G g G^T and g = G^T u G, of so many floats of each matrix.
    """
    x, y, _, _, count, *_ = code.function.args
    steps = [(side * channels**2, channels**2) for side in (size, result)]
    with code.loop(code.builder.udiv(count, WORD(code.lanes))) as i:
        source, target = (code.at(pointer, (i, code.lanes)) for pointer in (x, y))
        transform(code, how, matrix, size, source, steps[0], target, steps[1])
    code.builder.ret_void()


class Functions(NamedTuple):
    """Addresses of the code for a shape."""

    convolve: int
    convolve_more: int
    gradient: int
    to_points: int
    from_points: int


def build(channels: int, side: int, lanes: int) -> ir.Module:
    """``Functions`` for images of ``side`` x ``side`` pixels, as many channels in as out."""
    module = ir.Module()
    convolve(Code(module, "convolve", lanes), channels, side, adds=False)
    convolve(Code(module, "convolve_more", lanes), channels, side, adds=True)
    gradient(Code(module, "gradient", lanes), channels, side)
    filters(Code(module, "to_points", lanes), channels, to_points, G, 3, SIDE)
    filters(Code(module, "from_points", lanes), channels, from_points, G, SIDE, 3)
    return module


def object_code(channels: int, side: int, folder: Path) -> bytes:
    """``build`` for this processor, as it is kept in ``folder``, or else is compiled now."""
    made_of = Path(__file__).read_bytes(), channels, side
    return vectors.object_code(functools.partial(build, channels, side), made_of, folder)


@functools.cache
def compiled(channels: int, side: int) -> Functions:
    """The code, loaded; it is kept where Numba keeps the kernels."""
    return Functions(*vectors.load(object_code(channels, side, KEPT), Functions._fields))


def fits(shape: tuple[int, ...], channels: int, stride: int) -> bool:
    """Whether ``Convolution`` can compute ``channels`` filters on (N, C, H, W)."""
    _, c, height, width = shape
    vector = vectors.lanes()
    if not vector or stride != 1 or c != channels or height != width or width % TILE:
        return False
    return c % vector == 0 and (c == vector or c % (2 * vector) == 0)


class Tiles(NamedTuple):
    """What ``kernels`` need for the convolutions of a layer."""

    images: int  # of a part, whose sums are taken together
    group: int  # images of a part that go through all passes together
    code: Functions
    filters: np.ndarray  # working memory: (9, C, C),
    u: np.ndarray  # the filters at the points, (36, C, C),
    sums: np.ndarray  # of their gradients for each part, (parts, 36, C, C),
    padded: np.ndarray  # and of each thread: two groups of images within borders of zeros,
    points: np.ndarray  # and blocks of tiles at the points


class Convolution:
    """The convolutions of a layer of as many filters as channels, as ``primitives.Convolution``.

    Args:
        shape: (N, C, H, W) of input and output; see ``fits``.
        threads: That many threads have something to do, if there are as many images.
    """

    def __init__(self, shape: tuple[int, int, int, int], threads: int) -> None:
        n, c, side, _ = self.out_shape = shape
        image = 4 * c * side * side
        self.images = max(1, min(PART // image, -(-n // threads)))
        group = min(max(1, GROUP // image), self.images)
        filters, u = (kernels.empty((size, c, c)) for size in (9, SIDE**2))
        sums = kernels.empty((-(-n // self.images), SIDE**2, c, c))
        memory = filters, u, sums, *_memory(c, side, group)
        self.tiles = Tiles(self.images, group, compiled(c, side), *memory)

    def convolve(self, x, normalization, shortcut, out, w, h) -> np.ndarray:
        """As ``kernels.convolve``."""
        w = np.ascontiguousarray(w).reshape(len(w), -1, 9)
        return kernels.convolve_by_tiles(self.tiles, x, normalization, shortcut, out, w, h)

    def gradients(self, g, h, coefficients, x, normalization, out, w, gw, gx, adds) -> np.ndarray:
        """As ``kernels.convolve_backward``."""
        w, gw = np.ascontiguousarray(w).reshape(len(w), -1, 9), gw.reshape(len(gw), -1, 9)
        parts = kernels.convolve_backward_by_tiles(
            self.tiles, g, h, coefficients, x, normalization, out, w, gx, adds
        )
        kernels.filters_from_points(self.tiles, gw)
        return parts


convolution = functools.cache(Convolution)


@functools.cache
def _memory(channels: int, side: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every thread: two groups of images whose borders stay zero, and the points' matrices."""
    threads = config.NUMBA_NUM_THREADS
    padded = kernels.empty((threads, 2, group, side + 2, (side + 2) * channels))
    padded[:] = 0
    tiles = GRADIENT_TILES + side // TILE  # no block has more
    return padded, kernels.empty((threads, 2 * SIDE**2 * (tiles * channels + GAP)))
