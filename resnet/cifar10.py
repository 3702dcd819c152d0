"""CIFAR-10: found or downloaded, verified, and read without running what a pickle may hold."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import pickle
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from resnet import synthetic
from resnet.errors import InputError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SIZE = 170_498_071  # bytes of the official archive
MD5 = "c58f30108f718f92721af3b95e74349a"
FOLDER = "cifar-10-batches-py"
TRAINING_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_FILE = "test_batch"
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

# sha256 over the pixels and labels of the training and the test images, in their order.
KNOWN_IMAGES = {
    "e56d6721d5a64a14e17b9daf674fe8e0b7963f791e0490a6063ccdc2ad85404e": "JPEG copy of CIFAR-10",
}
OFFICIAL_MD5 = {  # of the files in the official archive
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
OFFICIAL, UNKNOWN = "CIFAR-10", "CIFAR-10 layout, not the official images"
LEGAL = f"legal: the official cifar-10-python.tar.gz or the folder {FOLDER} of a copy"


@dataclass(frozen=True)
class Dataset:
    """Images and labels.

    Attributes:
        name: What the images are: ``CIFAR-10``, ``JPEG copy of CIFAR-10``, ``synthetic`` ...
        train_x: Training images, uint8 (N, 3, 32, 32).
        train_y: Their labels, int32 (N,).
        test_x: Test images, uint8 (M, 3, 32, 32).
        test_y: Their labels, int32 (M,).
        classes: Names of the labels.
        source: Where the images came from.
    """

    name: str
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    classes: tuple[str, ...]
    source: str


def load(data: str | None = None) -> Dataset:
    """Load CIFAR-10 or the embedded stand-in.

    Args:
        data: ``synthetic``; or the official archive, the folder ``cifar-10-batches-py`` or one
            that holds either, or a Chainer dataset root. By default ``$CHAINER_DATASET_ROOT`` or
            ``~/.chainer/dataset``, where the archive is downloaded to if it is not there.

    Raises:
        InputError: Nothing there, damaged, not what it should be, or no network.
    """
    if data == "synthetic":
        seed = synthetic.SEED
        return Dataset(data, *synthetic.make(seed), synthetic.CLASSES, f"made from seed {seed}")
    if data is not None:
        path = Path(data)
        if not path.exists():
            raise InputError(f"--data: no such file or folder '{data}'; {LEGAL}, or 'synthetic'")
        read = _reader(path)
        if read is None:
            raise InputError(f"--data: no CIFAR-10 in the folder {path}; {LEGAL}")
        return read()
    root = Path(os.environ.get("CHAINER_DATASET_ROOT") or "~/.chainer/dataset").expanduser()
    read = _reader(root) if root.is_dir() else None
    if read is None:
        archive = root / "_dl_cache" / cache_name()
        download(archive)
        return _read_archive(archive, verified=True)
    return read()


def cache_name() -> str:
    """Name under which Chainer caches the download of ``URL``."""
    return hashlib.md5(URL.encode()).hexdigest()


def mean_image(x: np.ndarray) -> np.ndarray:
    """Per-pixel mean of training images (report, section II).

    Args:
        x: uint8 (N, 3, 32, 32).

    Returns:
        float32 (3, 32, 32), in units of 0..1.
    """
    return (x.sum(axis=0, dtype=np.int64) / (255.0 * len(x))).astype(np.float32)


def hold_out(dataset: Dataset, count: int) -> Dataset:
    """The split of He et al. 2015, 4.2: the last ``count`` training images are evaluated on.

    CIFAR-10's training images are in random order, so the last ones are a fair sample; that they
    are always the same ones makes runs comparable. The test images are left out of the result.
    """
    cut = len(dataset.train_y) - count
    return replace(
        dataset,
        train_x=dataset.train_x[:cut],
        train_y=dataset.train_y[:cut],
        test_x=dataset.train_x[cut:],
        test_y=dataset.train_y[cut:],
    )


def download(path: Path, url: str = URL, size: int = SIZE, md5: str = MD5) -> None:
    """Download the archive to ``path``, which appears only once size and md5 are right.

    An interrupted download is kept beside and continued by the next call. Processes that call
    this at the same time wait for each other.

    Raises:
        InputError: No network, or what came is not the archive.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = open(path.with_name(path.name + ".part"), "ab")  # noqa: SIM115 closed below
    except OSError as error:
        raise InputError(f"cannot write the download {path}: {error.strerror}") from None
    with part:
        fcntl.flock(part, fcntl.LOCK_EX)
        if path.exists():  # another process was faster
            return
        try:
            _fetch(part, url, size)
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise InputError(
                f"cannot download {url}: {reason}; the same command continues it. "
                "Without a network: --data PATH or CHAINER_DATASET_ROOT, or --data synthetic"
            ) from None
        temporary = Path(part.name)
        found = _digest(temporary, "md5")
        if (temporary.stat().st_size, found) != (size, md5):
            what = _describe(temporary)
            temporary.unlink()
            raise InputError(
                f"{url} is not the official archive: found {what}, md5 {found}; "
                f"legal: {size:,} bytes, md5 {md5}. Removed it"
            )
        os.replace(temporary, path)


