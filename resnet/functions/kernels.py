"""What lies between the convolutions, fused: batch normalization, shortcut and ReLU, compiled.

Arrays are channels last, viewed as (M, C): M = N * H * W pixels of C channels, float32. A sum over
M is taken in chunks of rows whose results are added in a fixed order, so that it does not depend
on the number of threads. ReLU lets NaN through, as NumPy's maximum does.
"""

from __future__ import annotations

import numba
import numpy as np

CHUNK = 512  # rows; float32 sums stay short, float64 sums few
_compile = numba.njit(parallel=True, cache=True, fastmath={"contract", "reassoc", "nsz"})


@_compile
def moments(x):
    """Mean and (biased) variance of every channel, float32 (C,)."""
    rows, channels = x.shape
    chunks = (rows + CHUNK - 1) // CHUNK
    parts = np.zeros((chunks, 2, channels), np.float32)
    for k in numba.prange(chunks):
        first = x[k * CHUNK]
        total = np.zeros(channels, np.float32)
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
    mean = np.zeros(channels, np.float64)
    squares = np.zeros(channels, np.float64)
    for k in range(chunks):  # Chan's formula: n, mean and sum of squares of all rows so far
        seen, count = k * CHUNK, min(CHUNK, rows - k * CHUNK)
        for c in range(channels):
            step = parts[k, 0, c] - mean[c]
            mean[c] += step * count / (seen + count)
            squares[c] += parts[k, 1, c] + step * step * seen * count / (seen + count)
    return mean.astype(np.float32), (squares / rows).astype(np.float32)


@_compile
def scale_shift(x, scale, shift, relu, y):
    """y = [relu](x * scale + shift)."""
    rows, channels = x.shape
    for i in numba.prange(rows):
        for c in range(channels):
            v = x[i, c] * scale[c] + shift[c]
            y[i, c] = np.float32(0) if relu and v <= 0 else v


@_compile
def scale_shift_add(x, scale, shift, shortcut, y):
    """y = relu(x * scale + shift + shortcut)."""
    rows, channels = x.shape
    for i in numba.prange(rows):
        for c in range(channels):
            v = x[i, c] * scale[c] + shift[c] + shortcut[i, c]
            y[i, c] = np.float32(0) if v <= 0 else v


@_compile
def masked(gy, y, g):
    """g = gy where y is above 0, else 0: the gradient before the ReLU."""
    rows, channels = y.shape
    for i in numba.prange(rows):
        for c in range(channels):
            g[i, c] = np.float32(0) if y[i, c] <= 0 else gy[i, c]


@_compile
def gradient_sums(x, g, mean):
    """Sums over M of g and of g * (x - mean), float32 (2, C)."""
    rows, channels = x.shape
    chunks = (rows + CHUNK - 1) // CHUNK
    parts = np.zeros((chunks, 2, channels), np.float32)
    for k in numba.prange(chunks):
        total = np.zeros(channels, np.float32)
        product = np.zeros(channels, np.float32)
        begin, end = k * CHUNK, min((k + 1) * CHUNK, rows)
        whole = begin + (end - begin) // 4 * 4
        for i in range(begin, whole, 4):
            for c in range(channels):
                total[c] += (g[i, c] + g[i + 1, c]) + (g[i + 2, c] + g[i + 3, c])
                a, b = g[i, c] * (x[i, c] - mean[c]), g[i + 1, c] * (x[i + 1, c] - mean[c])
                d, e = g[i + 2, c] * (x[i + 2, c] - mean[c]), g[i + 3, c] * (x[i + 3, c] - mean[c])
                product[c] += (a + b) + (d + e)
        for i in range(whole, end):
            for c in range(channels):
                total[c] += g[i, c]
                product[c] += g[i, c] * (x[i, c] - mean[c])
        for c in range(channels):
            parts[k, 0, c] = total[c]
            parts[k, 1, c] = product[c]
    sums = np.zeros((2, channels), np.float64)
    for k in range(chunks):
        sums += parts[k]
    return sums.astype(np.float32)


@_compile
def input_gradient(x, g, factor, slope, offset, gx):
    """gx = factor * g + slope * x + offset, the gradient of the input of a normalization."""
    rows, channels = x.shape
    for i in numba.prange(rows):
        for c in range(channels):
            gx[i, c] = factor[c] * g[i, c] + slope[c] * x[i, c] + offset[c]
