"""Block weights in HDF5: what goes in comes out, and what is not ours is refused in one line."""

import contextlib
import dataclasses
import errno
import resource

import chainer
import h5py
import numpy as np
import pytest
from chainer import links as L
from conftest import ROOT, flips

from resnet import files, network, run_folder, weights
from resnet.command import InputError
from resnet.export import state
from resnet.modules import Normalization
from resnet.network import ARCHITECTURES, GROUPS

MEAN = np.linspace(0, 1, 3 * 32 * 32, dtype=np.float32).reshape(3, 32, 32)
CLASSES = ("airplane", "Wagen", "鳥", "d", "e", "f", "g", "h", "i", "j")


def trained(architecture="resnet", n=1):
    """A network none of whose arrays is as it was at the start."""
    net = ARCHITECTURES[architecture](n)
    rng = np.random.RandomState(1)
    for _ in range(2):
        net(rng.standard_normal((4, 3, 32, 32)).astype(np.float32))
    for parameter in net.params():
        parameter.array += rng.standard_normal(parameter.shape).astype(np.float32) / 10
    return net


def describe(architecture="resnet", n=1):
    return weights.Description(architecture, n, "CIFAR-10", CLASSES, seed=7, epoch=3, iteration=99)


@pytest.fixture
def saved(tmp_path):
    """A file blocks.h5 and the network in it."""
    path, net = tmp_path / "blocks.h5", trained()
    weights.save(path, net, describe(), MEAN)
    return path, net


def assert_same(first, second):
    """Every weight and statistic is equal bit for bit."""
    first, second = state(first), state(second)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_restored_network_is_the_saved_one(architecture, n, tmp_path):
    path, net = tmp_path / "blocks.h5", trained(architecture, n)
    weights.save(path, net, describe(architecture, n), MEAN)
    restored, description = weights.restore(path)
    assert description == describe(architecture, n)
    assert {type(block) for block in restored.children()} == {
        type(block) for block in net.children()
    }
    assert_same(net, restored)
    assert weights.read_mean(path).tobytes() == MEAN.tobytes()
    x = np.ones((2, 3, 32, 32), np.float32)
    with chainer.using_config("train", False):
        np.testing.assert_array_equal(restored(x).array, net(x).array)


def test_a_network_of_seven_classes_is_restored(tmp_path):
    path, net = tmp_path / "blocks.h5", ARCHITECTURES["resnet"](1, seed=1, classes=7)
    description = dataclasses.replace(describe(), classes=CLASSES[:7])
    weights.save(path, net, description, MEAN)
    restored, found = weights.restore(path)
    assert found == description
    assert_same(net, restored)


