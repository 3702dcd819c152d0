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
CLUTTER = 1  # strokes behind the shape
NOISE = 6.0  # standard deviation of a pixel, of 255


def make(
    seed: int = SEED, train: int = 5000, test: int = 1000
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draw the images: a function of the arguments alone.

    Args:
        seed: Seed of everything random.
        train: Number of training images.
        test: Number of test images.

    Returns:
        ``(train_x, train_y, test_x, test_y)``: uint8 (N, 3, 32, 32) and int32 (N,), each class
        equally often.
    """
    rng = np.random.RandomState(seed)
    return *_draw(rng, train), *_draw(rng, test)


def _draw(rng: np.random.RandomState, count: int) -> tuple[np.ndarray, np.ndarray]:
    labels = rng.permutation(np.arange(count) % len(CLASSES)).astype(np.int32)
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)

    def each(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (count, *(shape or (1, 1)))).astype(np.float32)

    # The picture so far, (N, 3, 32, 32): a colour that changes slowly from side to side.
    background = each(40, 215, 3, 1, 1)
    slope = each(-1.2, 1.2, 3, 1, 1) * (rows - 15.5) + each(-1.2, 1.2, 3, 1, 1) * (columns - 15.5)
    picture = background + slope
    for _ in range(CLUTTER):  # strokes across the picture, thinner than any shape
        angle, offset = each(0, np.pi), each(-14, 14)
        across = np.cos(angle) * (columns - 15.5) + np.sin(angle) * (rows - 15.5) - offset
        stroke = np.clip(each(0.5, 1.2) + 0.5 - np.abs(across), 0, 1)[:, None]
        picture += stroke * (each(20, 235, 3, 1, 1) - picture)

    # Coordinates (u, v) of every pixel, in radii round the shape's own place.
    radius, angle = each(9, 11.5), each(-np.pi, np.pi)
    textured = (labels >= CLASSES.index("rows"))[:, None, None]
    angle = np.where(textured, angle / 24, angle)  # rows would become columns
    x, y = columns - 15.5 - each(-3, 3), rows - 15.5 - each(-3, 3)
    u = (np.cos(angle) * x + np.sin(angle) * y) / radius
    v = (np.cos(angle) * y - np.sin(angle) * x) / radius
    waves = each(1.6, 2.4)  # per radius
    phase_u, phase_v = each(0, 2 * np.pi), each(0, 2 * np.pi)
    lean = np.where(each(-1, 1) < 0, -1, 1).astype(np.float32)
    inside = np.empty((count, SIDE, SIDE), np.float32)  # above 0 inside the shape, in radii
    for label, name in enumerate(CLASSES):
        of = labels == label
        inside[of] = _inside(
            name, u[of], v[of], waves[of] * np.float32(np.pi), phase_u[of], phase_v[of], lean[of]
        )
    shape = np.clip(inside * radius + 0.5, 0, 1)[:, None]

    # A colour that stands out against the background, lighter or darker at random.
    contrast = each(70, 127, 3, 1, 1) * np.where(each(-1, 1, 1, 1, 1) < 0, -1, 1)
    contrast = np.where(np.abs(background + contrast - 127.5) > 127.5, -contrast, contrast)
    picture += shape * (background + contrast - picture)
    picture += NOISE * rng.standard_normal(picture.shape).astype(np.float32)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), labels


def _inside(name, u, v, waves, phase_u, phase_v, lean) -> np.ndarray:
    """How deep each pixel lies inside the shape ``name``; negative outside."""
    distance = np.hypot(u, v)
    window = np.float32(1.15) - distance  # textures are seen through a disc
    along_u, along_v = np.sin(waves * u + phase_u), np.sin(waves * v + phase_v)
    if name == "disc":
        return np.float32(0.9) - distance
    if name == "ring":
        return np.float32(0.22) - np.abs(distance - np.float32(0.75))
    if name == "square":
        return np.float32(0.78) - np.maximum(np.abs(u), np.abs(v))
    if name == "triangle":
        sides = [np.cos(a) * u + np.sin(a) * v for a in 2 * np.pi / 3 * np.arange(3)]
        return np.float32(0.52) - np.maximum.reduce(sides).astype(np.float32)
    if name == "cross":
        beam, length = np.float32(0.27), np.float32(1.0)
        upright = np.minimum(beam - np.abs(u), length - np.abs(v))
        return np.maximum(upright, np.minimum(beam - np.abs(v), length - np.abs(u)))
    if name == "rows":
        return np.minimum(window, along_v / waves)
    if name == "columns":
        return np.minimum(window, along_u / waves)
    if name == "diagonals":
        slanted = np.sin(waves * np.float32(np.sqrt(0.5)) * (u + lean * v) + phase_u)
        return np.minimum(window, slanted / waves)
    if name == "checkerboard":
        return np.minimum(window, along_u * along_v / waves)
    grid = along_u * along_u * along_v * along_v  # dots
    return np.minimum(window, (grid - np.float32(0.45)) / waves)
