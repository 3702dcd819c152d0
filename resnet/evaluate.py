"""Evaluate saved weights: accuracy, confusion matrix, accuracy per class; or classify images.

python -m resnet.evaluate runs/resnet-20-seed0                  on the test set
python -m resnet.evaluate runs/resnet-20-seed0/blocks.h5 --data PATH
python -m resnet.evaluate runs/resnet-20-seed0 --images cat.png dog.jpg
python -m resnet.evaluate resnet-20                             a trained network of the package
"""

from __future__ import annotations

import argparse
import io
import math
from pathlib import Path

import chainer
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from resnet import (
    cifar10,
    command,
    extensions,
    files,
    flags,
    functions,
    pretrained,
    weights,
)
from resnet.batches import Images
from resnet.command import InputError, Parser
from resnet.network import ARCHITECTURES

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count how often each class (row) was taken for each (column), int64 (classes, classes)."""
    return np.bincount(truth * classes + predicted, minlength=classes**2).reshape(classes, -1)


def read_image(path: Path | str) -> np.ndarray:
    """Read an image file as a network sees it: upright, its central square, scaled to 32 x 32.

    What is transparent becomes white; 16 bits are scaled to 8.

    Returns:
        uint8 (3, 32, 32).

    Raises:
        InputError: The file is missing, no image, too large, or of numbers without a known range.
    """
    try:
        with files.parsing():
            content = files.read(path)  # that is no image file Pillow may read forever
            with _open(content) as image:
                if (pixels := math.prod(image.size)) > Image.MAX_IMAGE_PIXELS:
                    raise ValueError(f"{pixels:,} pixels, legal: up to {Image.MAX_IMAGE_PIXELS:,}")
                side = min(image.size)
                left, top = ((length - side) // 2 for length in image.size)
                square = _rgb(image, image.crop((left, top, left + side, top + side)))
                square.info["exif"] = image.getexif().tobytes()
                upright = ImageOps.exif_transpose(square)  # a photograph says how it was held
                small = upright.resize((32, 32), Image.Resampling.BOX)
    except ValueError as error:
        legal = f"legal: {', '.join(FORMATS)} of 8 or 16 bits"
        raise InputError(f"--images {path}: not a readable image ({error}); {legal}") from None
    return np.asarray(small).transpose(2, 0, 1)


def _open(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=_formats())
    except UnidentifiedImageError:  # whose own words name an object in memory
        raise ValueError("none of the formats below, or its beginning is damaged") from None


def _formats() -> list[str]:
    """List those of ``FORMATS`` that this Pillow has; of its others some start programs."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _rgb(image: Image.Image, part: Image.Image) -> Image.Image:
    """Convert a part of ``image`` to RGB; Pillow's ``convert`` alone would clip or blacken it."""
    sixteen = image.mode == "I" and image.format in ("PNG", "PPM")  # of older Pillows
    if sixteen or image.mode.startswith("I;16"):
        part = Image.fromarray(np.rint(np.asarray(part) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("numbers of 32 bits, of which nobody says what is white")
    elif "A" in image.getbands() or "transparency" in image.info:
        part = part.convert("RGBA")
        part = Image.alpha_composite(Image.new("RGBA", part.size, "white"), part)
    return part.convert("RGB")


def print_evaluation(truth: np.ndarray, predicted: np.ndarray, classes: tuple[str, ...]) -> None:
    """Print accuracy, the confusion matrix and the accuracy of each class."""
    matrix = confusion_matrix(truth, predicted, len(classes))
    correct = np.trace(matrix)
    print(f"accuracy: {correct / len(truth):.2%} ({correct:,} of {len(truth):,} images)\n")
    width = max(map(len, classes))
    print("confusion matrix: rows are the true classes, columns the predicted ones\n")
    print(" " * width, *(f"{name[:6]:>6}" for name in classes), " accuracy")
    for name, row, right in zip(classes, matrix, np.diag(matrix), strict=True):
        share = f"{right / row.sum():9.2%}" if row.sum() else f"{'-':>9}"
        print(f"{name:>{width}}", *(f"{count:6d}" for count in row), share)


def print_classes(paths: list[Path], logits: np.ndarray, classes: tuple[str, ...]) -> None:
    """Print the three likeliest classes of each image file."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    for path, probabilities in zip(
        paths, shifted / shifted.sum(axis=1, keepdims=True), strict=True
    ):
        best = probabilities.argsort()[::-1][:3]
        print(f"{path}: " + ", ".join(f"{classes[i]} {probabilities[i]:.1%}" for i in best))


def recorded_data(path: Path | str) -> str | None:
    """Find where the run of a blocks.h5 had its images from, if they are still there."""
    try:
        record = files.read_json(Path(path).with_name("args.json"))
        source = Path(record["starts"][-1]["data"])
        return str(source) if source.exists() else None
    except (OSError, files.Unreadable, ValueError, LookupError, TypeError):
        return None


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "weights",
        type=command.path,
        metavar="RUN_OR_H5_OR_NAME",
        help="run folder, blocks.h5, or the name of a trained network of the package: "
        f"{', '.join(pretrained.names()) or 'none is here'}",
    )
    parser.add_argument("--data", metavar="PATH", help="as for training; the test set is used")
    parser.add_argument("--device", "-d", help="cpu, or the number of a GPU")
    parser.add_argument(
        "--images", type=command.path, nargs="+", metavar="FILE", help="classify these instead"
    )
    args = parser.parse_args()
    path = pretrained.find(args.weights)
    device = flags.find_device(args.device)
    functions.use(gpu=device.xp is not np)
    network, description = weights.restore(path)
    device.use()
    network.to_device(device)
    print(
        f"{path}: {ARCHITECTURES[description.architecture].describe(description.n)}, trained on "
        f"{description.dataset}, seed {description.seed}, epoch {description.epoch}"
    )
    if first := functions.first_start():
        print(first, flush=True)
    if args.images:
        x = np.stack([read_image(image) for image in args.images])
        y = np.zeros(len(x), np.int32)
    else:
        own = "synthetic" if description.dataset == "synthetic" else recorded_data(path)
        dataset = cifar10.load(args.data or own)
        x, y = dataset.test_x, dataset.test_y
        print(f"{len(y):,} test images of {dataset.name}")
        if dataset.name != description.dataset:
            print(f"NOTE: these weights were trained on {description.dataset}")
    logits = extensions.predict(network, Images(x, y, weights.read_mean(path), device))
    logits = chainer.cuda.to_cpu(logits)
    if len(description.classes) != logits.shape[1]:
        raise InputError(
            f"{path}: names {len(description.classes)} classes, legal: {logits.shape[1]}"
        )
    if args.images:
        print_classes(args.images, logits, description.classes)
    else:
        print_evaluation(y, logits.argmax(axis=1), description.classes)


if __name__ == "__main__":
    command.run(main)
