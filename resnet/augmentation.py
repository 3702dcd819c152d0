"""Data augmentation of the report, section II, one whole batch at a time.

mean-subtracted images -> pad 4 zeros on each side -> random 32 x 32 crop -> flip or not
"""

from __future__ import annotations

from chainer import backend

from resnet import random

PADDING = 4
OFFSETS = 2 * PADDING + 1  # along each axis: 81 crops in all
KINDS = {  # what is random
    "report": "random crops and flips",
    "none": "none",
    "crop": "random crops",
    "flip": "random flips",
}


def draw(xp, seed: int, iteration: int, batchsize: int, kind: str = "report"):
    """Draw where each image of a batch is cropped, and whether it is flipped.

    A pure function of the seed, the iteration and the position in the batch. The crops of ``crop``
    and the flips of ``flip`` are those of ``report``; what is not random leaves an image as it is.

    Args:
        xp: NumPy or CuPy.
        seed, iteration: Of the batch.
        batchsize: Images in it.
        kind: One of ``KINDS``.

    Returns:
        ``(top, left, flip)``: int64 arrays (batchsize,); offsets in 0..8, flip 0 or 1.
    """
    positions = xp.arange(batchsize)
    draws = random.below(xp, 2 * OFFSETS**2, seed, random.AUGMENT, iteration, positions)
    offset, flip = draws // 2, draws % 2
    top, left = offset // OFFSETS, offset % OFFSETS
    if kind in ("none", "flip"):
        top, left = xp.full_like(top, PADDING), xp.full_like(left, PADDING)
    if kind in ("none", "crop"):
        flip = xp.zeros_like(flip)
    return top, left, flip


def crop_and_flip(x, top, left, flip):
    """Crop each image of a batch out of its zero-padded self; mirror it where ``flip`` is 1.

    Args:
        x: Mean-subtracted images, float32 (N, C, H, W): the padding is zero after the subtraction.
        top, left, flip: int64 arrays (N,), as ``draw`` returns them.

    Returns:
        float32 (N, C, H, W), channels last in memory.
    """
    xp = backend.get_array_module(x)
    batchsize, channels, height, width = x.shape
    padded = xp.zeros((batchsize, height + 2 * PADDING, width + 2 * PADDING, channels), x.dtype)
    padded[:, PADDING:-PADDING, PADDING:-PADDING] = x.transpose(0, 2, 3, 1)
    # Of each pixel wanted, the place among all of them: one index for a whole pixel is the fastest.
    rows = top[:, None] + xp.arange(height) + (height + 2 * PADDING) * xp.arange(batchsize)[:, None]
    columns = xp.arange(width)
    columns = left[:, None] + xp.where(flip[:, None], width - 1 - columns, columns)
    places = (width + 2 * PADDING) * rows[:, :, None] + columns[:, None, :]
    return padded.reshape(-1, channels).take(places, axis=0).transpose(0, 3, 1, 2)
