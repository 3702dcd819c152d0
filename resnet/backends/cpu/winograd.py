"""Winograd's convolution F(4x4, 3x3), as code of vectors.

A tile of 4 x 4 outputs of a 3x3 convolution is (Lavin and Gray, 2015)

    Y = A^T [(G g G^T) * (B^T d B)] A

of a tile d of 6 x 6 inputs and the filter g: 36 products instead of 144. Summed over channels, each
of the 36 is a product of matrices, tiles by channels and channels by channels. The gradient of the
input is such a convolution, too, of tiles dY of 6 x 6 with the turned filter; the gradient of that
filter is G^T [(A d A^T) * (B^T dY B)] G, of tiles d of 4 x 4, summed over these.

With stride 2 a tile of 9 x 9 inputs takes 81 products instead of 144; the formulas are the same.

``transforms`` has the matrices. The code is made for one shape (``vectors``): sizes and strides are
constants in it.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import cgutils, config

from resnet.backends.cpu import kernels, transforms, vectors
from resnet.backends.cpu.transforms import FORMS, TILE, Form, from_points, to_points
from resnet.backends.cpu.vectors import LINE, WORD, Code, Vector

TILES = 8  # that go through all steps together, in the cache, at least
GROUP = 1 << 16  # bytes of images whose passes before and after are taken together
PART = 1 << 19  # bytes of images whose gradients of the filters are summed together
HEIGHT = 8  # rows of a product that stay in registers; half of them with AVX2
GAP = 16  # floats between the points' matrices: else their addresses share a set of the cache
KEPT = Path(kernels.convolve.stats.cache_path)  # where the kernels are kept: the code beside


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


class Images(NamedTuple):
    """Images of ``side`` x ``side`` pixels, ``tile`` from one tile to the next."""

    channels: int
    side: int
    tile: int
    border: int = 0  # of zeros around each of them

    @property
    def line(self) -> int:
        """Floats of a row of pixels."""
        return (self.side + 2 * self.border) * self.channels

    @property
    def inner(self) -> int:
        """Floats of a row of tiles, without a border."""
        return self.tile * self.side * self.channels


def tiles_of_a_block(channels: int) -> int:
    """How many go through all steps together: the more channels, the more share the filters."""
    return max(TILES, channels // 4)


class Steps:
    """The steps of a convolution at ``points`` x ``points`` points, a block of tiles each.

    A block is ``some`` rows of tiles from ``row`` on, counted through all images. What is at the
    points are matrices of tiles by channels.
    """

    def __init__(self, code: Code, points: int, across: int, channels: int = 0) -> None:
        self.code, self.points = code, points
        self.across = across  # tiles of a row
        self.rows = max(1, tiles_of_a_block(channels) // across)  # of a block
        self.height = HEIGHT if code.lanes == 16 else HEIGHT // 2
        self.tiles = -(-self.rows * across // self.height) * self.height  # room for them

    def step(self, channels: int) -> int:
        """Floats from one point's matrix to the next."""
        return self.tiles * channels + GAP

    @contextlib.contextmanager
    def blocks(self, images):
        """For each block of ``images`` images: its first row of tiles, and how many it has."""
        code = self.code
        rows = code.sum((images, self.across))
        with code.loop(code.builder.udiv(code.sum(rows, self.rows - 1), WORD(self.rows))) as block:
            row = code.sum((block, self.rows))
            yield row, code.minimum(code.builder.sub(rows, row), self.rows)

    @contextlib.contextmanager
    def each_point(self, form: Form):
        """For each point: its number, and that of the filters that belong to it."""
        code, kinds = self.code, len(form.filters)
        with code.loop(self.points) as i, code.loop(self.points) as j:
            kind = (code.minimum(i, kinds - 1), kinds), code.minimum(j, kinds - 1)
            yield code.sum((i, self.points), j), code.sum(*kind)

    @contextlib.contextmanager
    def _tiles(self, x, images: Images, row, some, points):
        """For each tile and vector of channels: its places in x, and at a point."""
        code, width = self.code, images.channels
        parts = width // code.lanes
        with code.loop(some) as i, code.loop(self.across) as j, code.loop(parts) as part:
            number, k = code.sum(row, i), code.sum((part, code.lanes))
            image, above = (divide(number, WORD(self.across))
                            for divide in (code.builder.udiv, code.builder.urem))  # fmt: skip
            pixels = images.side + 2 * images.border
            tile = (image, pixels * images.line), (above, images.tile * images.line)
            place = code.at(x, *tile, (j, images.tile * width), k)
            yield place, code.at(points, (i, self.across * width), (j, width), k)

    def fetch(self, x, images: Images, row, point, to_write: bool = False) -> None:
        """Have a share of the block's lines of x brought into the cache, unless x is null."""
        code = self.code
        share = -(-self.rows * images.inner // LINE // self.points**2)
        nothing = code.builder.icmp_unsigned("==", x, ir.Constant(x.type, None))
        with code.loop(code.builder.select(nothing, WORD(0), WORD(share))) as i:
            line = code.at(x, (row, images.inner), (point, share * LINE), (i, LINE))
            code.prefetch(line, to_write)

    def read(self, x, images: Images, row, some, points, matrix: np.ndarray) -> None:
        """points = the transform by ``matrix`` of tiles of x."""
        steps = [each * self.step(images.channels) for each in (self.points, 1)]
        pixel = images.line, images.channels
        with self._tiles(x, images, row, some, points) as (source, target):
            size = len(matrix[0])
            transform(self.code, to_points, matrix, size, source, pixel, target, steps)

    def write(self, points, y, images: Images, row, some, matrix: np.ndarray, adds: bool) -> None:
        """y = the transform back of tiles at the points; with ``adds``, added to what is there."""
        steps = [each * self.step(images.channels) for each in (self.points, 1)]
        pixel = images.line, images.channels
        with self._tiles(y, images, row, some, points) as (target, source):
            size = self.points
            transform(self.code, from_points, matrix, size, source, steps, target, pixel, adds)

    def product(
        self, a, row: int, step: int, b, out, rows, count, channels: int, adds: bool
    ) -> None:
        """out[r] = sum over k < count of a[r * row + k * step] b[k], for r < rows.

        ``b`` and ``out`` are matrices of ``channels`` columns. A few rows by one or two vectors of
        the sums stay in registers, so up to ``height`` - 1 more rows are written. ``count`` is even
        if there is an even number of tiles to a row.
        """
        code, builder = self.code, self.code.builder
        width = min(2 * code.lanes, channels)
        unroll = 2 - self.across % 2
        blocks = builder.udiv(code.sum(rows, self.height - 1), WORD(self.height))
        with code.loop(blocks) as i, code.loop(channels // width) as j:
            a = code.at(a, (i, self.height * row))
            b = code.at(b, (j, width))
            out = code.at(out, (i, self.height * channels), (j, width))
            sums = {}  # variables, by row and vector
            for r in range(self.height):
                for v in range(0, width, code.lanes):
                    start = code.load(out, r * channels + v).value if adds else code.zero
                    sums[r, v] = cgutils.alloca_once(builder, code.vector)
                    builder.store(start, sums[r, v])
            with code.loop(builder.udiv(code.sum(count), WORD(unroll))) as block:
                for k in (code.sum((block, unroll), more) for more in range(unroll)):
                    factors, values = code.at(a, (k, step)), code.at(b, (k, channels))
                    for (r, v), total in sums.items():
                        product = code.broadcast(factors, r * row) * code.load(values, v)
                        product = Vector(builder, builder.load(total)) + product
                        builder.store(product.value, total)
            for (r, v), total in sums.items():
                code.store(Vector(builder, builder.load(total)), out, r * channels + v)


def forward(code: Code, form: Form, x: Images, y: Images) -> None:
    """y = convolution of x: (x with a border, filters at the points, y, working memory, images).

    Filters are matrices of x's channels by y's, one for each of their points. While the processor
    computes, memory is fetched: the lines of y, and of three arrays of x's shape (see ``kernels``).
    """
    source, u, target, points, images, *ahead = code.function.args
    steps = Steps(code, len(form.read), y.side // y.tile)
    sizes = steps.step(x.channels), steps.step(y.channels)
    products = code.at(points, steps.points**2 * sizes[0])
    with steps.blocks(images) as (row, some):
        steps.read(source, x._replace(border=1), row, some, points, form.read)
        tiles = code.sum((some, steps.across))
        with steps.each_point(form) as (point, kind):
            steps.fetch(target, y, row, point, to_write=True)
            for each in ahead:
                steps.fetch(each, x, row, point)
            a, out = code.at(points, (point, sizes[0])), code.at(products, (point, sizes[1]))
            b = code.at(u, (kind, x.channels * y.channels))
            steps.product(a, x.channels, 1, b, out, tiles, x.channels, y.channels, adds=False)
        steps.write(products, target, y, row, some, form.write, adds=False)
    code.builder.ret_void()


def backward(code: Code, form: Form, x: Images, y: Images, adds: bool) -> None:
    """Both gradients: (x, that of y with a border, filters, sums, gx, working memory, images).

    gx is a convolution of y's gradient with the filters, turned and exchanged: matrices of y's
    channels by x's. With ``adds``, it is added to what is there. To the sums, matrices of x's
    channels by y's, the gradient of the turned filters at their points is added. Fetched are the
    lines of gx, and of two arrays of y's shape and two of x's.
    """
    source, g, u, sums, target, points, images, *ahead = code.function.args
    steps = Steps(code, len(form.read_back), y.side // y.tile, x.channels)
    size, of_y = steps.step(x.channels), steps.step(y.channels)
    gradients = code.at(points, steps.points**2 * size)
    products = code.at(gradients, steps.points**2 * of_y)
    with steps.blocks(images) as (row, some):
        steps.read(source, x, row, some, points, form.write_back)
        steps.read(g, y._replace(border=1), row, some, gradients, form.read_back)
        tiles = code.sum((some, steps.across))
        with steps.each_point(form) as (point, kind):
            steps.fetch(target, x, row, point, to_write=True)
            for each, of in zip(ahead, (y, y, x, x), strict=True):
                steps.fetch(each, of, row, point)
            a, b = code.at(points, (point, size)), code.at(gradients, (point, of_y))
            turned, total = (code.at(each, (kind, x.channels * y.channels)) for each in (u, sums))
            out = code.at(products, (point, size))
            steps.product(b, y.channels, 1, turned, out, tiles, y.channels, x.channels, adds=False)
            steps.product(a, 1, x.channels, b, total, x.channels, tiles, y.channels, adds=True)
        steps.write(products, target, x, row, some, form.write_back, adds)
    code.builder.ret_void()


def filters(code: Code, how, matrix: np.ndarray, size: int, result: int, floats: int) -> None:
    """y = the transform of filters: (size^2 matrices x, result^2 matrices y, some).

    u = G g G^T and g = G^T u G, of the first ``some`` of the ``floats`` of each matrix.
    """
    x, y, some = code.function.args
    steps = [(side * floats, floats) for side in (size, result)]
    with code.loop(code.builder.udiv(some, WORD(code.lanes))) as i:
        source, target = (code.at(pointer, (i, code.lanes)) for pointer in (x, y))
        transform(code, how, matrix, size, source, steps[0], target, steps[1])
    code.builder.ret_void()


class Shape(NamedTuple):
    """What code is made for: convolutions of images of ``side`` x ``side`` pixels."""

    channels: int
    filters: int
    side: int
    stride: int


class Functions(NamedTuple):
    """Addresses of the code for a shape."""

    forward: int
    backward: int
    backward_more: int
    to_points: int
    from_points: int


def build(shape: Shape, lanes: int) -> ir.Module:
    """``Functions`` for that shape."""
    module, form = ir.Module(), FORMS[shape.stride]
    x = Images(shape.channels, shape.side, TILE * shape.stride)
    y = Images(shape.filters, shape.side // shape.stride, TILE)
    forward(Code(module, "forward", lanes, 4, ahead=3), form, x, y)
    backward(Code(module, "backward", lanes, 6, ahead=4), form, x, y, adds=False)
    backward(Code(module, "backward_more", lanes, 6, ahead=4), form, x, y, adds=True)
    points, floats = len(form.filters), shape.channels * shape.filters
    filters(Code(module, "to_points", lanes, 2), to_points, form.filters, 3, points, floats)
    filters(Code(module, "from_points", lanes, 2), from_points, form.filters, points, 3, floats)
    return module


def object_code(shape: Shape, folder: Path) -> bytes:
    """``build`` for this processor, as it is kept in ``folder``, or else is compiled now."""
    made_of = *(Path(each).read_bytes() for each in (__file__, transforms.__file__)), *shape
    return vectors.object_code(functools.partial(build, shape), made_of, folder)


@functools.cache
def compiled(shape: Shape) -> Functions:
    """The code, loaded; it is kept where Numba keeps the kernels."""
    return Functions(*vectors.load(object_code(shape, KEPT), Functions._fields))


def fits(shape: tuple[int, ...], channels: int, stride: int) -> bool:
    """Whether ``Convolution`` can compute ``channels`` filters on (N, C, H, W)."""
    _, c, height, width = shape
    vector = vectors.lanes()
    if not vector or stride not in FORMS or height != width or width % (TILE * stride):
        return False
    return all(n % vector == 0 and (n == vector or n % (2 * vector) == 0) for n in (c, channels))


class Tiles(NamedTuple):
    """What ``kernels`` need for the convolutions of a layer of C channels and K filters."""

    images: int  # of a part, whose sums are taken together
    group: int  # images of a part that go through all passes together
    code: Functions
    filters: np.ndarray  # working memory: (9, C, K),
    turned: np.ndarray  # the same as (9, K, C),
    u: np.ndarray  # the filters at their points, (36, C, K),
    sums: np.ndarray  # of their gradients for each part, (parts, 36, C, K),
    read: np.ndarray  # and of each thread: a group of images within borders of zeros,
    plain: np.ndarray  # one without,
    gradient: np.ndarray  # one of gradients of the output, within borders,
    points: np.ndarray  # and blocks of tiles at the points


class Convolution:
    """The convolutions of a layer, as ``primitives.Convolution``.

    Args:
        shape: (N, C, H, W) of the input.
        channels, stride: Of the output; see ``fits``.
        threads: That many threads have something to do, if there are as many images.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], channels: int, stride: int, threads: int
    ) -> None:
        n, c, side, _ = shape
        small = side // stride
        self.out_shape = n, channels, small, small
        image = 4 * c * side * side
        self.images = max(1, min(PART // image, -(-n // threads)))
        group = min(max(1, GROUP // image), self.images)
        form = FORMS[stride]
        kinds, points = len(form.filters) ** 2, len(form.read) ** 2
        weights = kernels.empty((9, c, channels))
        tiles = tiles_of_a_block(c) + small // TILE + HEIGHT  # no block has room for more
        self.tiles = Tiles(
            self.images,
            group,
            compiled(Shape(c, channels, side, stride)),
            weights,
            weights.reshape(9, channels, c),
            kernels.empty((kinds, c, channels)),
            kernels.empty((-(-n // self.images), kinds, c, channels)),
            _within_borders("read", c, side, group),
            _memory(group * image // 4, "plain"),
            _within_borders("gradient", channels, small, group),
            _memory(points * (tiles * (2 * c + channels) + 3 * GAP), "points"),
        )

    def convolve(self, x, normalization, shortcut, out, w, h) -> np.ndarray:
        """As ``kernels.convolve``."""
        w = np.ascontiguousarray(w).reshape(*w.shape[:2], 9)
        return kernels.convolve_by_tiles(self.tiles, x, normalization, shortcut, out, w, h)

    def gradients(self, g, h, coefficients, x, normalization, out, w, gw, gx, adds) -> np.ndarray:
        """As ``kernels.convolve_backward``."""
        w, gw = (each.reshape(*w.shape[:2], 9) for each in (np.ascontiguousarray(w), gw))
        gx = gx if len(gx) else kernels.empty(x.shape)
        parts = kernels.convolve_backward_by_tiles(
            self.tiles, g, h, coefficients, x, normalization, out, w, gx, adds
        )
        kernels.filters_from_points(self.tiles, gw)
        return parts


convolution = functools.cache(Convolution)


@functools.cache
def _within_borders(what: str, channels: int, side: int, group: int) -> np.ndarray:
    """Of every thread: a group of images, for ``what``, whose borders stay zero."""
    padded = kernels.empty((config.NUMBA_NUM_THREADS, group, side + 2, (side + 2) * channels))
    padded[:] = 0
    return padded


@functools.cache
def _memory(floats: int, what: str) -> np.ndarray:
    """Of every thread, for ``what``."""
    return kernels.empty((config.NUMBA_NUM_THREADS, floats))
