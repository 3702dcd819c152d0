"""Weights of each block to and from HDF5 (report, section II).

A file has one group per group of Table I (conv1, conv2, conv3, conv4, fc), the per-pixel mean of
the training images (``mean``), and attributes that say what the weights are. Behind its end stands
a digest, by which bits that rot are noticed; HDF5 itself has no checksum of most of them. A file of
an older version, without one, is read if all else about it is right.
"""

from __future__ import annotations

import contextlib
import io
import operator
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import chainer
import h5py
import numpy as np
from chainer.serializers import DictionarySerializer, NpzDeserializer

from resnet import __version__, arrays, files
from resnet.arrays import Kind
from resnet.command import InputError, reason
from resnet.network import ARCHITECTURES, BLOCKS, GROUPS, Network, find_architecture

IMAGE = (3, 32, 32)  # shape of an image of CIFAR-10
SIGNATURE = b"\x89HDF\r\n\x1a\n\0"  # and the version of what follows
ABOUT = {  # attributes for who has an HDF5 reader and nothing of ours; the README has them, too
    "format": "1",
    "input": "RGB images, (N, 3, 32, 32): value / 255 - mean",
    "layout": "convolutions: W (out, in, row, column), padding 1, no bias; fc: W (out, in), b",
    "normalization": "bn(x) = gamma * (x - avg_mean) / sqrt(avg_var + epsilon) + beta",
    "epsilon": 2e-5,
    "network": "conv1: ReLU(bn(conv(x))); the blocks conv2, conv3, conv4: modules 0 .. n-1 in a "
    "row; mean over the pixels; fc: logits, in the order of classes",
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


class Damaged(InputError):
    """A file that is no longer what was saved, or never was one of ours."""


def save(path: Path | str, network: Network, description: Description, mean: np.ndarray) -> None:
    """Write the weights and batch-normalization statistics of the groups that are present.

    Args:
        path: File to write; it appears whole or not at all.
        network: The trained network.
        description: What it is.
        mean: Per-pixel mean of the training images, float32 (3, 32, 32), in units of 0..1.

    Raises:
        InputError: ``check_groups`` refuses the network, or ``load`` would refuse the file.
    """
    formula = find_architecture(description.architecture).formula
    check_groups(network, description.architecture)
    if description.n != network.n:
        raise InputError(f"{path}: n: found {description.n}, legal: the network's, {network.n}")
    mean = np.asarray(chainer.cuda.to_cpu(mean))
    if (found := Kind.of(mean)) != (legal := Kind("float32", IMAGE)):
        raise InputError(f"{path}: mean: found {found}, legal: {legal}")
    path = Path(path)
    content = io.BytesIO()  # HDF5 itself crashes the process on a full disk
    with h5py.File(content, "w") as file:
        for key, value in {**ABOUT, "module": formula, **asdict(description)}.items():
            file.attrs[key] = value
        file.attrs["sealed"] = True
        file["mean"] = mean
        for name in description.groups:
            chainer.serializers.HDF5Serializer(file.create_group(name)).save(network[name])
    files.write(path, files.seal(content.getvalue()))


def check_groups(network: Network, architecture: str) -> None:
    """Refuse a network, of the architecture so named, of which a file would lose something.

    Raises:
        InputError: It has weights or statistics that are in none of its groups, or a link that
            Chainer does not know of: made outside of ``init_scope``, in a list, tuple, dict or
            set, or part of what is no chain.
    """
    where = f"architecture '{architecture}'"
    known = {id(each) for each in (*network.links(), *network.params())}
    for link in network.links():
        for name, value in vars(link).items():
            if any(id(each) not in known for each in _trainable(value)):
                raise InputError(
                    f"{where}: found {name} of {type(link).__name__}, which no optimizer sees and "
                    "no file keeps; legal: made in init_scope of a chainer.Chain, many in a "
                    "chainer.ChainList"
                )
    everything = DictionarySerializer()
    everything.save(network)
    inside = tuple(f"{name}/" for name in network.groups)
    if lost := sorted(name for name in everything.target if not name.startswith(inside)):
        legal = ", ".join(network.groups)
        raise InputError(f"{where}: found {', '.join(lost)}, legal: all in {legal}")


def _trainable(value: object) -> Iterator[chainer.Link | chainer.Parameter]:
    """Find what is trained: ``value``, or what it holds in plain containers at any depth."""
    waiting, seen = [value], set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, (chainer.Link, chainer.Parameter)):
            yield each
        elif isinstance(each, (list, tuple, dict, set, frozenset)) and id(each) not in seen:
            seen.add(id(each))  # one may hold itself
            waiting += each.values() if isinstance(each, dict) else each


def describe(path: Path | str) -> Description:
    """Read what the weights in ``path`` are.

    Raises:
        Damaged: The file is damaged or none of ours.
        InputError: It is missing or cannot be read, or its network is none that is registered, or
            computed something else.
    """
    with _open(path) as file:
        return _describe(file, path)


