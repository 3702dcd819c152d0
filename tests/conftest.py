"""What the tests share: a small data set, and runs through the real command line."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import resnet.compat  # noqa: F401 the shims come before Chainer

# isort: split
import chainer
import emulation
import h5py
import numpy as np
import pytest

from resnet import cifar10, flags, functions, run_folder, stopping, training

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = [(name, "@numpy") for name in ("chainer", "onednn", "winograd", "cuda")]
ON_GPU = [pytest.param((name, "@cupy:0"), marks=pytest.mark.gpu) for name in ("chainer", "cuda")]
# name for functions.use, device; for CUDA without a GPU see emulation.py


@pytest.fixture(scope="session")
def dataset():
    """40 training and 12 test images whose brightness tells their class."""
    rng = np.random.RandomState(0)

    def images(count):
        y = rng.randint(0, 10, count).astype(np.int32)
        noise = rng.randint(0, 40, (count, 3, 32, 32))
        return (y[:, None, None, None] * 20 + noise).astype(np.uint8), y

    names = tuple(f"brightness {i}" for i in range(10))
    arrays = *images(40), *images(12)
    for array in arrays:
        array.flags.writeable = False  # all tests share them
    return cifar10.Dataset("tiny", *arrays, names, "made by the tests", cifar10.digest(*arrays))


@pytest.fixture(autouse=True)
def chainers_functions(monkeypatch):
    """Chainer's own functions compute, until a test chooses others; its choice ends with it."""
    monkeypatch.setattr(functions, "_backend", functions.REFERENCE)


@pytest.fixture(params=BACKENDS + ON_GPU, ids="-".join)
def backend(request, monkeypatch):
    """Lets each backend in turn compute, where it can run; the device its arrays live on."""
    name, device = request.param
    if (name, device) == ("cuda", "@numpy"):
        if emulation.COMPILER is None:
            pytest.skip("g++ is missing: it compiles the CUDA kernels for the CPU")
        *_, memory = emulation.install(monkeypatch, "fp32")
        yield chainer.get_device(device)
        memory.check()
        return
    if device != "@numpy" and not functions.count_gpus():
        pytest.skip("there is no GPU")
    try:
        functions.use(name, device != "@numpy", "fp32" if name == "cuda" else None)
    except ValueError as reason:
        pytest.skip(str(reason))
    device = chainer.get_device(device)
    device.use()
    yield device


def layer(x, W, bn, stride=1, shortcut=None):
    """``relu(BN(convolution(x, W)) + A(shortcut))``, said as a module says it."""
    y = functions.normalization(functions.convolution(x, W, stride=stride), bn)
    if shortcut is None:
        return functions.relu(y)
    step = -(-shortcut.shape[2] // y.shape[2])
    return functions.relu(y + functions.option_a(shortcut, y.shape[1], step))


def normal(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def losses(net, steps=3, batchsize=8):
    """Of so many steps on one batch."""
    optimizer = functions.momentum_sgd(net, 0.9, 1e-4)
    optimizer.lr = 0.05
    x, t = normal(batchsize, 3, 32, 32), np.arange(batchsize, dtype=np.int32) % 10
    found = []
    for _ in range(steps):
        loss = functions.softmax_cross_entropy(net(x), t)
        net.cleargrads()
        loss.backward()
        optimizer.update()
        found.append(float(loss.array))
    return found


def python(*words, cwd=ROOT, **environment):
    """Run ``python *words`` as a user would; returns the finished process with its text output."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def make_run(dataset, out, *words, n=1):
    args = flags.add_schedule(flags.parser("")).parse_args(
        ["--n", str(n), "-b", "16", "-e", "3", "--out", str(out), *words]
    )
    backend = functions.use("chainer")
    setting = training.Setting(args, dataset, "test", chainer.get_device("@numpy"), backend)
    return training.whole_network("resnet", n, args.seed, setting)


@pytest.fixture(scope="session")
def trained(dataset, tmp_path_factory):
    """The ``--out`` of a complete run, trained once."""
    out = tmp_path_factory.mktemp("trained")
    make_run(dataset, out).train()
    return out


@pytest.fixture
def finished(trained, dataset, tmp_path):
    """A complete run, which the test may change."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return make_run(dataset, tmp_path)


def read_log(folder):
    """The log without its times."""
    log = json.loads((folder / "log").read_text())
    for entry in log:
        assert entry.pop("elapsed_time") > 0
    return log


def read_blocks(folder):
    arrays = {}
    with h5py.File(folder / "blocks.h5") as file:
        file.visititems(
            lambda name, item: arrays.update({name: item[()]}) if hasattr(item, "shape") else None
        )
    return arrays


def stop_after(monkeypatch, iteration, number=signal.SIGTERM):
    """Send this process a signal during the given iteration, and more while it stops."""
    update, save = training.Updater.update, run_folder.Snapshots.save

    def interrupted(updater):
        update(updater)
        if updater.iteration == iteration:
            os.kill(os.getpid(), number)

    def interrupted_again(snapshots, trainer):
        if trainer.updater.iteration == iteration:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
        return save(snapshots, trainer)

    monkeypatch.setattr(training.Updater, "update", interrupted)
    monkeypatch.setattr(run_folder.Snapshots, "save", interrupted_again)


@pytest.fixture
def handlers():
    """Give the signals of a run that has left by ``sys.exit`` their handlers back."""
    before = {n: signal.getsignal(n) for n in stopping.StopRequest.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupted_run(dataset, out, monkeypatch, iteration=5):
    """A run with a snapshot after every iteration, stopped after ``iteration``."""
    run = make_run(dataset, out, "--snapshot-interval", "0")
    with monkeypatch.context() as patch, pytest.raises(SystemExit), run.setting.request:
        stop_after(patch, iteration)
        run.train()
    return make_run(dataset, out, "--snapshot-interval", "0")


def deny(monkeypatch, denied):
    """Let the system refuse to read a file; root may read whatever its mode is."""
    read = Path.read_bytes

    def refused(path):
        if path == denied:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)


def flips(path, count=200):
    """The content of a file with one bit flipped, at ``count`` places of all of it."""
    content = path.read_bytes()
    rng = random.Random(len(content))
    for _ in range(count):
        place = rng.randrange(len(content))
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        yield place, bytes(changed)
