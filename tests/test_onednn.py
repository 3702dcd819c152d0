"""The CPU backend: threads, forks, rounding, and machines that cannot run it."""

import functools
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import chainer
import numpy as np
import pytest
from chainer import links as L
from conftest import ROOT, layer, python

from resnet import functions, network, record, synthetic
from resnet.backends.cpu import onednn, primitives

pytestmark = pytest.mark.skipif(not onednn.available()[0], reason=onednn.available()[1])

STEPS = """
import hashlib, sys
import numpy as np
from resnet import functions, network
from test_onednn import train

functions.use()
print(hashlib.sha256(train(network.resnet(1), steps=5).tobytes()).hexdigest())
"""


@pytest.fixture(autouse=True)
def fastest(chainers_functions):
    functions.use()


@pytest.fixture(params=["onednn", "winograd"])
def name(request):
    """Of the backend that computes."""
    if not onednn.available(by_tiles=request.param == "winograd")[0]:
        pytest.skip("this processor has no AVX2")
    functions.use(request.param)
    return request.param


def train(net, steps, batchsize=32, rate=0.1):
    """Losses of ``steps`` steps on synthetic images."""
    x, t, _, _ = synthetic.make(batchsize * 4, 10)
    x = x.astype(net.fc.W.dtype) / 255 - 0.5
    optimizer = functions.momentum_sgd(net, 0.9, 1e-4)
    optimizer.lr = rate
    losses = []
    for step in range(steps):
        batch = slice(step % 4 * batchsize, (step % 4 + 1) * batchsize)
        loss = functions.softmax_cross_entropy(net(x[batch]), t[batch])
        net.cleargrads()
        loss.backward()
        optimizer.update()
        losses.append(float(loss.array))
    return np.array(losses)


def child(code, **environment):
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = python("-c", code, PYTHONPATH=path, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_two_processes_compute_the_same_bits():
    assert child(STEPS) == child(STEPS)


@pytest.mark.parametrize("threads", ["1", "2"])
def test_omp_num_threads_is_respected(threads):
    if int(threads) > len(os.sched_getaffinity(0)):
        pytest.skip("this machine has one processor")
    code = STEPS + (
        "import os, numba\n"
        "print(numba.get_num_threads(), functions.use())\n"
        "print(len(os.listdir('/proc/self/task')))"
    )
    *_, backend, tasks = child(code, OMP_NUM_THREADS=threads, OPENBLAS_NUM_THREADS="1").split("\n")
    assert backend.startswith(f"{threads} ") and f"{threads} threads" in backend
    assert int(tasks) == int(threads)  # one pool of workers, oneDNN's and Numba's


@pytest.mark.parametrize("bind", ["true", "close"])
def test_threads_are_bound_to_processors_and_not_counted_by_them(bind):
    """With OMP_PROC_BIND, OpenMP leaves the first thread one processor."""
    code = "from resnet import functions\nprint(functions.use('onednn'))"
    here = f" {len(os.sched_getaffinity(0))} threads"
    assert here in child(code, OMP_PROC_BIND=bind, OMP_NUM_THREADS="")


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, 8),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"OMP_NUM_THREADS": " +2 "}, 2),
        ({"OMP_NUM_THREADS": "1000"}, 8),
        ({"OMP_NUM_THREADS": "4", "OMP_THREAD_LIMIT": "3"}, 3),
        ({"OMP_NUM_THREADS": "4", "NUMBA_NUM_THREADS": "1"}, 1),
        *(({"OMP_NUM_THREADS": illegal}, 8) for illegal in ("0", "-1", "1.5", "two", "\u00b2")),
    ],
)
def test_as_many_threads_are_told_of_as_will_compute(environment, threads, monkeypatch):
    """OpenMP has 8 processors here, and leaves out of account what it refuses."""
    monkeypatch.setattr(record, "PROCESSORS", set(range(8)))
    config = onednn.kernels.numba.config
    most = int(environment.get("NUMBA_NUM_THREADS", 8))
    monkeypatch.setattr(config, "NUMBA_NUM_THREADS", most)
    monkeypatch.setattr(record, "quota", lambda: None)
    for name in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert onednn.threads() == threads


