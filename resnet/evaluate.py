"""Evaluate saved weights: accuracy, confusion matrix, accuracy per class; or classify images.

python -m resnet.evaluate runs/resnet-20-seed0                  on the test set
python -m resnet.evaluate runs/resnet-20-seed0/blocks.h5 --data PATH
python -m resnet.evaluate runs/resnet-20-seed0 --images cat.png dog.jpg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import chainer
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from resnet import cifar10, command, extensions, flags, functions, training, weights
from resnet.command import InputError, Parser
from resnet.network import layers
from resnet.updater import Images


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """How often each class (row) was taken for each class (column), int64 (classes, classes)."""
    return np.bincount(truth * classes + predicted, minlength=classes**2).reshape(classes, -1)


def read_image(path: Path | str) -> np.ndarray:
    """An image file as a network sees it: upright, its central square, scaled to 32 x 32.

    Returns:
        uint8 (3, 32, 32).

    Raises:
        InputError: The file is missing or no image.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)  # a photograph says how it was held
            side = min(image.size)
            left, top = ((length - side) // 2 for length in image.size)
            square = image.convert("RGB").crop((left, top, left + side, top + side))
    except FileNotFoundError:
        raise InputError(f"--images {path}: no such file") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"--images {path}: not a readable image ({error})") from None
    return np.asarray(square.resize((32, 32), Image.Resampling.BOX)).transpose(2, 0, 1)


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
    """Where the run of a blocks.h5 had its images from, if they are still there."""
    try:
        source = json.loads(Path(path).with_name("args.json").read_text())["starts"][-1]["data"]
    except (OSError, ValueError, LookupError):
        return None
    return source if Path(source).exists() else None


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, metavar="RUN_OR_H5", help="run folder or blocks.h5")
    parser.add_argument("--data", metavar="PATH", help="as for training; the test set is used")
    parser.add_argument("--device", "-d", help="cpu, or the number of a GPU")
    parser.add_argument(
        "--images", type=Path, nargs="+", metavar="FILE", help="classify these files instead"
    )
    args = parser.parse_args()
    path = args.weights / "blocks.h5" if args.weights.is_dir() else args.weights
    device = flags.find_device(args.device)
    functions.use(gpu=device.xp is not np)
    network, description = weights.restore(path)
    device.use()
    network.to_device(device)
    print(
        f"{path}: {training.NAMES[description.architecture]}, {layers(description.n)} "
        f"layers, trained on {description.dataset}, seed {description.seed}, "
        f"epoch {description.epoch}"
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
    if args.images:
        print_classes(args.images, logits, description.classes)
    else:
        print_evaluation(y, logits.argmax(axis=1), description.classes)


if __name__ == "__main__":
    command.run(main)
