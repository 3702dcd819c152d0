"""The algebra of Winograd's convolution: its matrices, and products with them of few operations.

F(4, 3), four outputs of a filter g of three taps over six inputs d, is in one dimension

    y = A^T [(G g) * (B^T d)]

(Lavin and Gray, 2015). The rows of A, G and B^T belong to six points at which polynomials are
evaluated: p^k in A; p^k / prod(p - q) over the other points q in G; the coefficients of
prod(x - q) in B^T. The last point is infinity: the highest power alone.

With stride 2, the outer taps of a filter meet every other input, and the middle one those between:
F(4, 2) of the former, at five points, and four products of the latter. So four outputs over nine
inputs have nine products, not twelve, and the same formula, with other matrices.

In two dimensions each matrix is applied to columns and then to rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

TILE = 4  # outputs, in each direction
# +-1 and +-2 instead would round twice as much and save nothing.
POINTS = (0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))


def matrices(points: Sequence[float], taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, G and B^T of F(4, taps), float64; a row for each point, the last for infinity."""
    others = [[p for p in points if p != point] for point in points]
    scales = [
        math.prod(point - p for p in rest) for point, rest in zip(points, others, strict=True)
    ]
    a = np.array([[point**k for k in range(TILE)] for point in points] + [[0] * TILE], np.float64)
    g = a[:, :taps] / np.array([*scales, 1])[:, None]
    a[-1, -1] = g[-1, -1] = 1
    b = [[*np.poly(rest)[::-1], 0] for rest in others] + [np.poly(points)[::-1]]
    return a, g, np.round(b, 12)  # what should be 0 and 1 is


class Form(NamedTuple):
    """The matrices of a convolution, a row for each point.

    A tile that ``read`` and ``read_back`` are for begins with the pixel before its first.
    """

    filters: np.ndarray  # G; points beyond its last row have the filter of that
    read: np.ndarray  # B^T
    write: np.ndarray  # A
    read_back: np.ndarray  # B^T and A for both gradients; the filters are turned by 180 degrees,
    write_back: np.ndarray  # and G is the same


def stride_1() -> Form:
    a, g, b = matrices(POINTS, taps=3)
    return Form(g, b, a, b, a)


def stride_2() -> Form:
    """The first and the last tap at five points, then the middle one: as it is, four times."""
    a, g, b = matrices(POINTS[1:], taps=2)
    filters, read, write = np.zeros((6, 3)), np.zeros((9, 9)), np.zeros((9, 4))
    filters[:5, ::2], filters[5, 1] = g, 1
    read[:5, ::2], read[5:, 1::2] = b, np.eye(4)
    write[:5], write[5:] = a, np.eye(4)
    read_back, write_back = np.zeros((9, 6)), np.zeros((9, 8))
    read_back[:5, 1:], read_back[5:, 1:5] = b, np.eye(4)
    write_back[:5, 1::2], write_back[5:, ::2] = a, np.eye(4)
    return Form(filters, read, write, read_back, write_back)


FORMS = {1: stride_1(), 2: stride_2()}


def dot(row: Sequence[float], x: Sequence):
    """sum of row[i] * x[i]; zeros cost nothing, and one factor becomes 1."""
    terms = [(factor, value) for factor, value in zip(row, x, strict=True) if factor]
    scale = 1 if any(factor == 1 for factor, _ in terms) else terms[-1][0]
    terms = sorted(((f / scale, value) for f, value in terms), key=lambda term: term[0] != 1)
    total = terms[0][1]
    for factor, value in terms[1:]:
        total = total + factor * value if factor > 0 else total - -factor * value
    return scale * total


def folded(matrix: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The matrix with the even and the odd terms of a point in its row and in its negative's.

    They share these: the rows are their sum and difference. Also the first row of each two.
    """
    matrix, pairs = matrix.copy(), []
    for k, (row, other) in enumerate(zip(matrix[:-1].copy(), matrix[1:].copy(), strict=True)):
        same = np.isclose(row, other)
        if np.allclose(abs(row), abs(other)) and not same.all():
            matrix[k], matrix[k + 1] = np.where(same, row, 0), np.where(same, 0, row)
            pairs.append(k)
    return matrix, pairs


def butterflies(pairs: Sequence[int], x: Sequence) -> list:
    """x with sum and difference in the places of each two."""
    x = list(x)
    for k in pairs:
        x[k], x[k + 1] = x[k] + x[k + 1], x[k] - x[k + 1]
    return x


def to_points(matrix: np.ndarray, x: Sequence) -> list:
    """matrix @ x, of numbers or of vectors in code."""
    matrix, pairs = folded(matrix)
    return butterflies(pairs, [dot(row, x) for row in matrix])


def from_points(matrix: np.ndarray, m: Sequence) -> list:
    """matrix^T @ m, likewise."""
    matrix, pairs = folded(matrix)
    m = butterflies(pairs, m)
    return [dot(column, m) for column in matrix.T]
