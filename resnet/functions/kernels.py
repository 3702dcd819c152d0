"""What lies between the convolutions, fused: batch normalization, shortcut and ReLU, compiled.

Arrays are channels last, float32, viewed as rows (M, C) of one or several pixels: the compiler
makes good use of the processor's vectors only where C is large, so the caller joins pixels to rows
and repeats what belongs to a channel. A sum over M is taken in chunks of rows whose results are
added in a fixed order, so that it does not depend on the number of threads. ReLU lets NaN through,
as NumPy's maximum does.
"""

from __future__ import annotations

import numba
import numpy as np

CHUNK = 64  # rows; float32 sums stay short, float64 sums few
_compile = numba.njit(parallel=True, cache=True, fastmath={"contract", "reassoc", "nsz"})


@_compile
def partial_moments(x):
    """Mean and sum of squared deviations of each chunk of rows, float32 (chunks, 2, C)."""
    rows, channels = x.shape
    chunks = (rows + CHUNK - 1) // CHUNK
    parts = np.zeros((chunks, 2, channels), np.float32)
    for k in numba.prange(chunks):
        first = x[k * CHUNK]
        total = np.zeros(channels, np.float32)  # of its own: nothing can alias it
        square = np.zeros(channels, np.float32)
        begin, end = k * CHUNK, min((k + 1) * CHUNK, rows)
        whole = begin + (end - begin) // 4 * 4
        # Relative to the chunk's first pixel: the mean may be large beside the deviation.
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
        count = np.float32(end - begin)
        for c in range(channels):
            parts[k, 0, c] = first[c] + total[c] / count
            parts[k, 1, c] = max(square[c] - total[c] * total[c] / count, np.float32(0))
    return parts


@numba.njit(cache=True)
def moments(parts, rows, channels):
    """Mean and (biased) variance of every channel, float32 (C,), from the parts of ``rows``."""
    mean = np.zeros(channels, np.float64)
    squares = np.zeros(channels, np.float64)
    seen = 0
    for k in range(len(parts)):  # Chan's formula: count, mean and squares of all values so far
        count = min(CHUNK, rows - k * CHUNK)
        for pixel in range(0, parts.shape[2], channels):
            for c in range(channels):
                step = parts[k, 0, pixel + c] - mean[c]
                mean[c] += step * count / (seen + count)
                squares[c] += parts[k, 1, pixel + c] + step * step * seen * count / (seen + count)
            seen += count
    return mean.astype(np.float32), (squares / seen).astype(np.float32)


@numba.njit(cache=True)
def scale_and_shift(mean, var, gamma, beta, eps, width):
    """BN(x) = x * scale + shift; also mean and 1 / deviation. Float32 (width,), repeated."""
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


@numba.njit(cache=True)
def input_coefficients(parts, scale, mean, deviation, count, channels):
    """From the gradient's sums those of gamma and beta (C,), and what the input's is made of.

    gx = factor * g + slope * x + offset is gamma / s * (g - avg(g) - xhat * avg(g * xhat)) with
    xhat = (x - mean) / s; the three come as one float32 (3, width).
    """
    sums = np.zeros((2, channels), np.float64)
    for k in range(len(parts)):
        for i in range(2):
            for pixel in range(0, parts.shape[2], channels):
                for c in range(channels):
                    sums[i, c] += parts[k, i, pixel + c]
    gbeta = sums[0].astype(np.float32)
    ggamma = sums[1].astype(np.float32) * deviation[:channels]
    values = np.empty((3, len(scale)), np.float32)
    for c in range(len(scale)):
        k = c % channels
        values[0, c] = scale[c]
        values[1, c] = -scale[c] * ggamma[k] * deviation[c] / count
        values[2, c] = -scale[c] * gbeta[k] / count - values[1, c] * mean[c]
    return ggamma, gbeta, values


@_compile
def scale_shift_relu(x, scale, shift, y):
    """y = relu(x * scale + shift)."""
    rows, channels = x.shape
    for i in numba.prange(rows):
        for c in range(channels):
            v = x[i, c] * scale[c] + shift[c]
            y[i, c] = np.float32(0) if v <= 0 else v


@_compile
def scale_shift_add_relu(x, scale, shift, shortcut, y):
    """y = relu(x * scale + shift + shortcut)."""
    rows, channels = x.shape
    for i in numba.prange(rows):
        for c in range(channels):
            v = x[i, c] * scale[c] + shift[c] + shortcut[i, c]
            y[i, c] = np.float32(0) if v <= 0 else v


@_compile
def add_relu(x, shortcut, y):
    """y = relu(x + shortcut)."""
    rows, channels = x.shape
    for i in numba.prange(rows):
        for c in range(channels):
            v = x[i, c] + shortcut[i, c]
            y[i, c] = np.float32(0) if v <= 0 else v


