"""Networks that leave for ONNX and PyTorch, and those that come from there."""

import contextlib
import importlib
import os
import sys

import chainer
import numpy as np
import pytest
import torch
from conftest import python
from test_weights import trained
from torch import nn
from torch.nn import functional as F

from resnet import cifar10, export, extensions, functions, pretrained, synthetic, weights
from resnet.backends.cpu import onednn
from resnet.batches import Images
from resnet.command import InputError
from resnet.network import ARCHITECTURES, resnet

MEAN = np.random.RandomState(5).rand(3, 32, 32).astype(np.float32)
CLASSES = ("Wagen", "鳥", '"', "d", "e", "f", "g", "h", "i", "j")
TIE = 1e-5  # two logits that are closer may change places when sums are rounded otherwise
IMAGES = np.random.RandomState(6).randint(256, size=(7, 3, 32, 32)).astype(np.uint8)


def logits(network, mean, x=IMAGES):
    images = Images(x, np.zeros(len(x), np.int32), mean, chainer.get_device("@numpy"))
    return extensions.predict(network, images)


def save(architecture, folder):
    """A blocks.h5 and the network in it."""
    path, net = folder / "blocks.h5", trained(architecture)
    description = weights.Description(architecture, 1, "CIFAR-10", CLASSES, 0, 3, 99)
    weights.save(path, net, description, MEAN)
    return path, net


@pytest.fixture(params=ARCHITECTURES)
def saved(request, tmp_path):
    return save(request.param, tmp_path)