def read_mean(path: Path | str) -> np.ndarray:
    """Read the per-pixel mean that ``path`` was trained with, float32 (3, 32, 32)."""
    with _open(path) as file:
        mean = _array(file, "mean", Kind("float32", IMAGE))
        if not ((mean >= 0) & (mean <= 1)).all():
            raise ValueError(f"mean: found {mean.min():g}..{mean.max():g}, legal: 0..1")
        return mean


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
    with _open(path) as file:
        found = _describe(file, path)
        if (found.architecture, found.n) != (architecture, network.n):
            raise InputError(
                f"{path}: holds {found.architecture} with n = {found.n}; "
                f"legal here: {architecture} with n = {network.n}"
            )
        groups = network.groups if groups is None else groups
        if missing := sorted(set(groups) - set(found.groups)):
            raise InputError(
                f"{path}: holds {', '.join(found.groups)} of the network, "
                f"and no {', '.join(missing)}"
            )
        wanted = DictionarySerializer()
        for name in groups:
            wanted[name].save(network[name])
        # All of them before the first is changed.
        found = {name: _array(file, name, Kind.of(like)) for name, like in wanted.target.items()}
        arrays.check_values(found)
    for name in groups:
        NpzDeserializer(found, f"{name}/").load(network[name])


def restore(path: Path | str) -> tuple[Network, Description]:
    """Build the network that ``path`` describes and load its weights."""
    description = describe(path)
    architecture, classes = ARCHITECTURES[description.architecture], len(description.classes)
    network = architecture(description.n, present=description.groups, classes=classes)
    load(path, network, description.architecture)
    return network, description


@contextlib.contextmanager
def _open(path: Path | str) -> Iterator[h5py.File]:
    """Open the HDF5 file; whatever is found to be wrong with it becomes ``Damaged``."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; legal: blocks.h5 of a complete run")
    try:
        content, sealed = files.read_sealed(path)
        _check_heaps(content)
        with h5py.File(io.BytesIO(content), "r") as file:
            if bool(file.attrs.get("sealed", False)) != sealed:
                raise ValueError("changed since it was saved: its sha256 is missing")
            yield file
    except InputError:
        raise
    except Exception as error:  # of a damaged file HDF5 and h5py can raise anything
        raise Damaged(
            f"{path}: damaged, or no file of ours: {reason(error)}; legal: blocks.h5 of a run"
        ) from None


def _check_heaps(content: bytes) -> None:
    """Raise ``ValueError`` where HDF5 would never end: at an object of no size in a heap of texts.

    A heap is GCOL, version, its size, then objects: number, count, size, content (HDF5 file format
    specification, III.E). With number 0 it is free space, whose size includes these 16 bytes.
    """
    if content[:9] != SIGNATURE or content[13:15] != b"\x08\x08":  # bytes of a place, of a size
        raise ValueError("not HDF5 as h5py writes it")
    number, start = 0, content.find(b"GCOL")
    while start >= 0:
        if (number := number + 1) > 100:
            raise ValueError("more texts than ours")
        place, end = start + 16, start + int.from_bytes(content[start + 8 : start + 16], "little")
        while place + 16 <= min(end, len(content)):
            used = int.from_bytes(content[place : place + 2], "little")
            size = int.from_bytes(content[place + 8 : place + 16], "little")
            size = 16 + (size + 7) // 8 * 8 if used else size
            if not size:
                raise ValueError("a text of no size")
            place += size
        start = content.find(b"GCOL", start + 4)


def _whole(least: int):
    def read(value) -> int:
        if (number := operator.index(value)) < least:
            raise ValueError(f"legal: a whole number from {least} up")
        return number

    return read


def _text(value) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError("legal: a line of text")
    return value


def _one_of(legal: Collection[str]):
    def read(value) -> str:
        if value not in legal:
            raise ValueError(f"legal: {', '.join(legal)}")
        return value

    return read


def _each(read):
    return lambda values: tuple(map(read, values))


ATTRIBUTES = {
    "architecture": _text,
    "n": _whole(1),
    "dataset": _text,
    "classes": _each(_text),
    "seed": _whole(0),
    "epoch": _whole(0),
    "iteration": _whole(0),
    "groups": _each(_one_of(GROUPS)),
    "version": _text,
}  # of Description: how it is read, with a ValueError that says what is legal


def _describe(file: h5py.File, path: Path | str) -> Description:
    found = {}
    for name, read in ATTRIBUTES.items():
        if name not in file.attrs:
            raise ValueError(f"without the attribute '{name}'")
        value = file.attrs[name]
        try:
            found[name] = read(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"a foreign attribute {name}: found '{value}', {error}") from None
    # Before a network of n modules is built: so many are there.
    for name in set(found["groups"]) & set(BLOCKS):
        if len(_own(file, name)) != found["n"]:
            raise ValueError(f"n = {found['n']}, but cannot read {name} with so many modules")
    if found["architecture"] not in ARCHITECTURES:
        raise InputError(
            f"{path}: holds '{found['architecture']}', which is not registered; "
            f"legal: {', '.join(ARCHITECTURES)}, or import the script that defines it"
        )
    formula = ARCHITECTURES[found["architecture"]].formula
    if (written := str(file.attrs.get("module", formula))) != formula:
        raise InputError(
            f"{path}: holds a {found['architecture']} of '{written}', legal: of '{formula}'"
        )
    return Description(**found)


def _own(file: h5py.File, name: str):
    """Find the group or array ``name`` in the file itself; links could lead to any other."""
    item = file
    for part in name.split("/"):
        if not isinstance(item, h5py.Group) or not isinstance(
            item.get(part, getlink=True), h5py.HardLink
        ):
            raise ValueError(f"cannot read {name}, it is not there")
        item = item[part]
    return item


def _array(file: h5py.File, name: str, kind: Kind) -> np.ndarray:
    """Read the array ``name`` of that kind, which lies in the file itself."""
    item = _own(file, name)
    if not isinstance(item, h5py.Dataset) or item.external or item.is_virtual:
        raise ValueError(f"cannot read {name}, it is no array of this file")
    arrays.compare({name: Kind.of(item)}, {name: kind})
    return np.asarray(item[()])
