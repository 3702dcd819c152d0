"""The convolutions of the report's networks on tensor cores, by kernels of our own.

cuDNN's are made for more channels than 16 to 64, above all those for the gradient of the filters.
What is not of a shape in ``programs.TILES``, cuDNN does.
"""

from __future__ import annotations

from resnet.backends.gpu import cudnn, programs
from resnet.backends.gpu.programs import (
    CAPABILITY,
    KINDS,
    ON_TENSOR_CORES,
    THREADS,
    TILES,
    Shape,
    launch,
)

BLOCKS = 264  # of a gradient of filters, whose sums are added up at the end: two on each of 132


def find(shape: tuple[int, int, int, int], filters: int, stride: int, precision: str):
    """A ``Convolution`` for these images, or None if there is none.

    Args:
        shape: (N, C, H, W) of the input.
        filters: K, channels of the output.
        stride: 1 or 2.
        precision: As of ``cudnn.Convolution``.
    """
    _, channels, height, width = shape
    kind = Shape(channels, filters, width // stride, stride)
    fits = height == width == kind.width * stride and kind in TILES
    if not fits or cudnn.compute_capability() < CAPABILITY:
        return None
    convolution = Convolution(kind, precision)
    sizes = [ON_TENSOR_CORES.get(name) for name in convolution.kernels]
    if None in sizes or max(sizes) > programs.shared_memory():
        return None
    return convolution


class Convolution:
    """The 3x3 convolutions of a layer.

    Images (N, H, W, C) are float16 in precision ``fp16``, else float32; filters (K, channels, 3, 3)
    are float32. What is multiplied has 10 bits of mantissa, in ``fp32`` 21.

    Args:
        shape: Which convolution.
        precision: As of ``cudnn.Convolution``.
    """

    def __init__(self, shape: Shape, precision: str) -> None:
        tile, of_gradient = TILES[shape]
        kind = KINDS[precision]
        self.shape = shape
        self._forward = tile, shape.convolve(tile, False, *kind)[0]
        self._gradient = of_gradient, shape.gradient(of_gradient, *kind)[0]
        self._back = None
        if shape == shape.back():
            self._back = tile, shape.convolve(tile, True, *kind)[0]

    @property
    def kernels(self) -> list[str]:
        """Names of its kernels."""
        steps = self._forward, self._gradient, self._back
        return [step[1] for step in steps if step is not None]

    @property
    def has_backward_data(self) -> bool:
        """Whether there is a ``backward_data``."""
        return self._back is not None

    def forward(self, x, w, y) -> None:
        """Fill y with the convolution of x and w."""
        self._convolve(*self._forward, x, w, y)

    def backward_data(self, gy, w, gx) -> None:
        """Fill gx with the gradient of the input."""
        self._convolve(*self._back, gy, w, gx)

    def _convolve(self, tile, kernel: str, x, w, y) -> None:
        blocks = self._tiles(tile, len(x)) * (self.shape.filters // tile.filters)
        launch(kernel, blocks * THREADS, x, w, y, len(x), w.shape[1])

    def backward_weights(self, x, gy, gw, factor: float = 1.0) -> None:
        """Fill gw with the gradient of the filters, multiplied by ``factor``."""
        tile, kernel = self._gradient
        _, filters, *_ = self.shape
        count = min(self._tiles(tile, len(x)), BLOCKS)
        parts = programs.cupy().empty((count, 9, filters, self.shape.padded), gw.dtype)
        threads = count * (filters // tile.filters) * THREADS
        launch(kernel, threads, x, gy, parts, len(x))
        threads = -(-parts[0].size // 32) * THREADS
        sizes = count, filters, self.shape.padded, gw.shape[1]
        launch("add_parts", threads, parts, gw, *sizes, factor)

    def _tiles(self, tile, images: int) -> int:
        return -(-images // tile.images) * (self.shape.width // tile.rows)
