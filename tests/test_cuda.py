"""The CUDA backend without a GPU: its kernels' source on the CPU.

The functions of the door are compared with PyTorch in test_functions.py and test_network.py, for
this backend too, and cuDNN's plans are in test_cudnn.py. Here is what else a GPU adds: the order of
threads, float16, what is missing.
"""

from types import SimpleNamespace

import chainer
import emulation
import numpy as np
import pytest
from chainer import functions as F
from chainer import links as L
from conftest import layer, losses, normal
from emulation import needs_compiler

from resnet import flags, functions, network
from resnet.backends.gpu import cuda, programs
from resnet.backends.reference import REFERENCE
from resnet.batches import Batches, Images
from resnet.command import InputError


@pytest.fixture
def gpu(request, monkeypatch):
    """The backend on NumPy arrays, in the precision that the test asks for."""
    precision = getattr(request, "param", "tf32")
    module, _, memory = emulation.install(monkeypatch, precision)
    yield SimpleNamespace(module=module)
    memory.check()


half_and_float = pytest.mark.parametrize("gpu", ["fp32", "fp16"], indirect=True)


def make_layer(channels=16, channels_in=16):
    """A normalization whose parameters are not 0 or 1, and filters."""
    bn = L.BatchNormalization(channels)
    bn.gamma.array[...] = 1 + normal(channels, seed=1) / 4
    bn.beta.array[...] = normal(channels, seed=2) / 4
    bn.cleargrads()
    return bn, chainer.Parameter(normal(channels, channels_in, 3, 3, seed=3) / 8)


def run_layer(x, shortcut=None, stride=1, channels=16):
    """Output and all gradients of a layer, by name."""
    bn, w = make_layer(channels, x.shape[1])
    variables = [chainer.Variable(a.copy()) for a in (x, shortcut) if a is not None]
    y = layer(variables[0], w, bn, stride, *variables[1:])
    y = REFERENCE.average_pooling(y) if y.dtype == np.float32 else functions.average_pooling(y)
    y.grad = normal(*y.shape, seed=4)
    y.backward()
    found = {"y": y.array, "W": w.grad, "gamma": bn.gamma.grad, "beta": bn.beta.grad}
    found |= {"mean": bn.avg_mean, "var": bn.avg_var}
    return found | {f"input {i}": v.grad for i, v in enumerate(variables)}


