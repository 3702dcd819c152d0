"""Compiled kernels on the disk: a file each, named after all that it depends on, with a digest.

Numba numbers its files, and has an index of them for each kernel. Of two processes that compile at
the same time both may write a file of one number: a process then runs the code of other types, or
of a node's processor that it does not have, where nodes share a home. And it ends where a file is
damaged, or cannot be written for want of space.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pickle
from pathlib import Path

import llvmlite
import numba
from numba.core import caching, serialize

from resnet import files
from resnet.backends.cpu import vectors


@functools.cache
def mark() -> str:
    """Tell in a file's name what its code was made from, by and for: sources, versions, processor.

    The sources are all of this folder, since kernels take tuples that other files of it define.
    """
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    made_of = sources, numba.__version__, llvmlite.__version__, vectors.processor()
    return hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]


class _Files:
    """What Numba's ``IndexDataCacheFile`` does, without the index."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def save(self, key: tuple, data: object) -> None:
        files.write(self._path(key), files.seal(serialize.dumps(data)))

    def load(self, key: tuple) -> object | None:
        content = files.read_if_whole(self._path(key))  # without it, it is compiled again
        return None if content is None else pickle.loads(content)

    def _path(self, key: tuple) -> Path:
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        return self.folder / f"{self.name}.{mark()}.{digest}.nbc"


class _Cache(caching.FunctionCache):
    """A kernel's compiled code, by the types of its arguments."""

    def __init__(self, function) -> None:
        super().__init__(function)
        self._cache_file = _Files(Path(self.cache_path), self._impl.filename_base)

    def save_overload(self, sig, data) -> None:
        with contextlib.suppress(OSError):  # the next process compiles again
            super().save_overload(sig, data)


def njit(**options):
    """As ``numba.njit``, but what is compiled is kept here.

    Raises:
        RuntimeError: When applied: there is no folder that can be written to.
    """

    def decorate(function):
        dispatcher = numba.njit(**options)(function)
        dispatcher._cache = _Cache(function)
        return dispatcher

    return decorate


def exist(folder: Path) -> bool:
    """Tell whether kernels of this code, for this processor, are kept in a folder."""
    return any(folder.glob(f"kernels.*.{mark()}.*.nbc"))