def test_an_onnx_model_gives_the_same_logits_for_any_number_of_images(saved, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    path, net = saved
    done = python("-m", "resnet.export", path, "--onnx", tmp_path / "net.onnx", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same class for 100.00%") == 1 and "no test images" in done.stdout
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    assert [each.name for each in session.get_inputs()] == ["images"]
    about = session.get_modelmeta().custom_metadata_map
    assert about["trained on"] == "CIFAR-10" and "Wagen" in about["classes"]
    for count in (1, 3, 7):
        (found,) = session.run(None, {"images": IMAGES[:count] / np.float32(255)})
        expected = logits(net, MEAN, IMAGES[:count])
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("backend", ["onednn", "chainer"])
def test_a_network_goes_to_onnx_whatever_computes(backend):
    pytest.importorskip("onnx_chainer")
    functions.use(backend)
    chosen = functions._backend
    description = weights.Description("resnet", 1, "CIFAR-10", CLASSES, 0, 3, 99)
    model = export.to_onnx(resnet(1), description, MEAN)
    assert b"Conv" in model and functions._backend is chosen


def test_a_network_with_one_block_goes_to_onnx_alone(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    net = resnet(1, present=("conv4",))
    description = weights.Description("resnet", 1, "CIFAR-10", CLASSES, 0, 3, 99, net.groups)
    weights.save(tmp_path / "blocks.h5", net, description, MEAN)
    done = python("-m", "resnet.export", "blocks.h5", "--onnx", "net.onnx", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    (found,) = session.run(None, {"images": IMAGES / np.float32(255)})
    np.testing.assert_allclose(found, logits(net, MEAN), atol=1e-4)
    done = python("-m", "resnet.export", "blocks.h5", "--torch", "net.pt", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --torch: blocks.h5 holds conv1, conv4, fc alone; legal: ")
    assert not list(tmp_path.glob("*net.p*"))


@pytest.fixture(scope="module")
def all_images():
    """The 10,000 test images where $CIFAR10_COPY says, else as many that are drawn."""
    if copy := os.environ.get("CIFAR10_COPY"):
        return cifar10.load(copy).test_x
    return synthetic.make(test=10_000)[2]


def check_all_images(path, images, tmp_path, monkeypatch):
    """Export as a user would, use both files as one, and hold them against this project."""
    runtime = pytest.importorskip("onnxruntime")
    model, state = tmp_path / "exported.onnx", tmp_path / "exported.pt"
    done = python("-m", "resnet.export", path, "--onnx", model, "--torch", state)
    assert done.returncode == 0, done.stderr
    session = runtime.InferenceSession(model)
    monkeypatch.delitem(sys.modules, "exported", raising=False)  # of the network before
    monkeypatch.syspath_prepend(tmp_path)
    twin = importlib.import_module("exported").load(state)

    # What resnet.evaluate does, without Winograd's convolutions, which round more.
    functions.use("onednn" if onednn.available()[0] else "chainer")
    path = pretrained.find(path)
    expected = logits(weights.restore(path)[0], weights.read_mean(path), images)
    classes, every = expected.argmax(axis=1), np.arange(len(images))
    assert len(images) == 10_000 and np.ptp(expected, axis=0).min() > 0.5  # not one answer for all

    def of(function):
        parts = (images[i : i + 500] / np.float32(255) for i in range(0, len(images), 500))
        return np.concatenate([function(part) for part in parts])

    with torch.no_grad():
        by_torch = of(lambda x: twin(torch.from_numpy(x)).numpy())
    for found in (by_torch, of(lambda x: session.run(None, {"images": x})[0])):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        lost = expected[every, classes] - expected[every, found.argmax(axis=1)]
        assert lost.max() < TIE  # 0 where the class is the same


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3], ids=resnet.depth)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_test_image_keeps_its_class(architecture, n, all_images, tmp_path, monkeypatch):
    """After 100 iterations: the averages are those of images, and the answers differ."""
    name, _, rectify = architecture.partition("_")
    words = ["--rectify", rectify] if rectify else []
    done = python(f"experiments/{name}.py", *words, "--n", n, "--subset", 5000, "--batchsize", 50,
                  "--epoch", 1, "--warmup", "on", "--out", tmp_path,
                  "--data", os.environ.get("CIFAR10_COPY") or "synthetic")  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tmp_path / f"{architecture}-{resnet.depth(n)}-seed0"
    check_all_images(run, all_images, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", pretrained.names())
def test_every_test_image_keeps_its_class_by_a_network_of_the_package(
    name, all_images, tmp_path, monkeypatch
):
    check_all_images(name, all_images, tmp_path, monkeypatch)


def test_a_module_finds_a_state_dict_whose_name_has_quotes(tmp_path):
    path, net = save("plain", tmp_path)
    state = tmp_path / "a'\".pt"
    source = export.torch_source(weights.describe(path), state)
    module = export.write_torch(state, export.to_torch(net, MEAN), source, lambda *_: None)
    names = {"__file__": str(module)}
    exec(module.read_text(), names)
    assert (names["load"]().mean.numpy() == MEAN).all()


def test_a_file_that_differs_is_not_written(saved, tmp_path, capsys):
    path, net = saved
    content = export.to_torch(net, MEAN)
    content["fc.weight"] = content["fc.weight"] * 1.001

    def compare(what, theirs):
        export.check(what, theirs, lambda x: logits(net, MEAN, x), {"images": IMAGES})

    source = export.torch_source(weights.describe(path), tmp_path / "net.pt")
    with pytest.raises(InputError, match="PyTorch: differs by"):
        export.write_torch(tmp_path / "net.pt", content, source, compare)
    assert not list(tmp_path.glob("*net*"))


def test_a_script_of_the_users_own_is_not_replaced_by_the_module(tmp_path):
    words = ("-m", "resnet.export", "resnet-20", "--torch", "net.pt", "--h5", "net.h5")
    (tmp_path / "net.py").write_text("print('mine')\n")
    done = python(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --torch: ") and "net.py, which no" in line and "legal: " in line
    assert {path.name for path in tmp_path.iterdir()} == {"net.py"}
    assert (tmp_path / "net.py").read_text() == "print('mine')\n"


def test_a_module_of_an_earlier_export_is_replaced(tmp_path):
    path = save("plain", tmp_path)[0]
    (tmp_path / "net.py").write_text(export.torch_source(weights.describe(path), path))
    done = python("-m", "resnet.export", "resnet-20", "--torch", "net.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'Network("resnet", 3, 10)' in (tmp_path / "net.py").read_text()


class Foreign(nn.Module):
    """A ResNet for CIFAR-10 in akamaster's layout, written from its description alone."""

    class Basic(nn.Module):
        def __init__(self, channels_in, channels, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(channels, momentum=0.5)
            self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(channels, momentum=0.5)
            self.stride, self.pad = stride, (channels - channels_in) // 2

        def forward(self, x):
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            s = self.stride
            return F.relu(y + F.pad(x[:, :, ::s, ::s], (0, 0, 0, 0, self.pad, self.pad)))

    def __init__(self, n):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16, momentum=0.5)
        for i, (before, after) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            first = self.Basic(before, after, 1 + (i > 1))
            rest = (self.Basic(after, after, 1) for _ in range(n - 1))
            setattr(self, f"layer{i}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def foreign(n=2):
    """One with the statistics of some images; some channels hardly vary, so epsilon counts."""
    torch.manual_seed(0)
    net = Foreign(n)
    for name, value in net.named_parameters():
        if "bn" in name:
            nn.init.uniform_(value, 0.5, 1.5)
    mean, deviation = (
        torch.tensor(values)[:, None, None]
        for values in (export.FOREIGN_MEAN, export.FOREIGN_DEVIATION)
    )
    x = (torch.as_tensor(IMAGES) / 255 - mean) / deviation
    with torch.no_grad():
        net.conv1.weight[3:6] *= 0.003
        for _ in range(20):
            net(x)
        expected = net.eval()(x).numpy()
    assert net.bn1.running_var.min() < 1e-4
    return net, expected


@pytest.mark.parametrize("wrap", [
    lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "best_prec1": 91.0},
    lambda state: state,
    lambda state: {k: v for k, v in state.items() if "num_batches" not in k},  # of old PyTorch
], ids=["checkpoint", "state dict", "old"])  # fmt: skip
def test_a_foreign_state_dict_becomes_the_same_function(tmp_path, wrap):
    net, expected = foreign()
    torch.save(wrap(net.state_dict()), tmp_path / "resnet14.th")
    network, description, mean = export.from_torch(tmp_path / "resnet14.th")
    assert (description.architecture, description.n) == ("resnet", 2)
    np.testing.assert_allclose(logits(network, mean), expected, rtol=1e-4, atol=1e-5)


def test_a_foreign_state_dict_becomes_blocks_that_go_back_to_pytorch(tmp_path):
    net, expected = foreign(1)
    torch.save(net.state_dict(), tmp_path / "net.th")
    done = python("-m", "resnet.export", "net.th", "--h5", "net.h5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    network, _ = weights.restore(tmp_path / "net.h5")
    mean = weights.read_mean(tmp_path / "net.h5")
    np.testing.assert_allclose(logits(network, mean), expected, rtol=1e-4, atol=1e-5)


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda state: b"no tensors", "not a readable state dict (damaged, not by torch.save, or"),
        (lambda state: b"hi there", "not a readable state dict (damaged, not by torch.save, or of"),
        (lambda state: b"", "not a readable state dict (damaged"),
        (lambda state: {"a": os.getcwd}, "or of more than tensors); legal: "),
        (lambda state: ["a list"], "not a readable state dict"),
        (lambda state: {"fc.weight": torch.zeros(3)}, "found fc.weight .."),
        (lambda state: {"layer1.": torch.zeros(3), "linear.bias": torch.zeros(())}, "found layer1"),
        (
            lambda state: {**state, "bn1.bias": torch.zeros(16, dtype=torch.complex64)},
            "bn1.bias: found complex64, legal: float32",
        ),
        (without("layer2.0.bn1.bias"), "layer2.0.bn1.bias: found nothing, legal: (32,)"),
        (lambda state: {**state, "bn1.bias": torch.zeros(8)}, "bn1.bias: found (8,), legal: (16,)"),
        (lambda state: {**state, "layer2.0.shortcut.0.weight": torch.zeros(8)}, "shortcut"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, spoil, reason):
    content = spoil(foreign(1)[0].state_dict())
    path = tmp_path / "net.th"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError) as error:
        export.from_torch(path)
    assert str(error.value).startswith(f"{path}: ") and reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_state_dict_with_flipped_bits_is_one_line_or_a_network(tmp_path):
    path = tmp_path / "net.th"
    torch.save(foreign(1)[0].state_dict(), path)
    content, rng = path.read_bytes(), np.random.RandomState(0)
    place = content.index(b"data.pkl") + 200
    for _ in range(200):
        found = bytearray(content)
        found[rng.randint(0, place + 5000)] ^= 1 << rng.randint(8)
        path.write_bytes(found)
        with contextlib.suppress(InputError):
            export.from_torch(path)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "nothing to write; legal: --onnx, --torch or --h5"),
        (("--onnx", "net.pb"), 2, "--onnx: found 'net.pb', legal: a name in .onnx"),
        (("--torch", "net.pt"), 1, "'nowhere': no such file"),
    ],
)
def test_bad_input_of_the_export_is_answered_in_one_line(tmp_path, words, code, message):
    done = python("-m", "resnet.export", "nowhere", *words, cwd=tmp_path)
    assert done.returncode == code
    (line,) = done.stderr.splitlines()
    assert message in line and not list(tmp_path.iterdir())