def assert_alike(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = np.abs(found[name].astype(float) - value).max() / np.abs(value).max()
        assert error < tolerance, (name, error)


# ---- Kernels -------------------------------------------------------------------------------------


@needs_compiler
@half_and_float
@pytest.mark.parametrize("shortcut", [None, (5, 16, 18, 18), (5, 8, 36, 36)])
def test_no_bit_depends_on_the_order_of_threads_and_blocks(gpu, shortcut):
    """So no thread relies on another that need not have come first, and runs repeat."""
    x = normal(5, 16, 18, 18)  # 7 blocks of a sum in float32, the last one shorter
    shortcut = shortcut and normal(*shortcut, seed=5)
    found = run_layer(x, shortcut)
    gpu.module.reversed = True
    for name, value in run_layer(x, shortcut).items():
        np.testing.assert_array_equal(value, found[name], err_msg=name)
    assert not cuda._arrived().any()


@needs_compiler
@pytest.mark.parametrize(
    ("count", "channels"), [(1, 16), (37, 16), (1300, 16), (700, 64), (90, 256), (50, 24)]
)
@pytest.mark.parametrize("mean", [0, 300])
@half_and_float
def test_moments_of_any_number_of_rows(gpu, count, channels, mean):
    """Also where the mean is large beside the deviation, and where a block has a single row."""
    dtype = functions._backend.dtype
    x = (normal(count, 1, 1, channels) * np.logspace(-1, 1, channels) + mean).astype(dtype)
    gamma, beta = normal(channels, seed=1), normal(channels, seed=2)
    average_mean, average_var = np.ones(channels, "f"), np.full(channels, 2, "f")
    blocks, chunk = cuda._blocks(x, channels)
    assert (blocks - 1) * chunk < count <= blocks * chunk
    xp = programs.cupy()
    parts, stats = xp.empty((blocks, 2, channels)), xp.empty((4, channels))
    programs.launch_on(
        x, "moments", blocks * programs.THREADS, x, count, channels, chunk, parts, cuda._arrived(),
        gamma, beta, 2e-5, 0.9, average_mean, average_var, stats,
    )  # fmt: skip
    rows = x.reshape(count, channels).astype(float)
    expected = rows.mean(axis=0), 1 / np.sqrt(rows.var(axis=0) + 2e-5)
    np.testing.assert_allclose(stats[0], expected[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stats[1], expected[1], rtol=2e-5)
    np.testing.assert_allclose(stats[2], gamma * stats[1], rtol=1e-6)
    error = stats[3] - (beta - stats[0] * stats[2])
    assert np.abs(error).max() < 1e-6 * (1 + np.abs(stats[0] * stats[2]).max())
    unbiased = rows.var(axis=0) * count / max(count - 1, 1)
    np.testing.assert_allclose(average_mean, 0.9 + 0.1 * expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(average_var, 1.8 + 0.1 * unbiased, rtol=2e-5)


@needs_compiler
@pytest.mark.parametrize("iteration", [0, 1, 2, 7, 10**6])
def test_augmentation_is_that_of_the_cpu_bit_for_bit(gpu, dataset, iteration):
    device = chainer.get_device("@numpy")
    mean = dataset.train_x.mean(axis=0, dtype=np.float32) / 255
    images = Images(dataset.train_x, dataset.train_y, mean, device)
    batches = Batches(images, 16, seed=3)
    x, t = batches.batch(iteration)
    xp = programs.cupy()
    found_x, found_t = xp.empty((16, 32, 32, 3)), xp.empty(16, np.int32)
    numbers = 16, *images.x.shape, *batches.draws
    counter = np.full(1, iteration, np.int64)
    images = images.x, images.y, images.mean, batches.orders, counter
    programs.launch("augment", 16 * 1024, *images, found_x, found_t, *numbers)
    np.testing.assert_array_equal(found_x, x.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(found_t, t)


@needs_compiler
def test_a_label_below_0_is_left_out(gpu):
    y, t = normal(6, 10), np.array([3, -1, 0, 9, -1, 5], np.int32)
    results = []
    for function in (functions.softmax_cross_entropy, F.softmax_cross_entropy):
        logits = chainer.Variable(y.copy())
        loss = function(logits, t)
        loss.grad = np.full((), 3, np.float32)
        loss.backward()
        results.append((loss.array, logits.grad))
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@needs_compiler
@half_and_float
def test_a_number_that_is_none_stays_visible(gpu):
    """A diverged network must not look like a working one."""
    x = normal(2, 16, 8, 8)
    x[0, 3, 2, 2] = np.nan
    bn, w = make_layer()
    y = functions.average_pooling(layer(x, w, bn))
    loss = functions.softmax_cross_entropy(functions.linear(y, normal(10, 16), normal(10)),
                                           np.zeros(2, np.int32))  # fmt: skip
    assert np.isnan(loss.array)


# ---- float16 -------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("gpu", ["fp16"], indirect=True)
@pytest.mark.parametrize(
    ("x", "shortcut", "stride"),
    [
        ((4, 16, 8, 8), None, 1),
        ((4, 3, 8, 8), None, 1),
        ((4, 16, 8, 8), (4, 16, 8, 8), 1),
        ((4, 16, 8, 8), (4, 8, 16, 16), 1),
        ((4, 8, 8, 8), None, 2),
    ],
)
def test_layer_in_float16(gpu, x, shortcut, stride):
    """Activations have 11 bits; everything float32, gradients too, has its true size."""
    x, shortcut = normal(*x), shortcut and normal(*shortcut, seed=5)
    found = run_layer(x, shortcut, stride)
    assert all(value.dtype == np.float32 for value in found.values())
    functions._backend = REFERENCE
    assert_alike(found, run_layer(x, shortcut, stride), 0.01)


@needs_compiler
@pytest.mark.parametrize("gpu", ["fp16"], indirect=True)
def test_small_gradients_survive_float16(gpu):
    """Those of the last activations are about 1e-8, less than float16 can tell from 0."""
    h = cuda._images(normal(2, 8, 8, 16).astype(np.float16))
    h = chainer.Variable(h)
    y = functions.average_pooling(h)
    y.grad = np.full(y.shape, 2e-6, np.float32)
    y.backward()
    assert h.grad.dtype == np.float16
    np.testing.assert_allclose(h.grad.astype("f") / cuda.SCALE, 2e-6 / 64, rtol=0.02)


@needs_compiler
@pytest.mark.parametrize("gpu", ["fp16"], indirect=True)
def test_what_chainer_computes_of_float16_activations_has_its_true_gradient(gpu):
    """As in a pre-activated module: a layer normalized, and a layer plus a convolution."""

    def gradients():
        (bn, w), (second, v) = make_layer(), make_layer()
        h = layer(normal(4, 16, 8, 8), w, bn)
        z = functions.relu(functions.normalization(h, second))
        y = functions.average_pooling(h + functions.convolution(z, v))
        y.grad = normal(*y.shape, seed=4)
        y.backward()
        parameters = {"W": w, "V": v, "gamma": second.gamma, "beta": second.beta}
        return {"y": y.array} | {name: p.grad for name, p in parameters.items()}

    found = gradients()
    functions._backend = REFERENCE
    assert_alike(found, gradients(), 0.01)


@needs_compiler
@pytest.mark.parametrize("gpu", ["fp16"], indirect=True)
def test_float16_activations_may_go_on_without_the_pooling(gpu):
    """To the linear layer, or straight to the loss."""

    def gradients(to_logits):
        bn, w = make_layer()
        weights = chainer.Parameter(normal(10, 16 * 16) / 16), chainer.Parameter(normal(10))
        h = layer(normal(4, 16, 4, 4), w, bn)
        y = to_logits(F.reshape(h, (4, -1)), *weights)
        functions.softmax_cross_entropy(y, np.arange(4, dtype=np.int32)).backward()
        return {"W": w.grad} | {str(i): p.grad for i, p in enumerate(weights) if p.grad is not None}

    for to_logits in (functions.linear, lambda h, *_: h[:, :10]):
        backend, found = functions._backend, gradients(to_logits)
        functions._backend = REFERENCE
        assert_alike(found, gradients(to_logits), 0.01)
        functions._backend = backend


# ---- Networks ------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(("gpu", "tolerance"), [("fp32", 1e-5), ("fp16", 0.02)], indirect=["gpu"])
@pytest.mark.parametrize("architecture", ["plain", "resresnet", "resresnet_twice"])
def test_training_steps_are_those_of_chainers_functions(gpu, tolerance, architecture):
    assert not functions._backend.own
    found = losses(network.ARCHITECTURES[architecture](1))
    functions._backend = REFERENCE
    expected = losses(network.ARCHITECTURES[architecture](1))
    np.testing.assert_allclose(found, expected, rtol=tolerance)


@needs_compiler
@pytest.mark.parametrize(("gpu", "tolerance"), [("fp32", 1e-5), ("fp16", 0.02)], indirect=["gpu"])
def test_partial_training_with_a_frozen_and_an_absent_block(gpu, tolerance):
    def train():
        net = network.resnet(1, present=("conv2", "conv3"))
        net.conv1.disable_update()
        net.freeze(["conv3"])
        found = losses(net, 2)
        return found, net.conv2[0].bn1.avg_mean, net.conv3[0].bn1.avg_mean

    found, mean, frozen = train()
    assert not any("im2col" in name for name in gpu.module.launched)
    assert mean.any() and not frozen.any()
    functions._backend = REFERENCE
    expected, *_ = train()
    np.testing.assert_allclose(found, expected, rtol=tolerance)


@needs_compiler
def test_gradients_go_straight_to_their_place_in_the_optimizer(gpu, monkeypatch):
    net = network.resnet(1)
    losses(net, 1)
    x, t = normal(4, 3, 32, 32), np.arange(4, dtype=np.int32)
    net.cleargrads()
    functions.softmax_cross_entropy(net(x), t).backward()
    for name, parameter in net.namedparams():
        assert parameter.grad is parameter.place_of_gradient, name


@needs_compiler
@pytest.mark.parametrize("gpu", ["fp32"], indirect=True)
def test_a_gradient_that_is_added_to_is_not_overwritten(gpu):
    """A link used twice has one place for its gradient, which holds the first one by then."""

    def gradients():
        net = network.resnet(1)
        losses(net, 1)
        net.cleargrads()
        x, t = normal(4, 3, 32, 32), np.arange(4, dtype=np.int32)
        loss = functions.softmax_cross_entropy(net(x), t)
        loss += functions.softmax_cross_entropy(net(x[:, :, ::-1]), t)
        loss.backward()
        loss = functions.softmax_cross_entropy(net(x), t)  # and a third time, on its own
        loss.backward()
        return {name: p.grad.copy() for name, p in net.namedparams()}

    found = gradients()
    functions._backend = REFERENCE
    assert_alike(found, gradients(), 0.01)  # after an update; a lost gradient is off by 1


@needs_compiler
def test_gradients_of_gradients_are_chainers(gpu):
    def penalty():
        bn, w = make_layer()
        x = chainer.Variable(normal(2, 16, 8, 8))
        y = functions.average_pooling(layer(x, w, bn, 1, x))
        y = functions.linear(y, chainer.Parameter(normal(10, 16)), chainer.Parameter(normal(10)))
        t = np.arange(2, dtype=np.int32)
        if functions._backend is REFERENCE:
            loss = F.softmax_cross_entropy(y, t, enable_double_backprop=True)
        else:
            loss = functions.softmax_cross_entropy(y, t)
        (g,) = chainer.grad([loss], [w], enable_double_backprop=True)
        (gg,) = chainer.grad([F.sum(g * g)], [w])
        return gg.array

    found = penalty()
    functions._backend = REFERENCE
    expected = penalty()
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


@needs_compiler
@pytest.mark.parametrize("gpu", ["fp16"], indirect=True)
def test_gradients_of_gradients_are_refused_in_float16(gpu):
    bn, w = make_layer()
    y = F.sum(functions.average_pooling(layer(normal(2, 16, 8, 8), w, bn)))
    with pytest.raises(RuntimeError, match="fp32"):
        chainer.grad([y], [w], enable_double_backprop=True)


@needs_compiler
@half_and_float
def test_what_it_is_not_made_for_goes_to_chainers_own_functions(gpu):
    bn, w = make_layer(6, 16)  # 6 channels are no multiple of 16 bytes
    x = normal(2, 16, 8, 8)
    first = layer(x, make_layer()[1], make_layer()[0])
    launched = len(gpu.module.launched)
    y = layer(first, w, bn)
    assert y.dtype == np.float32 and len(gpu.module.launched) == launched
    expected = F.relu(make_layer(6)[0](F.convolution_2d(first.array.astype("f"), w, pad=1)))
    np.testing.assert_allclose(y.array, expected.array, rtol=1e-4, atol=1e-5)
    w = chainer.Parameter(normal(512, 512, 3, 3) / 50)
    wide = layer(normal(2, 512, 4, 4), w, L.BatchNormalization(512))
    assert wide.dtype == np.float32 and len(gpu.module.launched) == launched


# ---- What is missing -----------------------------------------------------------------------------


def test_without_a_gpu_one_line_says_so(monkeypatch):
    if cuda.count_gpus():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="CuPy") as error:
        functions.use("cuda")
    assert "\n" not in str(error.value)


def test_cuda_without_a_driver_is_no_gpu(monkeypatch):
    """CuPy imports from its wheels anywhere, and raises when it is asked for devices."""

    class CUDARuntimeError(Exception):
        pass

    def count():
        raise CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")

    runtime = SimpleNamespace(CUDARuntimeError=CUDARuntimeError, getDeviceCount=count)
    monkeypatch.setattr(chainer.cuda, "available", True)
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(programs, "cupy", lambda: cupy)
    assert cuda.count_gpus() == 0
    assert flags.find_device(None).name == "@numpy"
    why = "driver new enough for its CUDA .cudaErrorInsufficientDriver: CUDA driver version is"
    with pytest.raises(InputError, match=f"no GPU was found here: CuPy finds no GPU or no {why}"):
        flags.find_device("0")
    with pytest.raises(ValueError, match=why):
        functions.use("cuda")


def test_a_gpu_asked_for_without_cupy_is_answered_by_how_to_install_it(monkeypatch):
    monkeypatch.setattr(chainer.cuda, "available", False)
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--device: found '0', .*: CuPy is missing: pip install"):
        flags.find_device("0")


def test_a_wrong_number_is_answered_by_those_that_there_are(monkeypatch):
    runtime = SimpleNamespace(CUDARuntimeError=RuntimeError, getDeviceCount=lambda: 2)
    monkeypatch.setattr(chainer.cuda, "available", True)
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(programs, "cupy", lambda: cupy)
    with pytest.raises(InputError, match=r"found '2', legal: cpu or a GPU from 0 to 1$"):
        flags.find_device("2")


def test_on_a_gpu_it_computes_where_it_can(monkeypatch):
    monkeypatch.setattr(cuda, "available", lambda: (False, "cuDNN is missing"))
    assert functions.use("auto", gpu=True).endswith("; not --backend cuda: cuDNN is missing")
    assert functions._backend is REFERENCE
    for words in ({"name": "cuda"}, {"precision": "fp16"}):
        with pytest.raises(ValueError, match="cuDNN is missing"):
            functions.use(gpu=True, **words)
    monkeypatch.setattr(cuda, "available", lambda: (True, "cuDNN 9"))
    assert functions.use("auto", gpu=True) == "cuda (cuDNN 9, tf32)"
    assert functions.use("auto", gpu=True, precision="fp32") == "cuda (cuDNN 9, fp32)"
    assert functions.use("tensorcores", gpu=True) == "tensorcores (cuDNN 9, tf32)"
    assert functions.use("cuda", gpu=True, precision="fp16") == "cuda (cuDNN 9, fp16)"
    assert functions.use("cuda", gpu=True) == "cuda (cuDNN 9, tf32)"
    with pytest.raises(ValueError, match="legal: with --device 0"):
        functions.use("cuda")
    with pytest.raises(ValueError, match="legal with a GPU"):
        functions.use("onednn", gpu=True)
    for words in ({"name": "chainer", "gpu": True}, {"name": "auto"}):
        with pytest.raises(ValueError, match="legal: with --backend cuda and tensorcores"):
            functions.use(precision="fp16", **words)
