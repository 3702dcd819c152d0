"""An embedded stand-in for CIFAR-10: ten classes of drawn shapes and textures.

It needs no download and shows in minutes that a network learns. It is not CIFAR-10, and an
accuracy on it says nothing about CIFAR-10.
"""

from __future__ import annotations

import numpy as np

SEED = 2016
CLASSES = (
    "disc", "ring", "square", "triangle", "cross",
    "rows", "columns", "diagonals", "checkerboard", "dots",
)  # fmt: skip
SIDE = 32  # pixels
STROKES, BLOBS = 2, 2  # clutter behind the shape
NOISE = 0.06  # of the sum of four random bytes: a standard deviation of 9 grey levels of 255


def make(
    train: int = 5000, test: int = 1000, seed: int = SEED
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draw the images: a function of the arguments alone, bit for bit.

    Args:
        train: Number of training images.
        test: Number of test images.
        seed: Seed of everything random.

    Returns:
        ``(train_x, train_y, test_x, test_y)``: uint8 (N, 3, 32, 32) and int32 (N,), each class
        equally often.
    """
    rng = np.random.RandomState(seed)  # NumPy promises never to change its streams
    return *_draw(rng, train), *_draw(rng, test)


def _draw(rng: np.random.RandomState, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``count`` images.

    Pixels are computed with + - * / and square roots alone, which IEEE 754 rounds alike
    everywhere; sines are not, so they are taken once per image and rounded coarsely.
    """
    labels = rng.permutation(np.arange(count) % len(CLASSES)).astype(np.int32)
    rows, columns = (np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2).astype(np.float32)

    def each(low: float, high: float, channels: int = 1) -> np.ndarray:
        return rng.uniform(low, high, (count, channels, 1, 1)).astype(np.float32)

    def turned(x: np.ndarray, y: np.ndarray, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        angle = 2 * np.pi * turns.astype(np.float64)
        cos, sin = (np.rint(f(angle) * 4096).astype(np.float32) / 4096 for f in (np.cos, np.sin))
        return cos * x + sin * y, cos * y - sin * x

    def paint(depth: np.ndarray, colour: np.ndarray) -> None:
        nonlocal picture
        picture += np.clip(depth + 0.5, 0, 1) * (colour - picture)

    # Shape and background differ in every channel; which of them is the lighter is random, so
    # that no pixel alone tells the class.
    dark = each(15, 110, 3)
    light = dark + each(70, 125, 3)
    swap = each(-1, 1) < 0
    background, foreground = np.where(swap, light, dark), np.where(swap, dark, light)
    picture = background + each(-1, 1, 3) * rows + each(-1, 1, 3) * columns
    for _ in range(STROKES):
        across, along = turned(columns - each(-14, 14), rows - each(-14, 14), each(0, 1))
        stroke = np.minimum(each(0.4, 0.9) - np.abs(across), each(4, 10) - np.abs(along))
        paint(stroke, each(20, 235, 3))
    for _ in range(BLOBS):
        x, y = columns - each(-15, 15), rows - each(-15, 15)
        paint(each(1, 2.5) - np.sqrt(x * x + y * y), each(20, 235, 3))

    radius, turns, size = each(7.5, 11), each(0, 1), each(6, 10)
    textured = (labels >= CLASSES.index("rows"))[:, None, None, None]
    turns = np.where(textured, (turns - 0.5) / 18, turns)  # up to 10 degrees: rows remain rows
    # A texture fills the image, so its own place is a phase.
    x, y = columns - each(-4, 4), rows - each(-4, 4)
    u, v = turned(x, y, turns)
    lean = np.where(each(-1, 1) < 0, -1, 1).astype(np.float32)
    depth = np.empty((count, 1, SIDE, SIDE), np.float32)
    for label, name in enumerate(CLASSES):
        of = labels == label
        scale = size[of] if name in CLASSES[5:] else radius[of]
        depth[of] = scale * _inside(name, u[of] / scale, v[of] / scale, lean[of])
    paint(depth, foreground)

    noise = np.frombuffer(rng.bytes(4 * picture.size), np.uint8).reshape(4, *picture.shape)
    picture += (noise.sum(axis=0, dtype=np.int16) - 510).astype(np.float32) * NOISE
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), labels


def _inside(name: str, u: np.ndarray, v: np.ndarray, lean: np.ndarray) -> np.ndarray:
    """Compute how deep the points (u, v) lie inside the shape ``name``; negative outside.

    The unit is the radius of a shape and the period of a texture.
    """
    if name == "disc":
        return 0.9 - np.sqrt(u * u + v * v)
    if name == "ring":
        return 0.2 - np.abs(np.sqrt(u * u + v * v) - 0.8)
    if name == "square":
        return 0.8 - np.maximum(np.abs(u), np.abs(v))
    if name == "triangle":  # its three sides, the slanted ones at 60 degrees
        return 0.5 - np.maximum(-v, 0.5 * v + 0.8660254 * np.abs(u))
    if name == "cross":
        narrow, wide = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
        return np.minimum(0.26 - narrow, 1.0 - wide)
    if name == "rows":
        return _wave(v)
    if name == "columns":
        return _wave(u)
    if name == "diagonals":
        return _wave(0.70710678 * (u + lean * v))
    if name == "checkerboard":
        return 4 * _wave(0.7 * u) * _wave(0.7 * v)
    du, dv = u - np.rint(u), v - np.rint(v)  # dots
    return 0.3 - np.sqrt(du * du + dv * dv)


def _wave(t: np.ndarray) -> np.ndarray:
    """Compute how deep t lies in stripes of period 1 and width 1/2; negative between them."""
    return np.abs(t - np.floor(t) - 0.5) - 0.25
