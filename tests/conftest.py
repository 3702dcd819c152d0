"""What the tests share: a small data set, and runs through the real command line."""

import os
import subprocess
import sys
from pathlib import Path

import resnet.compat  # noqa: F401 the shims come before Chainer

# isort: split
import chainer
import emulation
import numpy as np
import pytest

from resnet import cifar10, functions

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = [(name, "@numpy") for name in ("chainer", "onednn", "winograd", "cuda")]
ON_GPU = [pytest.param((name, "@cupy:0"), marks=pytest.mark.gpu) for name in ("chainer", "cuda")]
# name for functions.use, device; for CUDA without a GPU see emulation.py


@pytest.fixture
def dataset():
    """40 training and 12 test images whose brightness tells their class."""
    rng = np.random.RandomState(0)

    def images(count):
        y = rng.randint(0, 10, count).astype(np.int32)
        noise = rng.randint(0, 40, (count, 3, 32, 32))
        return (y[:, None, None, None] * 20 + noise).astype(np.uint8), y

    names = tuple(f"brightness {i}" for i in range(10))
    arrays = *images(40), *images(12)
    return cifar10.Dataset("tiny", *arrays, names, "made by the tests", cifar10.digest(*arrays))


@pytest.fixture(params=BACKENDS + ON_GPU, ids="-".join)
def backend(request, monkeypatch):
    """Lets each backend in turn compute, where it can run; the device its arrays live on."""
    name, device = request.param
    monkeypatch.setattr(functions, "_backend", functions._backend)  # puts it back afterwards
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