@pytest.mark.parametrize(("wanted", "threads"), [("", 3), ("6", 6)])
def test_a_container_computes_with_its_share_unless_told_otherwise(wanted, threads, monkeypatch):
    monkeypatch.setattr(record, "PROCESSORS", set(range(8)))
    monkeypatch.setattr(onednn.kernels.numba.config, "NUMBA_NUM_THREADS", 8)
    monkeypatch.setattr(record, "quota", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert onednn.threads() == threads


@pytest.mark.parametrize("setting", ["NUMBA_DISABLE_JIT=1", "NUMBA_NUM_THREADS=0"])
def test_where_numba_may_not_compile_chainers_functions_compute_and_the_setting_is_named(setting):
    name, value = setting.split("=")
    line = child("from resnet import functions\nprint(functions.use())", **{name: value})
    assert line.startswith("chainer (") and f"Numba does not work here with {setting}" in line


def test_a_threading_layer_that_is_not_there_is_named():
    done = python("experiments/resnet.py", "--data", "synthetic", NUMBA_THREADING_LAYER="nobody")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "NUMBA_THREADING_LAYER: found 'nobody'" in done.stderr and "legal: omp" in done.stderr


def test_where_nothing_can_be_kept_it_computes_and_says_so(tmp_path):
    """As in a home that compute nodes may only read, or a container; root may write anywhere."""
    package = shutil.copytree(
        ROOT / "resnet", tmp_path / "resnet", ignore=shutil.ignore_patterns("__pycache__")
    )
    (package / "backends/cpu/__pycache__").touch()
    (tmp_path / "tmp").mkdir()
    code = (
        "import os, tempfile, resnet.functions as f\n"
        "print(f.use('onednn'), f.first_start(), os.listdir(tempfile.gettempdir()))"
    )
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "NUMBA_CACHE_DIR": ""}
    done = python("-c", code, cwd=tmp_path, PYTHONPATH="", TMPDIR=str(tmp_path / "tmp"), **nowhere)
    assert done.returncode == 0, done.stderr
    assert "NUMBA_CACHE_DIR=FOLDER" in done.stdout and "['kernels-" in done.stdout
    assert not os.listdir(tmp_path / "tmp")


FORK = """
import multiprocessing

def work(queue):
    queue.put((functions.use(), train(network.resnet(1), steps=2)))

context = multiprocessing.get_context("fork")
queue = context.Queue()
process = context.Process(target=work, args=(queue,))
process.start()
line, found = queue.get(timeout=120)
process.join()
print(abs(found / train(network.resnet(1), steps=2) - 1).max() < 1e-3, line)
"""


def test_a_forked_process_computes_with_chainers_functions_and_says_so():
    """GNU OpenMP hangs in a child of a process that has used it."""
    line = child(STEPS + FORK).split("\n")[-1]
    assert line.startswith("True chainer (") and "does not survive a fork" in line


@functools.cache
def chainers_losses(n, steps, double=False, **choices):
    """Of a training by Chainer's own functions, in double precision if wanted."""
    functions.use("chainer")
    net = network.resnet(n)
    if double:
        for parameter in net.params():
            parameter.array = parameter.array.astype(np.float64)
        for link in net.links():
            if isinstance(link, L.BatchNormalization):
                link.avg_mean = link.avg_mean.astype(np.float64)
                link.avg_var = link.avg_var.astype(np.float64)
    return train(net, steps, **choices)


