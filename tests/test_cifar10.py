"""The data set: every place it may lie in, everything that may be wrong with it."""

import hashlib
import os
import pickle
import tarfile

import numpy as np
import pytest

from resnet import cifar10, download
from resnet.command import InputError

NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def batch(seed, count=20):
    """Images and labels; every class occurs twice."""
    rng = np.random.RandomState(seed)
    x = rng.randint(0, 256, (count, 3072)).astype(np.uint8)
    return {b"data": x, b"labels": [int(label) for label in rng.permutation(count) % 10]}


def write(folder, change=None):
    """Write the six files into ``folder`` and return it; ``change`` maps names to contents."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(NAMES):
        content = (change or {}).get(name, pickle.dumps(batch(seed), protocol=4))
        if content is not None:
            (folder / name).write_bytes(content)
    return folder


def pack(folder, archive):
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname="cifar-10-batches-py")
    return archive


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty Chainer dataset root; nothing may be downloaded from the real address."""
    monkeypatch.setenv("CHAINER_DATASET_ROOT", str(tmp_path / "root"))
    monkeypatch.setattr(download, "fetch", lambda path: pytest.fail("download"))
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small archive that counts as the official one."""
    path = pack(write(tmp_path / "made" / "cifar-10-batches-py"), tmp_path / "any name.tgz")
    monkeypatch.setattr(download, "MD5", md5(path))
    monkeypatch.setattr(download, "SIZE", path.stat().st_size)
    return path


def assert_same_images(dataset):
    train = [batch(seed) for seed in range(5)]
    x = np.concatenate([record[b"data"] for record in train]).reshape(-1, 3, 32, 32)
    assert (dataset.train_x == x).all()
    assert dataset.train_y.tolist() == [label for record in train for label in record[b"labels"]]
    assert (dataset.test_x.reshape(20, -1) == batch(5)[b"data"]).all()
    assert dataset.test_y.tolist() == batch(5)[b"labels"]
    assert dataset.train_x.dtype == dataset.test_x.dtype == np.uint8
    assert dataset.train_y.dtype == dataset.test_y.dtype == np.int32
    assert " ".join(dataset.classes) == (  # as batches.meta of the official archive has them
        "airplane automobile bird cat deer dog frog horse ship truck"
    )


def refusal(data, *words):
    """The one line that ``load(data)`` refuses with, which holds all ``words``."""
    with pytest.raises(InputError) as caught:
        cifar10.load(str(data))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message
    return message


# Where it may lie


def test_folder_and_the_folder_that_holds_it(tmp_path):
    folder = write(tmp_path / "cifar-10-batches-py")
    for data in (folder, tmp_path):
        dataset = cifar10.load(str(data))
        assert_same_images(dataset)
        assert dataset.source == str(folder)
        assert dataset.name == "CIFAR-10 layout, not the official images"


def test_archive_under_any_name_and_the_folder_that_holds_it(tmp_path, archive):
    dataset = cifar10.load(str(archive))
    assert_same_images(dataset)
    assert dataset.name == "CIFAR-10"
    assert dataset.source == str(archive)
    (tmp_path / "other").mkdir()
    archive.rename(tmp_path / "other" / "cifar-10-python.tar.gz")
    assert_same_images(cifar10.load(str(tmp_path / "other")))


def test_chainer_download_cache(root, archive):
    cache = root / "_dl_cache" / "f2751d3a22ccb78db0e07874912b5c43"
    cache.parent.mkdir()
    archive.rename(cache)
    for data in (None, str(root), str(cache.parent), str(cache)):
        dataset = cifar10.load(data)
        assert_same_images(dataset)
        assert dataset.name == "CIFAR-10"


def test_chainer_array_cache(root, monkeypatch):
    path = root / "pfnet" / "chainer" / "cifar" / "cifar10.npz"
    path.parent.mkdir(parents=True)
    train = [batch(seed) for seed in range(5)]
    np.savez_compressed(
        path,
        train_x=np.concatenate([record[b"data"] for record in train]),
        train_y=np.concatenate([record[b"labels"] for record in train]).astype(np.uint8),
        test_x=batch(5)[b"data"],
        test_y=np.array(batch(5)[b"labels"], np.uint8),
    )
    for data in (None, str(root), str(path)):
        assert_same_images(cifar10.load(data))
    dataset = cifar10.load()
    assert dataset.name == "CIFAR-10 layout, unverified"
    found = cifar10.digest(dataset.train_x, dataset.train_y, dataset.test_x, dataset.test_y)
    monkeypatch.setitem(cifar10.KNOWN_IMAGES, found, "a copy")
    assert cifar10.load().name == "a copy"


def test_archive_or_folder_lying_in_the_root(root, archive, tmp_path):
    archive.rename(root / "cifar-10-python.tar.gz")
    assert cifar10.load().name == "CIFAR-10"
    write(root / "cifar-10-batches-py")
    assert cifar10.load().source == str(root / "cifar-10-batches-py")


def test_an_empty_folder_does_not_hide_the_archive(root, archive):
    archive.rename(root / "cifar-10-python.tar.gz")
    (root / "cifar-10-batches-py").mkdir()
    assert_same_images(cifar10.load())


def test_downloads_to_chainers_cache_when_there_is_nothing(root, archive, monkeypatch):
    def fetch(path):
        path.parent.mkdir()
        archive.rename(path)

    monkeypatch.setattr(download, "fetch", fetch)
    dataset = cifar10.load()
    assert_same_images(dataset)
    assert dataset.source == str(root / "_dl_cache" / "f2751d3a22ccb78db0e07874912b5c43")


# What it is


def test_a_folder_is_official_only_if_all_six_files_are(tmp_path, monkeypatch):
    folder = write(tmp_path)
    monkeypatch.setattr(cifar10, "OFFICIAL_MD5", {name: md5(folder / name) for name in NAMES})
    assert cifar10.load(str(folder)).name == "CIFAR-10"
    write(folder, {"data_batch_3": pickle.dumps(batch(33), protocol=4)})
    assert cifar10.load(str(folder)).name == "CIFAR-10 layout, not the official images"


def test_known_copies_are_told_by_their_images(tmp_path, monkeypatch):
    dataset = cifar10.load(str(write(tmp_path)))
    arrays = [dataset.train_x, dataset.train_y, dataset.test_x, dataset.test_y]
    found = cifar10.digest(*arrays)
    assert dataset.digest == found
    monkeypatch.setitem(cifar10.KNOWN_IMAGES, found, "a copy")
    assert cifar10.load(str(tmp_path)).name == "a copy"
    for index in range(4):
        changed = [array.copy() for array in arrays]
        changed[index].flat[0] ^= 1
        assert cifar10.digest(*changed) != found


def test_real_copy_is_recognized():
    """Only where a copy of CIFAR-10 is named by the environment."""
    data = os.environ.get("CIFAR10_COPY") or pytest.skip("CIFAR10_COPY names no copy")
    dataset = cifar10.load(data)
    assert dataset.name in ("CIFAR-10", *cifar10.KNOWN_IMAGES.values())
    assert dataset.train_x.shape == (50000, 3, 32, 32)
    assert (np.bincount(dataset.test_y) == 1000).all()


# What may be wrong with it


def test_a_copy_that_is_not_all_of_it_is_said_to_be_so(tmp_path, capsys, monkeypatch):
    cifar10.load(str(write(tmp_path)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"warning: {tmp_path}: not all of CIFAR-10: found 100 training and 20 test images, "
        "CIFAR-10 has 50,000 and 10,000"
    )
    monkeypatch.setattr(cifar10, "COUNTS", (100, 20))
    cifar10.load(str(tmp_path))
    assert not capsys.readouterr().err


def test_nothing_there(tmp_path):
    refusal(tmp_path / "none", "none", "cifar-10-python.tar.gz")
    refusal(tmp_path, tmp_path, "cifar-10-batches-py")


def test_wrong_md5(archive, monkeypatch):
    monkeypatch.setattr(download, "MD5", "0" * 32)
    refusal(archive, archive, md5(archive), "0" * 32, "unpacked folder")


def test_truncated_archive(archive):
    size = archive.stat().st_size
    os.truncate(archive, size // 2)
    refusal(archive, archive, f"{size // 2:,} bytes, perhaps a truncated download", f"{size:,}")


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><p>404", b"\n<html><body>Sign in"])
def test_html_page(archive, page):
    archive.write_bytes(page)
    refusal(archive, archive, "an HTML page")


def test_damaged_archive_whose_md5_is_right(archive, monkeypatch):
    content = archive.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"no archive", content[:99] + b"?" * 999):
        archive.write_bytes(damaged)
        monkeypatch.setattr(download, "MD5", md5(archive))
        refusal(archive, archive)


def test_archive_without_a_file(tmp_path, monkeypatch):
    archive = pack(write(tmp_path / "f", {"data_batch_4": None}), tmp_path / "a.tar.gz")
    monkeypatch.setattr(download, "MD5", md5(archive))
    refusal(archive, archive, "cifar-10-batches-py/data_batch_4")


def test_links_in_an_archive_are_not_followed(tmp_path, monkeypatch):
    folder = write(tmp_path / "f", {"test_batch": None})
    (folder / "test_batch").symlink_to("data_batch_1")
    archive = pack(folder, tmp_path / "a.tar.gz")
    monkeypatch.setattr(download, "MD5", md5(archive))
    refusal(archive, archive, "cifar-10-batches-py/test_batch")


@pytest.mark.parametrize("name", NAMES)
def test_missing_batch(tmp_path, name):
    refusal(write(tmp_path, {name: None}), tmp_path / name)


@pytest.mark.parametrize("name", NAMES)
def test_batch_that_is_a_folder(tmp_path, name):
    write(tmp_path, {name: None})
    (tmp_path / name).mkdir()
    refusal(tmp_path, tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [
        {b"data": np.zeros((20, 3071), np.uint8)},
        {b"data": np.zeros((20, 3072), np.float32)},
        {b"data": np.full((20, 3072), None)},
        {b"data": np.zeros((0, 3072), np.uint8), b"labels": []},
        {b"data": [[0] * 3072] * 20},
        {b"data": None},
        {b"labels": None},
        {b"labels": [0] * 19},
        {b"labels": [0] * 19 + [10]},
        {b"labels": [0] * 19 + [-1]},
        {b"labels": [0.0] * 20},
        {b"labels": ["cat"] * 20},
        {b"labels": [[0], [1, 2]]},
    ],
    ids=str,
)
def test_wrong_contents(tmp_path, change):
    content = pickle.dumps(batch(2) | change, protocol=4)
    refusal(write(tmp_path, {"data_batch_3": content}), tmp_path / "data_batch_3")


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps(7)])
def test_no_batch_at_all(tmp_path, content):
    refusal(write(tmp_path, {"test_batch": content}), tmp_path / "test_batch")


def test_truncated_batch(tmp_path):
    content = pickle.dumps(batch(5), protocol=4)
    for size in (1, 100, len(content) // 2, len(content) - 1):
        refusal(write(tmp_path, {"test_batch": content[:size]}), tmp_path / "test_batch")


def test_labels_in_endless_lists_are_refused(tmp_path):
    labels = []
    for _ in range(60):
        labels = [labels, labels]
    content = pickle.dumps(batch(0) | {b"labels": labels}, protocol=4)
    refusal(write(tmp_path, {"data_batch_1": content}), "data_batch_1", "whole numbers")


@pytest.mark.parametrize("name", ["data_batch_1", "cifar10.npz"])
def test_pipes_are_not_waited_for(tmp_path, name):
    write(tmp_path, {"data_batch_1": None})
    os.mkfifo(tmp_path / name)
    refusal(tmp_path if name == "data_batch_1" else tmp_path / name, name)


def test_damaged_array_cache(tmp_path):
    path = tmp_path / "cifar10.npz"
    x, y = np.zeros((4, 3072), np.uint8), np.zeros(4, np.uint8)
    good = {"train_x": x, "train_y": y, "test_x": x, "test_y": y}
    np.savez_compressed(path, **good)
    content = path.read_bytes()
    assert len(cifar10.load(str(path)).train_y) == 4
    middle = len(content) // 4
    for damaged in (b"", b"<html>", content[:100], content[:middle] + b"????" + content[middle:]):
        path.write_bytes(damaged)
        refusal(path, path)
    for wrong in (
        {"test_y": None},
        {"train_x": np.uint8(3)},
        {"train_x": x.astype(object)},
        {"train_x": x[:, 1:]},
        {"train_y": y[1:]},
        {"train_y": y + 10},
    ):
        arrays = {name: a for name, a in (good | wrong).items() if a is not None}
        np.savez(path, **arrays)
        refusal(path, path)


# What is made of it


def test_mean_image_against_float64():
    x = np.random.RandomState(0).randint(0, 256, (1000, 3, 32, 32)).astype(np.uint8)
    mean = cifar10.mean_image(x)
    assert mean.dtype == np.float32
    assert mean.shape == (3, 32, 32)
    np.testing.assert_allclose(mean, (x.astype(np.float64) / 255).mean(axis=0), rtol=1e-7)
    assert (cifar10.mean_image(np.full((300, 3, 32, 32), 255, np.uint8)) == 1).all()


def numbered(labels):
    """Images that hold their own index."""
    y = np.asarray(labels, np.int32)
    x = np.zeros((len(y), 3, 32, 32), np.uint8)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = np.arange(len(y)) // 256, np.arange(len(y)) % 256
    return cifar10.Dataset("CIFAR-10", x, y, x[:3] + 1, y[:3], cifar10.CLASSES, "here", "")


def indices(x):
    return (x[:, 0, 0, 0].astype(int) * 256 + x[:, 0, 0, 1]).tolist()


def test_hold_out_is_disjoint_balanced_and_always_the_same():
    dataset = numbered(np.random.RandomState(0).permutation(1000) % 10)
    split = cifar10.hold_out(dataset, 100)
    kept, held = indices(split.train_x), indices(split.test_x)
    assert sorted(kept + held) == list(range(1000))
    assert (np.bincount(split.test_y) == 10).all()
    assert (np.bincount(split.train_y) == 90).all()
    assert split.train_y.tolist() == dataset.train_y[kept].tolist()
    assert split.test_y.tolist() == dataset.train_y[held].tolist()
    assert indices(cifar10.hold_out(dataset, 100).test_x) == held
    for label in range(10):  # the last of each class
        of = np.flatnonzero(dataset.train_y == label)
        assert set(of[-10:]) <= set(held)
    assert (split.name, split.source) == (dataset.name, dataset.source)


def test_hold_out_where_classes_do_not_divide():
    dataset = numbered([0] * 50 + [1] * 3 + [2] * 50)
    assert np.bincount(cifar10.hold_out(dataset, 20).test_y).tolist() == [8, 3, 9]
    for count in (0, -1, 103, 5000):
        with pytest.raises(InputError, match=str(count)):
            cifar10.hold_out(dataset, count)
