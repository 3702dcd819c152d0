"""CIFAR-10: found or downloaded, verified, and read without running what a pickle may hold."""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from resnet import arrays, command, download, files, pickles, synthetic
from resnet.command import InputError

OFFICIAL_MD5 = {  # of the files in the official archive
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
TEST_FILE = "test_batch"
COUNTS = (50_000, 10_000)  # training and test images
ARCHIVE, FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer",
    "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
LEGAL = f"legal: the official {ARCHIVE} or the unpacked folder {FOLDER} of any copy"

OFFICIAL = "CIFAR-10"
UNKNOWN = "CIFAR-10 layout, not the official images"
UNVERIFIED = "CIFAR-10 layout, unverified"  # Chainer's npz: the official files cannot be told by it
KNOWN_IMAGES = {  # by `digest` of the images and labels
    "7859d8b42730906b87a366c608603cfcae0c66c0999a1eb0a7d25c6c5614deb9": (
        "CIFAR-10, 93 of 60,000 images through a JPEG"
    ),
}


@dataclass(frozen=True)
class Dataset:
    """Images and labels.

    Attributes:
        name: What the images are: ``CIFAR-10``, ``synthetic``, or a name of ``KNOWN_IMAGES`` ...
        train_x: Training images, uint8 (N, 3, 32, 32).
        train_y: Their labels, int32 (N,).
        test_x: Test images, uint8 (M, 3, 32, 32).
        test_y: Their labels, int32 (M,).
        classes: Names of the labels.
        source: The path they came from, or ``made from seed S``.
        digest: ``digest`` of all images and labels, also where some of them are left out.
    """

    name: str
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    classes: tuple[str, ...]
    source: str
    digest: str


def load(data: str | None = None, may_download: bool = True) -> Dataset:
    """Load CIFAR-10 or the embedded stand-in.

    Args:
        data: ``synthetic``; or the official archive, the folder ``cifar-10-batches-py`` or one
            that holds either, or a Chainer dataset root. By default ``$CHAINER_DATASET_ROOT`` or
            ``~/.chainer/dataset``, where the archive is downloaded to if it is not there.
        may_download: Whether that is wanted; compute nodes of a cluster reach no network.

    Raises:
        InputError: Nothing there, damaged, not what it should be, or no network.
    """
    if data == "synthetic":
        seed = synthetic.SEED
        arrays = synthetic.make(seed=seed)
        source = f"made from seed {seed}"
        return Dataset(data, *arrays, synthetic.CLASSES, source, digest(*arrays))
    try:
        if data is not None:
            path = _expand(data)
            if not data or not (path.is_file() or path.is_dir()):
                raise InputError(f"--data: no such file or folder '{data}'; {LEGAL}, or synthetic")
            read = _reader(path)
            if read is None:
                raise InputError(f"--data: no CIFAR-10 in the folder {path}; {LEGAL}")
            return read()
        root = _expand(os.environ.get("CHAINER_DATASET_ROOT") or "~/.chainer/dataset")
        read = _reader(root) if root.is_dir() else None
        if read is None and not may_download:
            raise InputError(
                f"no CIFAR-10 in {root}; legal: fetch it where there is a network, "
                "python -m resnet.cifar10, or name a copy"
            )
        if read is None:
            archive = root / "_dl_cache" / download.cache_name()
            download.fetch(archive)
            return _read_archive(archive)
        return read()
    except OSError as error:  # unreadable, or gone since it was found
        raise InputError(f"{error.filename or data or root}: {error.strerror or error}") from None


def _expand(name: str) -> Path:
    """Make the path that a name is of, where ``~`` is a home."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # of a user who has none
        raise InputError(f"'{name}': {command.reason(error)}; {LEGAL}") from None


def mean_image(train_x: np.ndarray) -> np.ndarray:
    """Compute the per-pixel mean of training images (report, section II).

    Args:
        train_x: uint8 (N, 3, 32, 32).

    Returns:
        float32 (3, 32, 32), in units of 0..1.
    """
    total = train_x.sum(axis=0, dtype=np.int64)
    return (total / (255.0 * len(train_x))).astype(np.float32)


def hold_out(dataset: Dataset, count: int = 5000) -> Dataset:
    """Evaluate on ``count`` training images instead of the test images (He et al. 2015, 4.2).

    He et al. do not say which images their 45k/5k split holds out. Here they are the last ones of
    each class, equally many of each where the classes allow it: the same on every run. Both parts
    keep the order of the training images; the test images are left out of the result.

    Raises:
        InputError: ``count`` leaves no image on one of the sides.
    """
    labels = dataset.train_y
    if not 0 < count < len(labels):
        raise InputError(f"cannot hold out {count} of {len(labels)} training images")
    later = np.empty(len(labels), np.int64)  # images of the same class that come after this one
    for label in np.unique(labels):
        of = np.flatnonzero(labels == label)
        later[of] = np.arange(len(of))[::-1]
    held = np.zeros(len(labels), bool)
    held[np.lexsort((-np.arange(len(labels)), later))[:count]] = True
    x, y = dataset.train_x, labels
    return replace(dataset, train_x=x[~held], train_y=y[~held], test_x=x[held], test_y=y[held])


def digest(train_x, train_y, test_x, test_y) -> str:
    """Compute the sha256 of the pixels and labels, in their order."""
    sha256 = hashlib.sha256()
    for array in (train_x, train_y.astype(np.uint8), test_x, test_y.astype(np.uint8)):
        sha256.update(np.ascontiguousarray(array).data)
    return sha256.hexdigest()


def _reader(path: Path) -> Callable[[], Dataset] | None:
    """Find the function that reads the CIFAR-10 at ``path``; None for a folder without one."""
    if not path.is_dir():
        read = _read_npz if path.suffix == ".npz" else _read_archive
        return lambda: read(path)
    if any((path / name).exists() for name in OFFICIAL_MD5):
        return lambda: _read_folder(path)
    cache = download.cache_name()
    for inner in (FOLDER, ARCHIVE, f"_dl_cache/{cache}", cache, "pfnet/chainer/cifar/cifar10.npz"):
        if (path / inner).exists() and (read := _reader(path / inner)):
            return read
    return None


def _read_folder(path: Path) -> Dataset:
    """Read the six files of an unpacked archive, official or not."""
    official, batches = True, {}
    for name, md5 in OFFICIAL_MD5.items():
        try:
            content = files.read(path / name)
        except OSError as error:
            raise InputError(f"{path / name}: {error.strerror}; {LEGAL}") from None
        official &= hashlib.md5(content).hexdigest() == md5
        batches[name] = _read_batch(path / name, content)
    return _assemble(batches, OFFICIAL if official else UNKNOWN, path)


def _read_archive(path: Path) -> Dataset:
    """Read the official archive, in one pass and in memory."""
    if (found := download.md5_of(path)) != download.MD5:
        ours = path.name == download.cache_name()
        remedy = "; delete it to have it downloaded again" if ours else ""
        raise InputError(
            f"{path}: not the official archive: found {download.describe(path)}, md5 {found}; "
            f"legal: {download.SIZE:,} bytes, md5 {download.MD5}, or the unpacked folder {FOLDER} "
            f"of another copy{remedy}"
        )
    batches = {}
    try:
        with tarfile.open(path, "r|gz") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                if folder == FOLDER and name in OFFICIAL_MD5 and member.isreg():
                    batches[name] = _read_batch(path / name, tar.extractfile(member).read())
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: damaged archive ({error}); {LEGAL}") from None
    if missing := sorted(OFFICIAL_MD5.keys() - batches):
        raise InputError(f"{path}: the archive holds no {FOLDER}/{missing[0]}; {LEGAL}")
    return _assemble(batches, OFFICIAL, path)


def _read_npz(path: Path) -> Dataset:
    """Read the arrays that Chainer's ``get_cifar10`` keeps of the archive it once read."""
    try:
        with files.parsing():
            found = arrays.read_npz(files.read(path))
            parts = {
                part: (found[f"{part}_x"].reshape(len(found[f"{part}_x"]), -1), found[f"{part}_y"])
                for part in ("train", "test")
            }
    except ValueError as error:
        raise InputError(f"{path}: not Chainer's cache of CIFAR-10 ({error}); {LEGAL}") from None
    batches = {"train": _check(path, *parts["train"]), TEST_FILE: _check(path, *parts["test"])}
    return _assemble(batches, UNVERIFIED, path)


def _assemble(batches: dict[str, tuple[np.ndarray, np.ndarray]], name: str, path: Path) -> Dataset:
    """Join the batches; the training batches lie in their official order whatever the archive's."""
    test = batches.pop(TEST_FILE)
    train = zip(*(batches[key] for key in sorted(batches)), strict=True)
    images = (*(np.concatenate(parts) for parts in train), *test)
    found = digest(*images)
    if name != OFFICIAL:
        name = KNOWN_IMAGES.get(found, name)
    counts = len(images[1]), len(images[3])
    if counts != COUNTS:
        print(
            "warning: {}: not all of CIFAR-10: found {:,} training and {:,} test images, "
            "CIFAR-10 has {:,} and {:,}".format(path, *counts, *COUNTS),
            file=sys.stderr,
        )
    return Dataset(name, *images, CLASSES, str(path.absolute()), found)


def _read_batch(path: Path, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Read one of the six files: images, uint8 (N, 3, 32, 32), and labels, int32 (N,)."""
    try:
        with files.parsing():
            record = pickles.load(content)
            if not isinstance(record, dict) or not {"data", "labels"} <= record.keys():
                raise ValueError("holds no data and labels")
            data, labels = (
                getattr(value, "value", value) for value in (record["data"], record["labels"])
            )
            # Checked before NumPy makes an array of them: lists in lists can be endless.
            if not isinstance(labels, np.ndarray):
                if not isinstance(labels, list) or not all(type(label) is int for label in labels):
                    raise ValueError("labels: legal: a list of whole numbers")
                labels = np.asarray(labels)
    except ValueError as error:
        raise InputError(f"{path}: not a CIFAR-10 batch: {error}; {LEGAL}") from None
    return _check(path, data, labels)


def _check(path: Path, data: object, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bring images and labels into this project's shapes and types."""
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2:
        found = f"{getattr(data, 'dtype', type(data).__name__)} {getattr(data, 'shape', '')}"
        raise InputError(f"{path}: images: found {found}, legal: uint8 (N, 3072)")
    if data.shape[1] != 3072 or len(data) == 0:
        raise InputError(f"{path}: images: found shape {data.shape}, legal: (N, 3072) with N > 0")
    if labels.shape != (len(data),) or labels.dtype.kind not in "iu":
        found = f"{labels.dtype} {labels.shape}"
        raise InputError(f"{path}: labels: found {found}, legal: {len(data)} whole numbers")
    if labels.min() < 0 or labels.max() >= len(CLASSES):
        raise InputError(f"{path}: labels: found {labels.min()}..{labels.max()}, legal: 0..9")
    return np.ascontiguousarray(data).reshape(-1, 3, 32, 32), labels.astype(np.int32)


def main() -> None:
    p = command.Parser(description=__doc__)
    p.add_argument("data", nargs="?", metavar="PATH", help="as --data of the experiments")
    p.add_argument("--no-download", action="store_true", help="fail when it is not there")
    args = p.parse_args()
    found = load(args.data, may_download=not args.no_download)
    print(f"{found.name}: {len(found.train_y):,} training, {len(found.test_y):,} test images")
    print(f"source: {found.source}")


if __name__ == "__main__":
    command.run(main)
