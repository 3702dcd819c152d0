"""The CPU backend's passes over a batch: convolutions and what lies between them, compiled.

Batch normalization needs sums over a whole batch, so a layer is computed in passes; within a pass,
a thread takes a part of a few images through everything that can be done to it: what the
convolution reads is made, and what it wrote is summed, in the cache.

Arrays are channels last, float32, viewed as rows (N, M, C) of one or several pixels: the compiler
makes good use of the processor's vectors only where C is large, so the caller joins pixels to rows
and repeats what belongs to a channel. A sum is taken in parts and chunks of rows whose
results are added in a fixed order, so that it does not depend on which thread took which part. ReLU
lets NaN through, as NumPy's maximum does.
"""

from __future__ import annotations

import atexit
import math
import shutil
import tempfile

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.cpu_options import ParallelOptions
from numba.extending import intrinsic
from numba.np import arrayobj

from resnet.backends.cpu import kept

CHUNK = 64  # rows; float32 sums stay short, float64 sums few
COLUMNS = 1024  # values of a row that a thread sums
LINE = 16  # floats of a cache line
SLICE = 8  # channels of whose filters a thread sums the gradients
if numba.config.DISABLE_JIT:
    raise ImportError("nothing is compiled")
# Whether the next process finds what this one compiles; if not, it has a folder for itself.
try:
    kept.njit()(lambda: None)
    KEEPS = True
except RuntimeError:  # neither the folder of this file nor the home can be written to
    KEEPS = False
    numba.config.CACHE_DIR = tempfile.mkdtemp(prefix="kernels-")
    atexit.register(shutil.rmtree, numba.config.CACHE_DIR, ignore_errors=True)
# Loops of numba.prange and no others: to wake a thread takes longer than to fill a small array.
_OTHERS = "comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion"
_PARALLEL = ParallelOptions({**dict.fromkeys(_OTHERS, False), "prange": True})
_compile = kept.njit(parallel=_PARALLEL, fastmath={"contract", "reassoc", "nsz"})
_inline = kept.njit(fastmath={"contract", "reassoc", "nsz"})


# oneDNN's functions, by the names under which ``primitives.library`` makes them known to LLVM.
FUNCTIONS = "dnnl_memory_set_data_handle", "dnnl_primitive_execute"
_set_handle = types.ExternalFunction(FUNCTIONS[0], types.int32(types.int64, types.int64))
_execute = types.ExternalFunction(
    FUNCTIONS[1], types.int32(types.int64, types.int64, types.int32, types.int64)
)
# A primitive, ready to be run on arrays: addresses, and the status of its last run.
CALL = np.dtype(
    [
        ("primitive", np.int64),
        ("stream", np.int64),
        ("count", np.int64),  # of its arguments
        ("arguments", np.int64),
        ("memories", np.int64, 4),  # of each argument, to be pointed at an array
        ("status", np.int64),
    ]
)


@intrinsic
def _run(typing, function, arrays, count, ahead):
    """The function of ``winograd.Functions`` at the address ``function``, on arrays.

    ``ahead`` are the addresses, or 0, of arrays that are fetched meanwhile.
    """

    def generate(context, builder, signature, arguments):
        address, arrays, count, ahead = arguments
        pointers = [
            context.make_array(kind)(context, builder, array).data
            for kind, array in zip(
                signature.args[1], cgutils.unpack_tuple(builder, arrays), strict=True
            )
        ]
        fetched = [
            builder.inttoptr(each, pointers[0].type)
            for each in cgutils.unpack_tuple(builder, ahead)
        ]
        values = [*pointers, count, *fetched]
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(builder.inttoptr(address, kind.as_pointer()), values)
        return context.get_dummy_value()

    if len(ahead):
        ahead = types.UniTuple(types.int64, len(ahead))
    return types.void(types.int64, arrays, types.int64, ahead), generate


def empty(shape):
    """A float32 array that begins with a cache line."""
    size = math.prod(shape)
    memory = np.empty(size + LINE, np.float32)
    begin = -memory.ctypes.data // 4 % LINE
    return memory[begin : begin + size].reshape(shape)