def test_training_follows_double_precision_as_closely_as_chainers_own_functions(name):
    """Over 20 steps; beyond, rounding errors grow exponentially whatever computes."""
    ours = train(network.resnet(2), 20, rate=0.01)
    reference = chainers_losses(2, 20, double=True, rate=0.01)
    stock = abs(chainers_losses(2, 20, rate=0.01) / reference - 1)
    ours = abs(ours / reference - 1)
    assert ours[0] < 1e-6
    assert ours.mean() < 5 * stock.mean() < 0.01


@pytest.mark.slow
def test_200_steps_reach_the_loss_of_chainers_own_functions(name):
    ours = train(network.resnet(1), 200, batchsize=16)
    stock = chainers_losses(1, 200, batchsize=16)
    assert stock[-40:].mean() < 0.3 * stock[:4].mean()
    assert ours[-40:].mean() < 0.3 * ours[:4].mean()


def test_what_it_is_not_made_for_goes_to_chainers_own_functions():
    x = np.random.RandomState(0).rand(2, 3, 8, 8)
    w3, w5 = (np.random.RandomState(1).rand(4, 3, k, k) for k in (3, 5))
    bn = chainer.links.BatchNormalization(4, dtype=np.float64)
    assert layer(x, w3, bn).array.dtype == np.float64
    bn = chainer.links.BatchNormalization(4)
    y = layer(x.astype("f"), w5.astype("f"), bn)
    h = chainer.functions.convolution_2d(x.astype("f"), w5.astype("f"), pad=1)
    np.testing.assert_array_equal(y.array, chainer.functions.relu(bn(h)).array)


@pytest.mark.parametrize("name", ["onednn", "winograd"])
@pytest.mark.parametrize("missing", ["library", "numba"])
def test_without_its_libraries_one_line_says_so(monkeypatch, missing, name):
    if missing == "library":

        def absent():
            raise primitives.Missing("oneDNN is missing: pip install onednn-cpu-gomp")

        monkeypatch.setattr(primitives, "version", absent)
    else:
        monkeypatch.setattr(onednn, "kernels", None)
    line = functions.use("auto")
    assert line.startswith("chainer (") and "pip install" in line and "\n" not in line
    with pytest.raises(ValueError, match="pip install"):
        functions.use(name)


@pytest.mark.parametrize("architecture", ["plain", "resnet", "resresnet", "resresnet_twice"])
@pytest.mark.parametrize("n", [1, 3])
def test_no_layer_of_the_reports_networks_is_left_to_chainers_functions(
    name, architecture, n, monkeypatch
):
    """They are right, but a network of which one layer in six is theirs takes 1.4 times as long.

    Nor is what a layer reads made in a pass of its own, but for the head.
    """
    passes, finish = [], onednn.kernels.finish
    monkeypatch.setattr(onednn.kernels, "finish", lambda *a: passes.append(finish(*a)))
    monkeypatch.setattr(onednn.OneDNN, "one_by_one", None)
    net = network.ARCHITECTURES[architecture](n)
    x, t = np.ones((2, 3, 32, 32), np.float32), np.zeros(2, np.int32)
    functions.softmax_cross_entropy(net(x), t).backward()
    assert all(parameter.grad is not None for parameter in net.params())
    # Each block's sum that is rectified by itself is one, too.
    assert len(passes) == (4 if architecture == "resresnet_twice" else 1)


def test_threads_of_python_compute_what_one_does(name):
    """They share the memory that the kernels work in."""
    functions.use(name)
    x = np.random.RandomState(0).standard_normal((6, 3, 16, 16)).astype(np.float32)

    def train(seed):
        net = network.resnet(1, seed=seed)
        net.cleargrads()
        for _ in range(5):
            y = net(x)
            chainer.functions.sum(y * y).backward()
        return [y.array, *(parameter.grad for _, parameter in sorted(net.namedparams()))]

    expected = [train(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as threads:
        for found, right in zip(threads.map(train, range(3)), expected, strict=True):
            for a, b in zip(found, right, strict=True):
                np.testing.assert_array_equal(a, b)
