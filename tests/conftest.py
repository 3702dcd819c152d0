"""What the tests share: a small data set, and runs through the real command line."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from resnet import cifar10

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def dataset():
    """40 training and 12 test images whose brightness tells their class."""
    rng = np.random.RandomState(0)

    def images(count):
        y = rng.randint(0, 10, count).astype(np.int32)
        noise = rng.randint(0, 40, (count, 3, 32, 32))
        return (y[:, None, None, None] * 20 + noise).astype(np.uint8), y

    names = tuple(f"brightness {i}" for i in range(10))
    return cifar10.Dataset("tiny", *images(40), *images(12), names, "made by the tests")


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