@intrinsic
def _view(typing, array, rows, width):
    """The first values of a contiguous array as (rows, width); a reshape takes long to compile."""
    if array.layout != "C":
        return None  # a slice with gaps: an error of types
    kind = types.Array(array.dtype, 2, "C")

    def generate(context, builder, signature, arguments):
        value, *shape = arguments
        data = context.make_array(array)(context, builder, value).data
        view = context.make_array(kind)(context, builder)
        size = context.get_constant(types.intp, array.dtype.bitwidth // 8)
        strides = [builder.mul(shape[1], size), size]
        arrayobj.populate_array(view, data, shape, strides, size, meminfo=None)
        return view._getvalue()

    return kind(array, types.intp, types.intp), generate


@_inline
def _flat(x):
    """All rows of all images."""
    return _view(x, x.shape[0] * x.shape[1], x.shape[2])


@_inline
def _run_primitive(call):
    return _execute(call.primitive, call.stream, np.int32(call.count), call.arguments)


@_inline
def execute(call, a, b, c, scratch):
    """Run a primitive of three arguments and working memory; ``call`` is a ``CALL``."""
    memories = call.memories
    _set_handle(memories[0], a.ctypes.data)
    _set_handle(memories[1], b.ctypes.data)
    _set_handle(memories[2], c.ctypes.data)
    _set_handle(memories[3], scratch.ctypes.data)
    call.status = _run_primitive(call)


@_inline
def reorder(call, source, target):
    """Run a primitive of these two arguments; ``call`` is a ``CALL``."""
    _set_handle(call.memories[0], source.ctypes.data)
    _set_handle(call.memories[1], target.ctypes.data)
    _check(_run_primitive(call))


@_inline
def _check(status):
    if status:
        raise RuntimeError("oneDNN could not compute a convolution")


@_inline
def _check_all(calls):
    for k in range(len(calls)):
        _check(calls[k].status)


@_inline
def _scale_shift_relu(x, scale, shift, y):
    rows, channels = x.shape
    for i in range(rows):
        for c in range(channels):
            v = x[i, c] * scale[c] + shift[c]
            y[i, c] = np.float32(0) if v <= 0 else v


@_inline
def _scale_shift_add_relu(x, scale, shift, shortcut, y):
    rows, channels = x.shape
    for i in range(rows):
        for c in range(channels):
            v = x[i, c] * scale[c] + shift[c] + shortcut[i, c]
            y[i, c] = np.float32(0) if v <= 0 else v


@_inline
def _moments(x, seen, part):
    """Mean and sum of squared deviations of the rows, float64 (2, C), and of ``seen`` before."""
    rows, channels = x.shape
    for begin in range(0, rows, CHUNK):
        end = min(begin + CHUNK, rows)
        # Relative to the chunk's first row: the mean may be large beside the deviation.
        first = x[begin]
        total = np.zeros(channels, np.float32)  # of its own: nothing can alias it
        square = np.zeros(channels, np.float32)
        whole = begin + (end - begin) // 4 * 4
        for i in range(begin, whole, 4):
            for c in range(channels):
                a, b = x[i, c] - first[c], x[i + 1, c] - first[c]
                d, e = x[i + 2, c] - first[c], x[i + 3, c] - first[c]
                total[c] += (a + b) + (d + e)
                square[c] += (a * a + b * b) + (d * d + e * e)
        for i in range(whole, end):
            for c in range(channels):
                a = x[i, c] - first[c]
                total[c] += a
                square[c] += a * a
        count = np.float64(end - begin)
        total_count = seen + end
        weight, cross = count / total_count, (seen + begin) * count / total_count  # Chan's formula
        for c in range(channels):
            mean = np.float64(total[c]) / count
            step = first[c] + mean - part[0, c]
            part[0, c] += step * weight
            part[1, c] += max(square[c] - total[c] * mean, 0.0) + step * step * cross


@_inline
def _copy(x, y):
    """y = x. Numba's own assignment of arrays brings an error message that is slow to compile."""
    rows, channels = x.shape
    for i in range(rows):
        for c in range(channels):
            y[i, c] = x[i, c]


@_inline
def _add(x, y):
    """y += x."""
    rows, channels = x.shape
    for i in range(rows):
        for c in range(channels):
            y[i, c] += x[i, c]


@_inline
def _combine(g, h, coefficients, gh):
    """gh = factor * g + slope * h + offset, the gradient of h."""
    factor, slope, offset = coefficients[0], coefficients[1], coefficients[2]
    rows, channels = h.shape
    for i in range(rows):
        for c in range(channels):
            gh[i, c] = factor[c] * g[i, c] + slope[c] * h[i, c] + offset[c]


@_inline
def _mask(g, y):
    """g = 0 where y is 0, in place."""
    rows, channels = y.shape
    for i in range(rows):
        for c in range(channels):
            g[i, c] = np.float32(0) if y[i, c] <= 0 else g[i, c]


@_inline
def _add_sums(x, g, mean, part):
    """Add the sums of g and of g * (x - mean) to part, float64 (2, C)."""
    rows, channels = x.shape
    for begin in range(0, rows, CHUNK):
        end = min(begin + CHUNK, rows)
        total = np.zeros(channels, np.float32)  # of its own: nothing can alias it
        product = np.zeros(channels, np.float32)
        whole = begin + (end - begin) // 4 * 4
        for i in range(begin, whole, 4):
            for c in range(channels):
                m = mean[c]
                a, b, d, e = g[i, c], g[i + 1, c], g[i + 2, c], g[i + 3, c]
                total[c] += (a + b) + (d + e)
                product[c] += (a * (x[i, c] - m) + b * (x[i + 1, c] - m)) + (
                    d * (x[i + 2, c] - m) + e * (x[i + 3, c] - m)
                )
        for i in range(whole, end):
            for c in range(channels):
                total[c] += g[i, c]
                product[c] += g[i, c] * (x[i, c] - mean[c])
        for c in range(channels):
            part[0, c] += total[c]
            part[1, c] += product[c]


@_compile
def convolve(forward, images, x, normalization, shortcut, out, w, h, work, scratch):
    """h = convolution(relu(BN(x) + shortcut)); moments of the parts of h, float64 (parts, 2, C).

    Args:
        forward: The convolution's ``primitives.Calls``; a part has ``images`` images.
        x: Rows of all images, (N, rows of an image, C); read as it is without normalization.
        normalization: Of x, from ``scale_and_shift``, or empty.
        shortcut: Rows, or empty: none.
        out: Where to write what the convolution reads; if empty, it is not kept.
        w: Weights (K, C, 3, 3).
        h: Rows, to be written.
        work: (threads, floats); the first ``scratch`` of a thread's are the convolution's.
    """
    calls, weights = forward.parts, forward.weights
    reorder(forward.reorder[0], w, weights)
    parts = np.zeros((len(calls), 2, h.shape[2]), np.float64)
    for k in numba.prange(len(calls)):
        own = work[numba.get_thread_id()]
        some = slice(k * images, (k + 1) * images)
        xs, hs = _flat(x[some]), _flat(h[some])
        source = xs
        if len(normalization):
            if len(out):
                source = _flat(out[some])
            else:
                source = _view(own[scratch:], xs.shape[0], xs.shape[1])
            if len(shortcut):
                added = _flat(shortcut[some])
                _scale_shift_add_relu(xs, normalization[0], normalization[1], added, source)
            else:
                _scale_shift_relu(xs, normalization[0], normalization[1], source)
        execute(calls[k], source, weights, hs, own)
        _moments(hs, 0, parts[k])
    _check_all(calls)
    return parts


@_compile
def output_gradient(images, h, gy, y, mean, g):
    """g = gy where y is above 0, else 0: the gradient before the ReLU; sums as _add_sums's."""
    count = (len(h) + images - 1) // images
    parts = np.zeros((count, 2, h.shape[2]), np.float64)
    for k in numba.prange(count):
        some = slice(k * images, (k + 1) * images)
        gs = _flat(g[some])
        _copy(_flat(gy[some]), gs)
        _mask(gs, _flat(y[some]))
        _add_sums(_flat(h[some]), gs, mean, parts[k])
    return parts


@_inline
def _what_was_read(x, normalization, out, memory):
    """Rows that a convolution read: those of ``out``, or if it is empty, made from x again."""
    if len(out):
        return out
    if len(normalization) == 0:
        return x
    rows, channels = x.shape
    y = _view(memory, rows, channels)
    _scale_shift_relu(x, normalization[0], normalization[1], y)
    return y


@_compile
def convolve_backward(
    weights,
    data,
    images,
    g,
    h,
    coefficients,
    x,
    normalization,
    out,
    w,
    gw,
    gx,
    adds,
    work,
    scratch,
):
    """The gradients of ``convolve``'s weights and of what it reads.

    Args:
        weights, data: The convolution's ``primitives.Calls``.
        g: Gradient of BN(h).
        coefficients: Of the gradient of h, from ``input_coefficients``.
        x, normalization: As ``convolve`` has them.
        out: What the convolution read; if empty, it is made again.
        w, gw: Weights and their gradient, (K, C, 3, 3); gw is written.
        gx: Gradient of x, or of BN(x) where x is normalized, to be written; if empty, it is not.
        adds: Whether to add to gx what is in it already.

    Returns:
        Where x is normalized, the sums over gx for ``input_coefficients``.
    """
    weights_parts, gws = weights.parts, weights.weights
    data_parts, ws = data.parts, data.weights
    reorder(data.reorder[0], w, ws)
    parts = np.zeros((len(data_parts), 2, x.shape[2]), np.float64)
    for k in numba.prange(len(data_parts)):
        own = work[numba.get_thread_id()]
        some = slice(k * images, (k + 1) * images)
        xs, hs = _flat(x[some]), _flat(h[some])
        end = scratch + hs.size
        gh = _view(own[scratch:], hs.shape[0], hs.shape[1])
        _combine(_flat(g[some]), hs, coefficients, gh)
        source = _what_was_read(xs, normalization, _flat(out[some]), own[end:])
        execute(weights_parts[k], source, gh, gws[k], own)
        if len(gx):
            gxs = _flat(gx[some])
            if adds:
                more = _view(own[end + xs.size :], xs.shape[0], xs.shape[1])
                execute(data_parts[k], gh, ws, more, own)
                _add(more, gxs)
            else:
                execute(data_parts[k], gh, ws, gxs, own)
            if len(normalization):
                _mask(gxs, source)
                _add_sums(xs, gxs, normalization[2], parts[k])
    _check_all(weights_parts)
    _check_all(data_parts)
    _sum_rows(gws)
    reorder(weights.reorder[0], gws[0], gw)
    return parts


@_inline
def _inner(padded, i, r, rows, width):
    """Row of pixels r of image i within its borders, as ``rows`` rows."""
    channels = padded.shape[2] // padded.shape[1]
    return _view(padded[i, r + 1, channels:], rows, width)


@_inline
def _enter(x, normalization, shortcut, out, padded):
    """padded = relu(BN(x) + shortcut) within its borders; also out, unless it is empty."""
    images, rows, width = x.shape
    side = padded.shape[1] - 2
    rows //= side  # of a row of pixels
    for i in range(images):
        for r in range(side):
            some, inner = slice(r * rows, (r + 1) * rows), _inner(padded, i, r, rows, width)
            if len(normalization) == 0:
                _copy(x[i, some], inner)
            elif len(shortcut):
                scale, shift = normalization[0], normalization[1]
                _scale_shift_add_relu(x[i, some], scale, shift, shortcut[i, some], inner)
            else:
                _scale_shift_relu(x[i, some], normalization[0], normalization[1], inner)
            if len(out):
                _copy(inner, out[i, some])


@_inline
def _enter_gradient(g, h, coefficients, padded):
    """padded = the gradient of h, within its borders."""
    images, rows, width = g.shape
    side = padded.shape[1] - 2
    rows //= side  # of a row of pixels
    for i in range(images):
        for r in range(side):
            some, inner = slice(r * rows, (r + 1) * rows), _inner(padded, i, r, rows, width)
            _combine(g[i, some], h[i, some], coefficients, inner)


@_inline
def _address(x, i):
    """Where image i of x begins; 0 if x ends before it."""
    return np.int64(x[i:].ctypes.data) if i < len(x) else np.int64(0)


@_inline
def _filters_to_points(function, w, backward, g, u):
    """u = the filters w at their points; of the turned ones if it goes ``backward``.

    Args:
        function: Address of the code.
        w: (K, C, 9).
        g: Working memory, (9, C, K), or (9, K, C) backward.
    """
    filters, channels, _ = w.shape
    if backward:
        for k in range(filters):
            for c in range(channels):
                for p in range(9):
                    g[8 - p, k, c] = w[k, c, p]
    else:
        for c in range(channels):
            for k in range(filters):
                for p in range(9):
                    g[p, c, k] = w[k, c, p]
    _run(function, (g, u), filters * channels, ())


@_compile
def filters_from_points(tiles, gw):
    """gw = the gradient of the filters, (K, C, 9), from the sums of the parts at the points.

    These are those of the filters turned by 180 degrees.
    """
    from_points, sums, filters = tiles.code.from_points, tiles.sums, tiles.filters
    count, channels, _ = gw.shape
    for first in numba.prange(channels // SLICE):
        some = slice(first * SLICE, (first + 1) * SLICE)
        for k in range(1, len(sums)):
            for point in range(sums.shape[1]):
                _add(sums[k, point, some], sums[0, point, some])
        total, g = sums[0, 0, some], filters[0, some]
        _run(from_points, (total, g), SLICE * count, ())
        for k in range(count):
            for c in range(first * SLICE, (first + 1) * SLICE):
                for p in range(9):
                    gw[k, c, p] = filters[8 - p, c, k]


@_compile
def convolve_by_tiles(tiles, x, normalization, shortcut, out, w, h):
    """As ``convolve``, by ``winograd.Tiles``, a group of images after the other."""
    images, group = tiles.images, tiles.group
    u, padded, points = tiles.u, tiles.read, tiles.points
    count = (len(x) + images - 1) // images
    parts = np.zeros((count, 2, h.shape[2]), np.float64)
    _filters_to_points(tiles.code.to_points, w, False, tiles.filters, u)
    forward = tiles.code.forward
    for k in numba.prange(count):
        thread = numba.get_thread_id()
        read = padded[thread]
        end = min((k + 1) * images, len(x))
        seen = 0
        for begin in range(k * images, end, group):
            some = slice(begin, min(begin + group, end))
            _enter(x[some], normalization, shortcut[some], out[some], read)
            hs = h[some]
            after = begin + group  # what is read and written next: memory is slower than products
            ahead = _address(x, after), _address(shortcut, after), _address(out, after)
            _run(forward, (read, u, hs, points[thread]), len(hs), ahead)
            _moments(_flat(hs), seen, parts[k])
            seen += len(hs) * hs.shape[1]
    return parts


@_compile
def convolve_backward_by_tiles(tiles, g, h, coefficients, x, normalization, out, w, gx, adds):
    """As ``convolve_backward``, but gx is always written, and the filters' gradient is not.

    Of that ``tiles.sums`` are written, for ``filters_from_points``.
    """
    images, group = tiles.images, tiles.group
    u, points = tiles.u, tiles.points
    plain, padded = tiles.plain, tiles.gradient  # of each thread
    count = (len(x) + images - 1) // images
    parts = np.zeros((count, 2, x.shape[2]), np.float64)
    _filters_to_points(tiles.code.to_points, w, True, tiles.turned, u)
    backward = tiles.code.backward_more if adds else tiles.code.backward
    sums = tiles.sums
    kept, unread = x, x[:0]  # what is read first, and what only the sums are taken over
    if len(out):
        kept, unread = out, x
    for k in numba.prange(count):
        thread = numba.get_thread_id()
        gradient = padded[thread]
        sums[k] = 0
        end = min((k + 1) * images, len(x))
        for begin in range(k * images, end, group):
            some = slice(begin, min(begin + group, end))
            xs, gxs = _flat(x[some]), _flat(gx[some])
            source = _what_was_read(xs, normalization, _flat(out[some]), plain[thread])
            _enter_gradient(g[some], h[some], coefficients, gradient)
            arrays = source, gradient, u, sums[k], gxs, points[thread]
            after = begin + group
            of_y = _address(g, after), _address(h, after)
            of_x = _address(kept, after), _address(unread, begin)
            _run(backward, arrays, len(x[some]), of_y + of_x)
            if len(normalization):
                _mask(gxs, source)
                _add_sums(xs, gxs, normalization[2], parts[k])
    return parts


@kept.njit()
def _combined_moments(parts, images, total, pixels, channels):
    """Mean and (biased) variance of every channel, float64 (C,), from those of the parts.

    ``images`` of the ``total`` are in a part, but for the last; ``pixels`` in a place of a row.
    """
    mean = np.zeros(channels, np.float64)
    squares = np.zeros(channels, np.float64)
    seen = 0
    for k in range(len(parts)):  # Chan's formula: count, mean and squares of all values so far
        count = min(images, total - k * images) * pixels
        for pixel in range(0, parts.shape[2], channels):
            for c in range(channels):
                step = parts[k, 0, pixel + c] - mean[c]
                mean[c] += step * count / (seen + count)
                squares[c] += parts[k, 1, pixel + c] + step * step * seen * count / (seen + count)
            seen += count
    return mean, squares / seen


@kept.njit()
def batch_statistics(parts, images, total, pixels, avg_mean, avg_var, decay):
    """Mean and variance of every channel, float32 (C,); the running averages are updated.

    As ``chainer.functions.batch_normalization`` does, with the unbiased variance.
    """
    mean, var = _combined_moments(parts, images, total, pixels, len(avg_mean))
    count = total * pixels * (parts.shape[2] // len(avg_mean))
    unbiased = count / max(count - 1, 1)
    for c in range(len(mean)):
        avg_mean[c] = decay * avg_mean[c] + (1 - decay) * mean[c]
        avg_var[c] = decay * avg_var[c] + (1 - decay) * unbiased * var[c]
    return mean.astype(np.float32), var.astype(np.float32)


@kept.njit()
def scale_and_shift(mean, var, gamma, beta, eps, width):
    """BN(x) = x * scale + shift; also mean and 1 / deviation. Float32 (4, width), repeated."""
    channels = len(mean)
    values = np.empty((4, width), np.float32)
    for c in range(width):
        k = c % channels
        deviation = np.float32(1) / np.sqrt(var[k] + eps)
        scale = gamma[k] * deviation
        values[0, c] = scale
        values[1, c] = beta[k] - mean[k] * scale
        values[2, c] = mean[k]
        values[3, c] = deviation
    return values


@kept.njit()
def input_coefficients(parts, normalization, count, channels, constant):
    """From the gradient's sums those of gamma and beta (C,), and what the input's is made of.

    gx = factor * g + slope * x + offset is gamma / s * (g - avg(g) - xhat * avg(g * xhat)) with
    xhat = (x - mean) / s; where mean and s are ``constant``, it is gamma / s * g. The three come
    as one float32 (3, width).
    """
    scale, _, mean, deviation = normalization
    sums = np.zeros((2, channels), np.float64)
    for k in range(len(parts)):
        for i in range(2):
            for pixel in range(0, parts.shape[2], channels):
                for c in range(channels):
                    sums[i, c] += parts[k, i, pixel + c]
    gbeta = sums[0].astype(np.float32)
    ggamma = sums[1].astype(np.float32) * deviation[:channels]
    values = np.zeros((3, len(scale)), np.float32)
    for c in range(len(scale)):
        k = c % channels
        values[0, c] = scale[c]
        if not constant:
            values[1, c] = -scale[c] * ggamma[k] * deviation[c] / count
            values[2, c] = -scale[c] * gbeta[k] / count - values[1, c] * mean[c]
    return ggamma, gbeta, values


@_compile
def _sum_rows(rows):
    """The first row becomes the sum of all."""
    count, width = rows.shape
    for block in numba.prange((width + COLUMNS - 1) // COLUMNS):
        end = min((block + 1) * COLUMNS, width)
        for k in range(1, count):
            for c in range(block * COLUMNS, end):
                rows[0, c] += rows[k, c]


@_compile
def finish(x, normalization, shortcut, y):
    """y = relu(BN(x) + shortcut); none if it is empty."""
    for k in numba.prange(len(x)):
        if len(shortcut):
            _scale_shift_add_relu(x[k], normalization[0], normalization[1], shortcut[k], y[k])
        else:
            _scale_shift_relu(x[k], normalization[0], normalization[1], y[k])


@_compile
def widen(x, step, y):
    """Option A: every ``step``-th pixel, and channels of zeros. Arrays are (N, H, W, C)."""
    images, height, width, _ = y.shape
    for k in numba.prange(images):
        y[k] = 0
        for i in range(height):
            for j in range(width):
                for c in range(x.shape[3]):
                    y[k, i, j, c] = x[k, i * step, j * step, c]


@_compile
def widen_gradient(g, step, gx):
    """The gradient of x in ``widen`` from that of y."""
    images, height, width, _ = g.shape
    for k in numba.prange(images):
        gx[k] = 0
        for i in range(height):
            for j in range(width):
                for c in range(gx.shape[3]):
                    gx[k, i * step, j * step, c] = g[k, i, j, c]


@_compile
def add_relu(x, shortcut, y):
    """y = relu(x + shortcut)."""
    images, rows, channels = x.shape
    for k in numba.prange(images):
        for i in range(rows):
            for c in range(channels):
                v = x[k, i, c] + shortcut[k, i, c]
                y[k, i, c] = np.float32(0) if v <= 0 else v


@_compile
def masked(gy, y, g):
    """g = gy where y is above 0, else 0: the gradient before the ReLU."""
    for k in numba.prange(len(y)):
        _copy(gy[k], g[k])
        _mask(g[k], y[k])


@_compile
def add(x, y):
    """y += x."""
    for k in numba.prange(len(x)):
        _add(x[k], y[k])


@_compile
def momentum_step(p, g, v, rate, momentum, weight_decay):
    """v = momentum * v - rate * (g + weight_decay * p); p += v. Flat arrays."""
    for i in numba.prange(len(p)):
        v[i] = momentum * v[i] - rate * (g[i] + weight_decay * p[i])
        p[i] += v[i]


@_compile
def gated(h, x, z, y):
    """y = h T + x (1 - T) with T = sigmoid(z)."""
    images, rows, channels = y.shape
    for k in numba.prange(images):
        for i in range(rows):
            for c in range(channels):
                t = np.float32(1) / (np.float32(1) + np.exp(-z[k, i, c]))
                y[k, i, c] = x[k, i, c] + t * (h[k, i, c] - x[k, i, c])


@_compile
def gated_gradients(h, x, z, gy, gh, gx, gz):
    """The gradients of h, x and z in ``gated``."""
    images, rows, channels = gy.shape
    for k in numba.prange(images):
        for i in range(rows):
            for c in range(channels):
                t = np.float32(1) / (np.float32(1) + np.exp(-z[k, i, c]))
                g = gy[k, i, c]
                gh[k, i, c] = g * t
                gx[k, i, c] = g * (np.float32(1) - t)
                gz[k, i, c] = g * (h[k, i, c] - x[k, i, c]) * t * (np.float32(1) - t)