def _fetch(part: BinaryIO, url: str, size: int) -> None:
    """Append to ``part`` what is still missing of ``url``."""
    have = os.fstat(part.fileno()).st_size
    if have == size:  # all there, but its check was interrupted
        return
    if have > size:
        part.truncate(have := 0)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        if have and response.status != 206:  # this server always sends the whole file
            part.truncate(have := 0)
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else size
        show = _progress_bar(total)
        while chunk := response.read(1 << 16):
            part.write(chunk)
            have += len(chunk)
            show(have)
        part.flush()
    if have < total:
        raise OSError(f"the connection ended after {have:,} of {total:,} bytes")


def _progress_bar(total: int) -> Callable[[int], None]:
    """A function that shows how much of ``total`` bytes is there, on stderr."""
    shown = -1
    step = 1 if sys.stderr.isatty() else 20
    end = "\r" if sys.stderr.isatty() else "\n"

    def show(have: int) -> None:
        nonlocal shown
        percent = 100 * have // max(total, 1)
        if percent // step > shown:
            shown = percent // step
            marks = "#" * (percent * 40 // 100)
            text = f"CIFAR-10 [{marks:.<40}] {percent:3d} % of {total / 1e6:.1f} MB"
            print(text, end="\n" if have >= total else end, file=sys.stderr, flush=True)

    return show


def _reader(path: Path) -> Callable[[], Dataset] | None:
    """The function that reads the CIFAR-10 at ``path``; None for a folder without one."""
    if path.is_file():
        return _read_npz(path) if path.suffix == ".npz" else lambda: _read_archive(path)
    if (path / TEST_FILE).exists() or (path / TRAINING_FILES[0]).exists():
        return lambda: _read_folder(path)
    for inner in (FOLDER, "cifar-10-python.tar.gz", f"_dl_cache/{cache_name()}",
                  "pfnet/chainer/cifar/cifar10.npz", cache_name()):  # fmt: skip
        if (path / inner).exists():
            return _reader(path / inner)
    return None


def _read_npz(path: Path) -> Callable[[], Dataset]:
    """Reader of Chainer's cache: images already read from an archive by Chainer's get_cifar10."""

    def read() -> Dataset:
        try:
            with np.load(path) as file:
                arrays = [file[name] for name in ("train_x", "train_y", "test_x", "test_y")]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise InputError(f"{path}: not Chainer's cache of CIFAR-10 ({error})") from None
        train_x, train_y, test_x, test_y = arrays
        train = _check(path, train_x.reshape(len(train_x), -1), train_y)
        test = _check(path, test_x.reshape(len(test_x), -1), test_y)
        return _assemble([train], test, False, path)

    return read


def _read_folder(path: Path) -> Dataset:
    official = True

    def content(name: str) -> bytes:
        nonlocal official
        try:
            data = (path / name).read_bytes()
        except OSError as error:
            raise InputError(f"{path / name}: {error.strerror}; {LEGAL}") from None
        official &= hashlib.md5(data).hexdigest() == OFFICIAL_MD5[name]
        return data

    batches = {
        name: _read_batch(path / name, content(name)) for name in (*TRAINING_FILES, TEST_FILE)
    }
    test = batches.pop(TEST_FILE)
    return _assemble(list(batches.values()), test, official, path)


def _read_archive(path: Path, verified: bool = False) -> Dataset:
    if not verified and (found := _digest(path, "md5")) != MD5:
        raise InputError(
            f"{path}: not the official archive: found {_describe(path)}, md5 {found}; legal: "
            f"{SIZE:,} bytes, md5 {MD5}, or for another copy its unpacked folder {FOLDER}"
        )
    try:
        with tarfile.open(path, "r:gz") as tar:
            batches = {
                name: _read_batch(path / name, tar.extractfile(f"{FOLDER}/{name}").read())
                for name in (*TRAINING_FILES, TEST_FILE)
            }
    except (tarfile.TarError, OSError, EOFError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: damaged archive ({error}); {LEGAL}") from None
    test = batches.pop(TEST_FILE)
    return _assemble(list(batches.values()), test, True, path)


def _assemble(train: list, test: tuple, official: bool, path: Path) -> Dataset:
    train_x, train_y = (np.concatenate(arrays) for arrays in zip(*train, strict=True))
    name = OFFICIAL
    if not official:
        digest = hashlib.sha256()
        for array in (train_x, train_y, *test):
            digest.update(array.data)
        name = KNOWN_IMAGES.get(digest.hexdigest(), UNKNOWN)
    return Dataset(name, train_x, train_y, *test, CLASSES, str(path.absolute()))


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that calls nothing but what rebuilds a NumPy array.

    The official files were pickled by Python 2 and need just these. A pickle from elsewhere could
    name any function, and loading it would call that function.
    """

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }
    )

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks to call {module}.{name}, which is not allowed")
        if name == "_reconstruct":  # its module was renamed in NumPy 2
            return np.ndarray.__reduce__(np.empty(0))[0]
        return getattr(np, name)


def _read_batch(path: Path, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (N, 3, 32, 32), and labels, int32 (N,), of one of the six files."""
    try:
        record = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        data, labels = record[b"data"], record[b"labels"]
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error) or type(error).__name__
        raise InputError(f"{path}: not a CIFAR-10 batch: {reason}; {LEGAL}") from None
    return _check(path, data, np.asarray(labels))


def _check(path: Path, data: object, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    good = (
        isinstance(data, np.ndarray)
        and data.dtype == np.uint8
        and data.ndim == 2
        and data.shape[1] == 3072
        and labels.shape == (len(data),)
        and len(data) > 0
        and labels.dtype.kind in "iu"
        and labels.min() >= 0
        and labels.max() < len(CLASSES)
    )
    if not good:
        raise InputError(
            f"{path}: not a CIFAR-10 batch; legal: uint8 images of 3072 values each "
            f"and as many labels from 0 to 9; {LEGAL}"
        )
    return np.ascontiguousarray(data).reshape(-1, 3, 32, 32), labels.astype(np.int32)


def _digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _describe(path: Path) -> str:
    """What a file that should be the archive looks like."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    size = path.stat().st_size
    if start.startswith((b"<!doctype html", b"<html")):
        return f"an HTML page of {size:,} bytes"
    if start.startswith(b"\x1f\x8b") and size < SIZE:
        return f"{size:,} bytes, perhaps a truncated download"
    return f"{size:,} bytes"
