"""The first ten iterations of every architecture, as they were when ``pinned.json`` was made.

What only takes another form computes the same bits. ``python tests/test_pinned.py`` pins anew: that
is right only in a change that is meant to change what is computed, and says so.
"""

import json
import pickle
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from conftest import python

from resnet import record
from resnet.backends.cpu import onednn

PINNED = Path(__file__).with_name("pinned.json")
# At the rate of 0.01, or less: at 0.1 rounding is amplified from one iteration to the next.
WHOLE = "--epoch", 8, "--drops", 0, 4
STAGE = "partial_training", "--order", "top-down", "--freeze", "--epoch", 16, "--warmup", "on"
EXPERIMENTS = {  # a run folder, and the words that make it; ten iterations each
    "plain-14-seed0": ("plain", *WHOLE),
    "resnet-14-seed0": ("resnet", *WHOLE),
    "resresnet-14-seed0": ("resresnet", *WHOLE),
    "resresnet_twice-14-seed0": ("resresnet", "--rectify", "twice", *WHOLE),
    "top_down-14-freeze-seed0/stage1": (*STAGE, "--stage", 1),  # two blocks are absent
    "top_down-14-freeze-seed0/stage2": (*STAGE, "--stage", 2),  # one is, and one is frozen
}
NUMBERS = ("iteration", "lr", "main/loss", "main/accuracy", "test/main/loss", "test/main/accuracy")
# Elsewhere, of a loss: Chainer's own functions, which round in another way, are off by up to 9.5e-4
# after 3 iterations and 4.4e-2 after 10 (of the plain network; of the others up to 8e-3).
EARLY, LATE = 2e-3, 0.1

pytestmark = pytest.mark.skipif(not onednn.available()[0], reason=onednn.available()[1])


def write_images(folder):
    """20 training and 10 test images as CIFAR-10 keeps them; their brightness tells the class."""
    rng = np.random.RandomState(0)
    folder.mkdir()
    for name, count in {**{f"data_batch_{i}": 4 for i in range(1, 6)}, "test_batch": 10}.items():
        labels = rng.randint(0, 10, count)
        images = labels[:, None] * 20 + rng.randint(0, 40, (count, 3072))
        batch = {"data": images.astype(np.uint8), "labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))


def train(out):
    """What the logs say, ``NUMBERS`` of each entry; a batch of 16 reaches over a pass's end."""
    write_images(out / "images")
    logs = {}
    for folder, (name, *words) in EXPERIMENTS.items():
        done = python(f"experiments/{name}.py", *words, "--n", 2, "--batchsize", 16, "--device",
                      "cpu", "--data", out / "images", "--backend", "onednn", "--out", out,
                      OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # fmt: skip
        assert done.returncode == 0, done.stderr
        log = json.loads((out / folder / "log").read_text())
        logs[folder] = [[entry[key] for key in NUMBERS] for entry in log]
    return logs


def here():
    """What the last bits depend on."""
    cpu = Path("/proc/cpuinfo").read_text()
    _, _, flags = next(line for line in cpu.splitlines() if line.startswith("flags")).partition(":")
    return {
        "processor": record.processor(),
        "vectors": sorted(flag for flag in flags.split() if flag.startswith(("avx", "fma", "amx"))),
        **{name: version(name) for name in ("numpy", "numba", "llvmlite", "onednn-cpu-gomp")},
    }


def test_the_first_iterations_are_those_that_were_pinned(tmp_path):
    pinned = json.loads(PINNED.read_text())
    found = train(tmp_path)
    if pinned["made by"] == here():
        assert found == pinned["logs"]
    assert found.keys() == pinned["logs"].keys()
    for folder, log in found.items():
        for entry, expected in zip(log, pinned["logs"][folder], strict=True):
            assert entry[:2] == expected[:2], folder  # iteration and rate
            tolerance = EARLY if entry[0] <= 3 else LATE
            losses = entry[2], entry[4]
            assert losses == pytest.approx((expected[2], expected[4]), rel=tolerance), folder


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        logs = train(Path(folder))
    pins = {"made by": here(), "numbers": NUMBERS, "logs": logs}
    PINNED.write_text(json.dumps(pins, indent=1) + "\n")
