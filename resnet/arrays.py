"""Arrays that come from a file: compared with what they should be before anything takes them over.

A damaged file can make the library that reads it raise anything, or give other values without a
word: NumPy reads as much as a header asks for, and Chainer broadcasts.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

LARGEST = 1 << 31  # bytes of all arrays of a file together
LEAST = {  # legal values of a network's and a training's state, by the last part of their names
    "avg_var": 0, "N": 0, "t": 0, "iteration": 0, "updates": 0, "correct": 0, "lr": 0,
    "ended_at": -1, "_snapshot_elapsed_time": 0,
}  # fmt: skip


class Kind(NamedTuple):
    """Type and shape of an array; a text's length does not count."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array) -> Kind:
        text = array.dtype.kind == "U"
        return cls("text" if text else str(array.dtype), tuple(array.shape))

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def compare(found: Mapping[str, Kind], expected: Mapping[str, Kind]) -> None:
    """Raise ``ValueError`` naming the first array that is missing, or of another type or shape."""
    for name in {**expected, **found}:
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{name}: found {found.get(name) or 'nothing'}, legal: "
                f"{expected.get(name) or 'nothing'}"
            )


def check_values(arrays: Mapping[str, np.ndarray]) -> None:
    """Raise ``ValueError`` naming the first array with a value that no training gives it.

    A weight may be any number, and none: that a training diverged is a result.
    """
    for name, array in arrays.items():
        least = LEAST.get(name.rpartition("/")[2])
        if least is not None and (array < least).any():
            raise ValueError(f"{name}: found {array.min()}, legal: from {least} up")


def read_npz(content: bytes) -> dict[str, np.ndarray]:
    """Read the arrays of a file of ``np.savez``, every byte of it checked by its checksum.

    Raises:
        Exception: Of any kind: it is damaged, or holds anything but arrays. See ``files.parsing``.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("two arrays of one name")
        if (size := sum(info.file_size for info in members.values())) > LARGEST:
            raise ValueError(f"arrays of {size:,} bytes, legal: up to {LARGEST:,}")
        return {name: _array(name, archive, info) for name, info in members.items()}


def _array(name: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    file = io.BytesIO(archive.read(member))
    if (version := np.lib.format.read_magic(file)) != (1, 0):
        raise ValueError(f"{name}: found version {version} of NumPy's format, legal: (1, 0)")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if file.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{name}: {dtype} {shape} does not have {member.file_size:,} bytes")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)
