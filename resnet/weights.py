"""Weights of each block to and from HDF5 (report, section II).

A file has one group per group of Table I (conv1, conv2, conv3, conv4, fc), the per-pixel mean of
the training images (``mean``), and attributes that say what the weights are.
"""

from __future__ import annotations

import io
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import chainer
import h5py
import numpy as np

from resnet import __version__, files
from resnet.command import InputError
from resnet.network import ARCHITECTURES, GROUPS, Network

IMAGE = (3, 32, 32)  # shape of an image of CIFAR-10
ABOUT = {  # attributes for who has an HDF5 reader and nothing of ours; the README has them, too
    "format": "1",
    "input": "RGB images, (N, 3, 32, 32): value / 255 - mean",
    "layout": "convolutions: W (out, in, row, column), padding 1, no bias; fc: W (out, in), b",
    "normalization": "bn(x) = gamma * (x - avg_mean) / sqrt(avg_var + epsilon) + beta",
    "epsilon": 2e-5,
    "network": "conv1: ReLU(bn(conv(x))); the blocks conv2, conv3, conv4: modules 0 .. n-1 in a "
    "row; mean over the pixels; fc: logits, in the order of classes",
    "module": "F = bn2(conv2(ReLU(bn1(conv1(x))))); plain: ReLU(F); resnet, resresnet: "
    "ReLU(F + A(x)); resresnet: a block's output y is ReLU(y + A(x)), x its input",
    "stride": "2 in conv1 of module 0 of conv3 and conv4; else 1",
    "shortcut": "A, option A: where sizes differ every second pixel, then channels of zeros behind",
    "absent": "a block that groups does not name: mean over 2 x 2 pixels where its stride is 2, "
    "then channels of zeros behind",
    "N": "Chainer's count of updates of the statistics; no part of the function",
    "license": "MIT",
}


@dataclass(frozen=True)
class Description:
    """What the weights in a file are; stored as attributes of the file."""

    architecture: str
    n: int
    dataset: str
    classes: tuple[str, ...]
    seed: int
    epoch: int
    iteration: int
    groups: tuple[str, ...] = GROUPS
    version: str = __version__


def save(path: Path | str, network: Network, description: Description, mean: np.ndarray) -> None:
    """Write the weights and batch-normalization statistics of the groups that are present.

    Args:
        path: File to write; it appears whole or not at all.
        network: The trained network.
        description: What it is.
        mean: Per-pixel mean of the training images, float32 (3, 32, 32), in units of 0..1.
    """
    path = Path(path)
    content = io.BytesIO()  # HDF5 itself crashes the process on a full disk
    with h5py.File(content, "w") as file:
        for key, value in {**ABOUT, **asdict(description)}.items():
            file.attrs[key] = value
        file["mean"] = chainer.cuda.to_cpu(mean)
        for name in description.groups:
            chainer.serializers.HDF5Serializer(file.create_group(name)).save(network[name])
    with files.whole(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def describe(path: Path | str) -> Description:
    """Read what the weights in ``path`` are.

    Raises:
        InputError: The file is missing, damaged or none of ours.
    """
    with _open(path) as file:
        attributes = dict(file.attrs)
    try:
        return Description(
            architecture=str(attributes["architecture"]),
            n=int(attributes["n"]),
            dataset=str(attributes["dataset"]),
            classes=tuple(map(str, attributes["classes"])),
            seed=int(attributes["seed"]),
            epoch=int(attributes["epoch"]),
            iteration=int(attributes["iteration"]),
            groups=tuple(map(str, attributes["groups"])),
            version=str(attributes["version"]),
        )
    except KeyError as error:
        raise InputError(
            f"{path}: an HDF5 file without the attribute {error}; legal: blocks.h5 of a run"
        ) from None
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path}: an HDF5 file with a foreign attribute ({error}); legal: blocks.h5 of a run"
        ) from None


def read_mean(path: Path | str) -> np.ndarray:
    """The per-pixel mean that the network of ``path`` was trained with, float32 (3, 32, 32)."""
    with _open(path) as file:
        if "mean" not in file or file["mean"].shape != IMAGE:
            raise InputError(f"{path}: holds no per-pixel mean {IMAGE}; legal: blocks.h5 of a run")
        return file["mean"][()]


def load(
    path: Path | str, network: Network, architecture: str, groups: Collection[str] | None = None
) -> None:
    """Load blocks from ``path`` into ``network``.

    Args:
        path: A file that ``save`` wrote.
        network: A network of the same n.
        architecture: What ``network`` is; a file of another architecture is refused.
        groups: The groups to load; by default all that ``network`` has.

    Raises:
        InputError: The file is missing or damaged, or holds another architecture or depth.
    """
    found = describe(path)
    if (found.architecture, found.n) != (architecture, network.n):
        raise InputError(
            f"{path}: holds {found.architecture} with n = {found.n}; "
            f"legal here: {architecture} with n = {network.n}"
        )
    groups = network.groups if groups is None else groups
    if missing := sorted(set(groups) - set(found.groups)):
        raise InputError(
            f"{path}: holds {', '.join(found.groups)} of the network, and no {', '.join(missing)}"
        )
    with _open(path) as file:
        try:
            for name in groups:
                chainer.serializers.HDF5Deserializer(file[name]).load(network[name])
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise InputError(f"{path}: damaged, cannot read {name}: {error}") from None


def restore(path: Path | str) -> tuple[Network, Description]:
    """Build the network that ``path`` describes and load its weights."""
    description = describe(path)
    if description.architecture not in ARCHITECTURES:
        raise InputError(
            f"{path}: unknown architecture '{description.architecture}'; "
            f"legal: {', '.join(ARCHITECTURES)}"
        )
    network = ARCHITECTURES[description.architecture](description.n, present=description.groups)
    load(path, network, description.architecture)
    return network, description


def _open(path: Path | str) -> h5py.File:
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; legal: blocks.h5 of a run")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path}: not a readable HDF5 file ({error})") from None
