"""cuDNN itself, without a GPU: it finalizes plans for one that is described to it."""

import ctypes
import json
import subprocess
from types import SimpleNamespace

import chainer
import emulation
import numpy as np
import pytest
from conftest import ROOT, python

from experiments import plans
from resnet import functions, network
from resnet.backends.gpu import cuda, cudnn

SAME = {
    "version": 1, "cudaDeviceId": 0, "driverVer": 13000, "maxGridSize": [2**31 - 1, 65535, 65535],
    "maxBlockSize": [1024, 1024, 64], "regsPerBlock": 65536, "smCountOrigin": 0, "warpSize": 32,
    "maxSharedMemoryPerBlock": 49152, "oversizedSharedMemoryPerBlock": 0,
    "reservedSharedMemoryPerBlock": 1024, "maxRegistersPerSM": 65536, "maxCtasPerSM": 32,
    "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048, "pciDeviceId": 0, "isTccDriver": 0,
    "supportCoopLaunch": 1,
}  # fmt: skip
# From the data sheets, in bytes and kHz.
GPUS = {
    "A100": {"deviceVer": 800, "multiProcessorCount": 108, "maxSharedMemoryPerBlockOptin": 166912,
             "smClockRateKHz": 1410000, "memClockRateKHz": 1593000, "memoryBusWidth": 5120,
             "l2CacheSize": 40 << 20, "totalGlobalMem": 80 << 30},
    "H100": {"deviceVer": 900, "multiProcessorCount": 132, "maxSharedMemoryPerBlockOptin": 232448,
             "smClockRateKHz": 1980000, "memClockRateKHz": 2619000, "memoryBusWidth": 5120,
             "l2CacheSize": 50 << 20, "totalGlobalMem": 80 << 30},
    "H200": {"deviceVer": 900, "multiProcessorCount": 132, "maxSharedMemoryPerBlockOptin": 232448,
             "smClockRateKHz": 1980000, "memClockRateKHz": 3201000, "memoryBusWidth": 6144,
             "l2CacheSize": 60 << 20, "totalGlobalMem": 141 << 30},
}  # fmt: skip
# What cuDNN takes from CUDA's driver when it is loaded; to plan it calls none of it.
DRIVER = """
#define STUB(name) int name() { return 100; }
STUB(cuGetErrorString) STUB(cuModuleGetFunction) STUB(cuModuleLoadData) STUB(cuModuleUnload)
STUB(cuTensorMapEncodeIm2col) STUB(cuTensorMapEncodeTiled)
"""
BATCHES = (1, 8, 16, 32, 64, 100, 128, 500)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """Path of a libcuda.so.1 to be loaded first, or None where the real one is."""
    try:
        ctypes.CDLL("libcuda.so.1")
        return None
    except OSError:
        pass
    if emulation.COMPILER is None:
        pytest.skip("g++ is missing: it makes a stand-in for CUDA's driver")
    folder = tmp_path_factory.mktemp("driver")
    words = [emulation.COMPILER, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1",
             "-x", "c", "-", "-o", str(folder / "libcuda.so.1")]  # fmt: skip
    subprocess.run(words, input=DRIVER, text=True, check=True)
    return str(folder / "libcuda.so.1")