@pytest.mark.parametrize(
    ("changes", "mean", "reason"),
    [
        ({"n": 4}, MEAN, "n: found 4, legal: the network's, 1"),
        ({"architecture": "rsnet"}, MEAN, "found 'rsnet', legal: plain"),
        ({}, MEAN.astype(np.float64), "mean: found float64 (3, 32, 32), legal: float32"),
        ({}, MEAN[0], "mean: found float32 (32, 32), legal: float32 (3, 32, 32)"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(changes, mean, reason, tmp_path):
    path, description = tmp_path / "blocks.h5", dataclasses.replace(describe(), **changes)
    with pytest.raises(InputError) as error:
        weights.save(path, ARCHITECTURES["resnet"](1), description, mean)
    assert reason in str(error.value) and not path.exists()


def test_a_network_with_weights_outside_its_groups_is_refused_not_cut_short(tmp_path):
    """Their loss would show only as another accuracy than the log's."""
    net = trained()
    with net.init_scope():
        net.bn = Normalization(64)
    with pytest.raises(InputError, match=r"bn/avg_mean.*bn/gamma.*legal: all in conv1, conv2"):
        weights.save(tmp_path / "blocks.h5", net, describe(), MEAN)
    assert not list(tmp_path.iterdir())


def test_a_link_that_chainer_does_not_know_of_is_refused(tmp_path):
    """It would neither be trained nor saved: one in a link that is no chain, and one outside."""

    class Last(L.Linear):
        def __init__(self, channels, classes, rng):
            super().__init__(channels, classes)
            with self.init_scope():
                self.bn = Normalization(channels)

    unknown = dataclasses.replace(ARCHITECTURES["resnet"], head=Last)(1)
    with pytest.raises(InputError, match=r"found bn of Last, .* legal: made in init_scope"):
        weights.save(tmp_path / "blocks.h5", unknown, describe(), MEAN)
    net = trained()
    net.conv2[0].bn3 = Normalization(16)
    with pytest.raises(InputError, match="found bn3 of ResidualModule"):
        weights.save(tmp_path / "blocks.h5", net, describe(), MEAN)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "hold",
    [
        lambda link: [link],
        lambda link: (3, link),
        lambda link: {"a": link},
        lambda link: {link},
        lambda link: [{"a": (frozenset([link]),)}],
        lambda link: [link.W],
    ],
    ids=["list", "tuple", "dict", "set", "nested", "parameter"],
)
def test_links_in_a_plain_container_are_refused_where_chainer_does_not_know_them(tmp_path, hold):
    net = trained()
    module = net.conv2[0]
    module.sq = hold(module.conv1)  # another name for what is trained and saved
    module.sq_too = [module.conv2]
    module.sq_too.append(module.sq_too)
    weights.check_groups(net, "resnet")
    module.sq = hold(L.Linear(16, 16))
    with pytest.raises(InputError, match=r"found sq of ResidualModule, .* chainer\.ChainList"):
        weights.save(tmp_path / "blocks.h5", net, describe(), MEAN)
    assert not list(tmp_path.iterdir())


def test_file_says_what_it_holds_to_any_hdf5_reader(saved):
    path, net = saved
    with h5py.File(path) as file:
        assert set(file) == {*GROUPS, "mean"}
        assert file.attrs["architecture"] == "resnet"
        assert (file.attrs["n"], file.attrs["epoch"], file.attrs["iteration"]) == (1, 3, 99)
        assert tuple(file.attrs["classes"]) == CLASSES
        w = file["conv3/0/conv1/W"]
        np.testing.assert_array_equal(w[()], net.conv3[0].conv1.W.array)
        assert w.dtype == np.float32


def numpy_logits(path, images):
    """What a file says of itself, done with h5py and NumPy alone."""
    with h5py.File(path) as file:
        at, relu = file.attrs, lambda x: np.maximum(x, 0)

        def conv(x, w, stride=1):
            x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
            x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
            return np.einsum(
                "nchwij,kcij->nkhw", x[:, :, ::stride, ::stride], w["W"], optimize=True
            )

        def bn(x, g):
            gamma, beta, mean, var = (
                g[k][:][:, None, None] for k in ("gamma", "beta", "avg_mean", "avg_var")
            )
            return gamma * (x - mean) / np.sqrt(var + at["epsilon"]) + beta

        def a(x, y):
            x = x[:, :, :: x.shape[2] // y.shape[2], :: x.shape[3] // y.shape[3]]
            return np.pad(x, ((0, 0), (0, y.shape[1] - x.shape[1]), (0, 0), (0, 0)))

        x = relu(bn(conv(images / 255 - file["mean"], file["conv1/conv"]), file["conv1/bn"]))
        for name, block in ((name, file[name]) for name in ("conv2", "conv3", "conv4")):
            start = x
            for i in range(at["n"]):
                last = i == at["n"] - 1
                m, stride = block[str(i)], 2 if name != "conv2" and i == 0 else 1
                y = bn(conv(relu(bn(conv(x, m["conv1"], stride), m["bn1"])), m["conv2"]), m["bn2"])
                if at["architecture"] == "highway":
                    t = conv(x, m["gate"], stride) + m["gate/b"][:][:, None, None]
                    t = 1 / (1 + np.exp(-t))
                    x = relu(y) * t + a(x, y) * (1 - t)
                else:
                    y += 0 if at["architecture"] == "plain" else a(x, y)
                    y += a(start, y) if at["architecture"] == "resresnet" and last else 0
                    x = relu(y)
            x = relu(x + a(start, x)) if at["architecture"] == "resresnet_twice" else x
        return x.mean((2, 3)) @ file["fc/W"][:].T + file["fc/b"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_explains_itself_to_who_has_h5py_and_numpy_alone(architecture, tmp_path):
    path, net = tmp_path / "blocks.h5", trained(architecture, 2)
    weights.save(str(path), net, describe(architecture, 2), MEAN)
    images = np.random.RandomState(0).randint(256, size=(3, 3, 32, 32)).astype(np.uint8)
    with chainer.using_config("train", False):
        expected = net((images / 255 - MEAN).astype(np.float32)).array
    scale = np.abs(expected).max()
    np.testing.assert_allclose(numpy_logits(path, images) / scale, expected / scale, atol=1e-4)
    with h5py.File(path) as file:
        assert file.attrs["epsilon"] == net.conv1.bn.eps


def test_the_page_explains_every_attribute_of_a_file(saved):
    path, _ = saved
    text = (ROOT / "resnet/README.md").read_text()
    with h5py.File(path) as file:
        missing = [name for name in file.attrs if f"`{name}`" not in text]
    assert not missing


@pytest.mark.parametrize("groups", [("conv2",), ("conv1", "fc"), ()])
def test_loading_some_groups_leaves_the_others_alone(saved, groups):
    path, net = saved
    other = network.resnet(1, seed=5)
    before, stored = state(other), state(net)
    weights.load(path, other, "resnet", groups)
    for name, array in state(other).items():
        expected = stored if name.startswith(tuple(f"{group}/" for group in groups)) else before
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
        # A wrong one would be seen; N counts only while statistics are fine-tuned.
        assert name.endswith("/N") or (stored[name] != before[name]).all(), name


@contextlib.contextmanager
def changed(path, mode="a"):
    """The HDF5 file, to be changed into one as it was written before there was a digest."""
    with h5py.File(path, mode) as file:
        file.attrs["sealed"] = False
        yield file


def of_something_else(path):
    with changed(path, "w") as file:
        file["temperature"] = np.arange(3)


def without_a_block(path):
    with changed(path) as file:
        del file["conv3"]


def with_a_block_of_another_shape(path):
    with changed(path) as file:
        del file["fc/W"]
        file["fc/W"] = np.zeros((100, 64), np.float32)


def with_a_foreign_attribute(path):
    with changed(path) as file:
        file.attrs["n"] = "three"


def without_a_mean(path):
    with changed(path) as file:
        del file["mean"]


def of_an_unknown_architecture(path):
    with changed(path) as file:
        file.attrs["architecture"] = "densenet"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.unlink(), "no such file; legal: blocks.h5 of a complete run"),
        (lambda path: (path.unlink(), path.mkdir()), "no such file"),
        (lambda path: path.write_text("conv1, conv2, conv3\n"), "no file of ours"),
        (lambda path: path.write_bytes(b""), "no file of ours"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "no file of ours"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "no file of ours"),
        (of_something_else, "without the attribute 'architecture'"),
        (without_a_block, "cannot read conv3"),
        (with_a_block_of_another_shape, "fc/W: found float32 (100, 64), legal: float32 (10, 64)"),
        (with_a_foreign_attribute, "a foreign attribute"),
        (without_a_mean, "cannot read mean"),
        (of_an_unknown_architecture, "holds 'densenet', which is not registered; legal: plain, re"),
    ],
    ids=["missing", "folder", "text", "empty", "first 1000 bytes", "last byte missing",
         "something else", "block missing", "other shape", "foreign attribute", "no mean",
         "unknown architecture"],
)  # fmt: skip
def test_a_file_that_cannot_be_restored_is_named_in_one_line(saved, spoil, reason):
    path, _ = saved
    spoil(path)
    with pytest.raises(InputError) as error:
        weights.restore(path)
        weights.read_mean(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and reason in message
    assert "\n" not in message


def test_any_flipped_bit_of_a_file_is_noticed(saved):
    path, _ = saved
    for place, content in flips(path):
        path.write_bytes(content)
        with pytest.raises(InputError, match="sha256"):
            weights.restore(path)
        with pytest.raises(InputError, match="sha256"):
            weights.read_mean(path)
        assert path.read_bytes() == content, place


def test_a_file_of_before_there_was_a_digest_is_read(saved):
    path, net = saved
    with changed(path) as file:
        del file.attrs["sealed"]
    assert_same(weights.restore(path)[0], net)
    assert weights.read_mean(path).tobytes() == MEAN.tobytes()


def test_a_file_that_has_lost_its_digest_is_refused(saved):
    path, _ = saved
    with h5py.File(path, "a") as file:
        file.attrs["note"] = "changed by hand"
    with pytest.raises(InputError, match="sha256"):
        weights.describe(path)


def put(name, value=None, **options):
    def change(file):
        del file[name]
        if options:
            file.create_dataset(name, **options)
        else:
            file[name] = value

    return change


def attribute(name, value):
    return lambda file: file.attrs.__setitem__(name, value)


def test_nothing_but_this_networks_own_arrays_is_read(saved, tmp_path):
    """Each change is one that HDF5, h5py or Chainer took without a word, or hung on."""
    path, _ = saved
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["W"] = np.ones((10, 64), np.float32)
    outside = {"shape": (10,), "dtype": np.float32, "external": [("/etc/passwd", 0, 40)]}
    layout = h5py.VirtualLayout((10, 64), np.float32)
    layout[:] = h5py.VirtualSource(str(other), "W", (10, 64))

    def virtual(file):
        del file["fc/W"]
        file.create_virtual_dataset("fc/W", layout)

    cases = [
        (put("fc/W", np.ones(1, np.float32)), "fc/W: found float32 (1,), legal: float32 (10, 64)"),
        (put("fc/W", np.ones((10, 64))), "fc/W: found float64 (10, 64), legal: float32 (10, 64)"),
        (put("fc/b", **outside), "cannot read fc/b, it is no array of this file"),
        (put("fc/W", h5py.ExternalLink(str(other), "W")), "cannot read fc/W, it is not there"),
        (put("fc/W", h5py.SoftLink("/fc/b")), "cannot read fc/W, it is not there"),
        (virtual, "cannot read fc/W, it is no array of this file"),
        (put("conv1/bn/avg_var", np.full(16, -1, np.float32)), "avg_var: found -1.0, legal: from"),
        (put("mean", np.full((3, 32, 32), 1.4e38, np.float32)), "mean: found 1.4e+38..1.4e+38"),
        (put("mean", np.full((3, 32, 32), np.nan, np.float32)), "mean: found nan..nan, legal: 0"),
        (attribute("n", 10**7), "n = 10000000, but cannot read conv"),
        (attribute("n", -1), "n: found '-1', legal: a whole number from 1 up"),
        (attribute("iteration", 1e300), "a foreign attribute iteration"),
        (attribute("classes", 3), "a foreign attribute classes"),
        (attribute("dataset", "a\nb"), "a foreign attribute dataset"),
        (attribute("groups", ["conv1", "conv9"]), "a foreign attribute groups"),
    ]
    whole = path.read_bytes()
    for change, message in cases:
        path.write_bytes(whole)
        with changed(path) as file:
            change(file)
        untouched = network.resnet(1)
        with pytest.raises(InputError) as error:
            weights.load(path, untouched, "resnet")
            weights.read_mean(path)
        assert message in str(error.value) and "\n" not in str(error.value)
        if "mean" not in message:
            assert_same(untouched, network.resnet(1))


@pytest.mark.parametrize(
    ("place", "content", "message"),
    [(16, bytes(16), "a text of no size"), (0, b"GCOL" * 200, "more texts than ours")],
    ids=["no size", "too many"],
)
def test_texts_that_hdf5_never_ends_to_read_are_refused(saved, place, content, message):
    path, _ = saved
    whole = files.read_sealed(path)[0]
    start = whole.index(b"GCOL") + place  # their heap
    path.write_bytes(files.seal(whole[:start] + content + whole[start + len(content) :]))
    with pytest.raises(InputError, match=message):
        weights.describe(path)


@pytest.mark.parametrize(
    ("architecture", "n"), [("resnet", 2), ("plain", 1), ("resresnet", 1), ("plain", 2)]
)
def test_blocks_of_another_network_are_refused_and_change_nothing(saved, architecture, n):
    """Their arrays may well fit: plain and residual networks have the same shapes."""
    path, _ = saved
    other, untouched = (ARCHITECTURES[architecture](n) for _ in range(2))
    with pytest.raises(InputError) as error:
        weights.load(path, other, architecture)
    assert str(error.value) == (
        f"{path}: holds resnet with n = 1; legal here: {architecture} with n = {n}"
    )
    assert_same(other, untouched)


@pytest.mark.parametrize("first", [True, False], ids=["first file", "older file there"])
def test_a_write_that_the_disk_refuses_leaves_what_was_there(tmp_path, first):
    """A limit on the size of files stands for a full disk; HDF5 itself would crash on either."""
    path = tmp_path / "blocks.h5"
    if not first:
        weights.save(path, trained(), describe(), MEAN)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError) as error:
            weights.save(path, network.resnet(2), describe(n=2), MEAN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG
    assert error.value.filename == str(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_saving_replaces_the_older_file(saved):
    path, _ = saved
    net = trained("plain", 2)
    weights.save(path, net, describe("plain", 2), MEAN)
    assert_same(weights.restore(path)[0], net)
    assert [file.name for file in path.parent.iterdir()] == ["blocks.h5"]


def test_weights_of_an_architecture_that_computed_something_else_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "blocks.h5"
    with monkeypatch.context() as patch:
        before = dataclasses.replace(ARCHITECTURES["resresnet"], formula="something else")
        patch.setitem(ARCHITECTURES, "resresnet", before)
        weights.save(path, trained("resresnet", 1), describe("resresnet", 1), MEAN)
    for read in (weights.restore, lambda path: run_folder.has_blocks(path.parent, {})):
        with pytest.raises(InputError, match="holds a resresnet of 'something else', legal: of"):
            read(path)


def test_intact_weights_of_an_architecture_that_is_not_registered_are_not_written_again(saved):
    path, _ = saved
    of_an_unknown_architecture(path)
    with pytest.raises(InputError, match="'densenet', which is not registered; legal: plain"):
        run_folder.has_blocks(path.parent, {})