@_compile
def masked(gy, y, g):
    """g = gy where y is above 0, else 0: the gradient before the ReLU."""
    rows, channels = y.shape
    for i in numba.prange(rows):
        for c in range(channels):
            g[i, c] = np.float32(0) if y[i, c] <= 0 else gy[i, c]


@_compile
def add(x, y):
    """y += x."""
    rows, channels = x.shape
    for i in numba.prange(rows):
        for c in range(channels):
            y[i, c] += x[i, c]


@numba.njit(inline="always")
def _before_relu(v, gy, scale, shift):
    return np.float32(0) if v * scale + shift <= 0 else gy


@_compile
def gradient_sums(x, gy, scale, shift, mean):
    """Sums over chunks of rows of g and of g * (x - mean), float32 (chunks, 2, C).

    g is the gradient before the ReLU: gy where x * scale + shift is above 0, else 0.
    """
    rows, channels = x.shape
    chunks = (rows + CHUNK - 1) // CHUNK
    parts = np.zeros((chunks, 2, channels), np.float32)
    for k in numba.prange(chunks):
        total = np.zeros(channels, np.float32)  # of its own: nothing can alias it
        product = np.zeros(channels, np.float32)
        begin, end = k * CHUNK, min((k + 1) * CHUNK, rows)
        whole = begin + (end - begin) // 4 * 4
        for i in range(begin, whole, 4):
            for c in range(channels):
                s, t, m = scale[c], shift[c], mean[c]
                v0, v1, v2, v3 = x[i, c], x[i + 1, c], x[i + 2, c], x[i + 3, c]
                g0 = _before_relu(v0, gy[i, c], s, t)
                g1 = _before_relu(v1, gy[i + 1, c], s, t)
                g2 = _before_relu(v2, gy[i + 2, c], s, t)
                g3 = _before_relu(v3, gy[i + 3, c], s, t)
                total[c] += (g0 + g1) + (g2 + g3)
                product[c] += (g0 * (v0 - m) + g1 * (v1 - m)) + (g2 * (v2 - m) + g3 * (v3 - m))
        for i in range(whole, end):
            for c in range(channels):
                g = _before_relu(x[i, c], gy[i, c], scale[c], shift[c])
                total[c] += g
                product[c] += g * (x[i, c] - mean[c])
        parts[k, 0] = total
        parts[k, 1] = product
    return parts


@_compile
def masked_gradient_sums(x, gy, y, mean, g):
    """The same, with the mask from the layer's output y; writes g, which the shortcut needs."""
    rows, channels = x.shape
    chunks = (rows + CHUNK - 1) // CHUNK
    parts = np.zeros((chunks, 2, channels), np.float32)
    for k in numba.prange(chunks):
        total = np.zeros(channels, np.float32)  # of its own: nothing can alias it
        product = np.zeros(channels, np.float32)
        begin, end = k * CHUNK, min((k + 1) * CHUNK, rows)
        whole = begin + (end - begin) // 2 * 2
        for i in range(begin, whole, 2):
            for c in range(channels):
                g0 = np.float32(0) if y[i, c] <= 0 else gy[i, c]
                g1 = np.float32(0) if y[i + 1, c] <= 0 else gy[i + 1, c]
                g[i, c] = g0
                g[i + 1, c] = g1
                total[c] += g0 + g1
                product[c] += g0 * (x[i, c] - mean[c]) + g1 * (x[i + 1, c] - mean[c])
        for i in range(whole, end):
            for c in range(channels):
                v = np.float32(0) if y[i, c] <= 0 else gy[i, c]
                g[i, c] = v
                total[c] += v
                product[c] += v * (x[i, c] - mean[c])
        parts[k, 0] = total
        parts[k, 1] = product
    return parts


@_compile
def relu_input_gradient(x, gy, scale, shift, factor, slope, offset, gx):
    """gx = factor * g + slope * x + offset, the gradient of a normalization's input."""
    rows, channels = x.shape
    for i in numba.prange(rows):
        for c in range(channels):
            v = x[i, c]
            g = np.float32(0) if v * scale[c] + shift[c] <= 0 else gy[i, c]
            gx[i, c] = factor[c] * g + slope[c] * v + offset[c]


@_compile
def input_gradient(x, g, factor, slope, offset, gx):
    """The same for a gradient that has been masked."""
    rows, channels = x.shape
    for i in numba.prange(rows):
        for c in range(channels):
            gx[i, c] = factor[c] * g[i, c] + slope[c] * x[i, c] + offset[c]


@_compile
def momentum_step(p, g, v, rate, momentum, weight_decay):
    """v = momentum * v - rate * (g + weight_decay * p); p += v. Flat arrays."""
    for i in numba.prange(len(p)):
        v[i] = momentum * v[i] - rate * (g[i] + weight_decay * p[i])
        p[i] += v[i]