def describe(monkeypatch, gpu):
    """Let the frontend build plans for a GPU that is not here."""
    frontend = cudnn.frontend()
    described = json.dumps({**SAME, **GPUS[gpu], "deviceName": gpu})
    properties = frontend.create_device_properties(described)
    pygraph = frontend.pygraph

    def for_it(handle, **settings):
        return pygraph(device_property=properties, **settings)

    monkeypatch.setattr(frontend, "pygraph", for_it)
    monkeypatch.setattr(cudnn, "handle", lambda: None)
    monkeypatch.setattr(cudnn, "compute_capability", lambda: GPUS[gpu]["deviceVer"] // 10)


@pytest.fixture
def target(monkeypatch, driver):
    """The function ``describe``, where the real cuDNN is installed."""
    try:
        cudnn.frontend()
    except cudnn.Missing as reason:
        pytest.skip(str(reason))
    if cudnn.frontend().backend_version() < 90800:
        pytest.skip(f"cuDNN {cudnn.version()} plans for no absent GPU: pip install -U its package")
    if driver:
        ctypes.CDLL(driver, ctypes.RTLD_GLOBAL)
    return lambda gpu: describe(monkeypatch, gpu)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("precision", cudnn.PRECISIONS)
def test_every_convolution_of_the_networks_has_a_plan(target, gpu, precision):
    target(gpu)
    for batchsize in BATCHES:
        for convolution in plans.convolutions(batchsize, precision):
            for kind in plans.KINDS:
                graph = convolution.build(kind)
                # In each direction some plan leaves the images of a batch where they are.
                assert graph.get_workspace_size() <= cudnn.WORKSPACE
                for uid, shape in convolution.shapes.items():
                    tensor = graph.query_tensor_attributes_of_uid(uid)
                    assert tuple(tensor.get_dim()) == shape and tensor.get_stride()[1] == 1


def test_a_plan_needs_nothing_that_cupy_does_not_bring(target, driver):
    """No libcudart.so, which PyTorch or a toolkit may have and a machine with wheels has not."""
    code = f"""
import ctypes, sys
{driver!r} and ctypes.CDLL({driver!r}, ctypes.RTLD_GLOBAL)
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import resnet.compat, test_plans
from pytest import MonkeyPatch
test_plans.describe(MonkeyPatch(), "H100")
for kind in test_plans.plans.KINDS:
    test_plans.plans.convolutions(128, "tf32")[1].build(kind)
assert "torch" not in sys.modules
assert "libcudart" not in open("/proc/self/maps").read()
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


# ---- Through the stand-ins -----------------------------------------------------------------------


@pytest.mark.parametrize("precision", cudnn.PRECISIONS)
@pytest.mark.skipif(emulation.COMPILER is None, reason="g++ is missing: it compiles the kernels")
def test_the_convolutions_are_those_that_the_networks_ask_for(monkeypatch, precision):
    emulation.install(monkeypatch, precision)
    asked = set()

    def convolution(*arguments):
        asked.add(arguments[:-1])
        return cuda._Convolution(*arguments)

    monkeypatch.setattr(cuda, "_convolution", convolution)
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        for make in network.ARCHITECTURES.values():
            make(1)(np.zeros((1, 3, 32, 32), np.float32))
    listed = plans.convolutions(1, precision)
    assert asked == {(c.shapes[cudnn.X], c.shapes[cudnn.W][0], c.stride, precision) for c in listed}


def test_the_plan_that_is_taken_is_timed_beside_the_fastest(monkeypatch):
    _, frontend, memory = emulation.install(monkeypatch, "tf32")
    frontend.workspaces = [16 << 20, 1 << 20, 0]
    times = iter([9.0, 1.0, 1.0, 1.0, 1.0, 8.0] + [9.0] * 6 + [1.0] * 6 + [0.5] * 6)  # ms
    memory.cuda.Event = lambda: SimpleNamespace(
        record=lambda stream: None, synchronize=lambda: None
    )
    memory.cuda.get_elapsed_time = lambda begin, end: next(times)
    monkeypatch.setattr(chainer.cuda, "cupy", memory)
    convolution = cudnn.Convolution((1, 16, 4, 4), 16, 1, "tf32")
    found = plans.timed(convolution, cudnn.WEIGHTS, every=True)
    assert [(plan["plan"], plan["KiB"], plan["us"]) for plan in found] == [
        ("plan 1", 1024, 50), ("plan 0", 16384, 450), ("plan 1", 1024, 50), ("plan 2", 0, 25)
    ]  # fmt: skip
    row = plans.table([(convolution, cudnn.WEIGHTS, 12.34, found)]).splitlines()[2]
    assert row == ("| 1 x 16 x 4 x 4 | 16 x 16 x 3 x 3 | 1 | tf32 | conv_wgrad "
                   "| 12.3 | plan 1 | 1024 | 50.0 | plan 2 | 0 | 25.0 |")  # fmt: skip


def test_without_a_gpu_one_line_says_so():
    if functions.count_gpus():
        pytest.skip("there is a GPU")
    done = python("experiments/plans.py")
    assert done.returncode == 2 and "no GPU was found here" in done.stderr.splitlines()[-1]
