"""Our convolutions on tensor cores beside PyTorch's in float64, on a GPU or its stand-in."""

import chainer
import emulation
import numpy as np
import pytest
import torch
from conftest import losses, normal
from emulation import needs_compiler

from resnet import functions, network
from resnet.backends.gpu import cudnn, programs, tensor_cores
from resnet.backends.reference import REFERENCE

TOLERANCES = {"fp32": 2e-6, "tf32": 1e-3, "fp16": 1e-3}
LEAST = {"fp32": 0, "tf32": 1e-5, "fp16": 0}  # else it is not that precision


@pytest.fixture(
    params=[
        pytest.param("emulated", marks=needs_compiler),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def xp(request, monkeypatch):
    """CuPy, or what stands for it."""
    if request.param == "gpu":
        if not functions.count_gpus():
            pytest.skip("there is no GPU")
        yield programs.cupy()
        return
    *_, memory = emulation.install(monkeypatch)
    yield memory
    memory.check()


def by_pytorch(x, w, stride, gy):
    """Output of a convolution and gradients of input and filters, in float64."""
    x, w = (torch.tensor(a.astype(np.float64), requires_grad=True) for a in (x, w))
    y = torch.nn.functional.conv2d(x, w, None, stride, 1)
    y.backward(torch.tensor(gy.astype(np.float64)))
    return [a.detach().numpy() for a in (y, x.grad, w.grad)]


@pytest.mark.parametrize("images", [1, 3, 128])
@pytest.mark.parametrize("precision", cudnn.PRECISIONS)
@pytest.mark.parametrize("kind", programs.TILES, ids=lambda kind: "-".join(map(str, kind)))
def test_they_are_pytorchs(kind, precision, images, xp):
    """Of three images the last tile of two is half empty; of 128 a block has several tiles."""
    if images == 128 and isinstance(xp, emulation.Memory):
        images = 133 if kind.width == 32 and precision == "tf32" else 2  # it takes long
    if kind.channels == (4 if precision == "fp16" else 8):
        pytest.skip("not how this precision has its images")
    side, channels = kind.width * kind.stride, 3 if kind.channels < 16 else kind.channels
    dtype = np.float16 if precision == "fp16" else np.float32
    x = normal(images, channels, side, side).astype(dtype)
    gy = normal(images, kind.filters, kind.width, kind.width, seed=2).astype(dtype)
    w = normal(kind.filters, channels, 3, 3, seed=1) / 8
    shape = images, kind.channels, side, side
    convolution = tensor_cores.find(shape, kind.filters, kind.stride, precision)

    def rows(x, channels):
        padded = xp.empty((*x.shape[:1], *x.shape[2:], channels), dtype)
        padded[...] = 0
        padded[..., : x.shape[1]] = xp.asarray(x.transpose(0, 2, 3, 1))
        return padded

    x_rows, gy_rows, filters = rows(x, kind.channels), rows(gy, kind.filters), xp.asarray(w)
    y, gx, gw = xp.empty_like(gy_rows), xp.empty_like(x_rows), xp.empty_like(filters)
    convolution.forward(x_rows, filters, y)
    convolution.backward_weights(x_rows, gy_rows, gw, 0.5)
    expected = by_pytorch(x, w, kind.stride, gy)
    pairs = [(y.transpose(0, 3, 1, 2), expected[0]), (2 * gw, expected[2])]
    assert convolution.has_backward_data == (kind.channels == kind.filters)
    if convolution.has_backward_data:
        convolution.backward_data(gy_rows, filters, gx)
        pairs.append((gx.transpose(0, 3, 1, 2), expected[1]))
    for found, right in pairs:
        found = np.asarray(chainer.cuda.to_cpu(found), np.float64)
        error = np.linalg.norm(found - right) / np.linalg.norm(right)
        assert LEAST[precision] <= error < TOLERANCES[precision]


@needs_compiler
@pytest.mark.parametrize("precision", cudnn.PRECISIONS)
def test_no_bit_depends_on_the_order_of_threads_and_blocks(precision, monkeypatch):
    module, _, memory = emulation.install(monkeypatch, precision)
    results = []
    for module.reversed in (False, True):
        for kind in programs.TILES:
            if kind.channels == (4 if precision == "fp16" else 8):
                continue
            dtype = np.float16 if precision == "fp16" else np.float32
            side = kind.width * kind.stride
            x = normal(3, side, side, kind.channels).astype(dtype)
            gy = normal(3, kind.width, kind.width, kind.filters, seed=1).astype(dtype)
            w = normal(kind.filters, kind.channels, 3, 3, seed=2)
            convolution = tensor_cores.find(
                (3, kind.channels, side, side), kind.filters, kind.stride, precision
            )
            y, gw = memory.empty(gy.shape, dtype), memory.empty(w.shape)
            convolution.forward(x, w, y)
            convolution.backward_weights(x, gy, gw)
            results.append((y.tobytes(), gw.tobytes()))
    assert results[: len(results) // 2] == results[len(results) // 2 :]


def test_other_convolutions_are_left_to_cudnn(monkeypatch):
    monkeypatch.setattr(cudnn, "compute_capability", lambda: 80)
    monkeypatch.setattr(programs, "shared_memory", lambda: 163 << 10)  # of an A100
    assert tensor_cores.find((2, 16, 32, 32), 16, 1, "tf32")
    for shape, filters, stride in (
        ((2, 16, 32, 16), 16, 1),
        ((2, 16, 64, 64), 16, 1),
        ((2, 24, 32, 32), 24, 1),
        ((2, 16, 31, 31), 32, 2),
        ((2, 8, 32, 32), 16, 1),  # images of float16 alone have 8 channels
    ):
        assert tensor_cores.find(shape, filters, stride, "tf32") is None
    assert tensor_cores.find((2, 64, 8, 8), 64, 1, "tf32")
    monkeypatch.setattr(programs, "shared_memory", lambda: 99 << 10)  # of a GeForce
    assert tensor_cores.find((2, 64, 8, 8), 64, 1, "tf32") is None
    assert tensor_cores.find((2, 16, 32, 32), 16, 1, "tf32")
    monkeypatch.setattr(cudnn, "compute_capability", lambda: 75)
    assert tensor_cores.find((2, 16, 32, 32), 16, 1, "tf32") is None


@needs_compiler
def test_a_layer_whose_channels_are_padded_reads_no_filter_that_is_not_there(monkeypatch):
    """15 channels in memory as 16: the gradient of the 16th is 0."""
    *_, memory = emulation.install(monkeypatch)
    convolution = tensor_cores.find((1, 16, 32, 32), 16, 1, "fp32")
    gy, gx = normal(1, 32, 32, 16), memory.empty((1, 32, 32, 16))
    filters = memory.empty((16, 15, 3, 3))
    filters[...] = normal(16, 15, 3, 3, seed=1)
    convolution.backward_data(gy, filters, gx)
    x = np.zeros((1, 15, 32, 32), np.float32)
    _, expected, _ = by_pytorch(x, filters, 1, gy.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(gx[..., :15].transpose(0, 3, 1, 2), expected, atol=1e-4)
    assert not gx[..., 15].any()


@needs_compiler
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("tf32", 0.02)])
def test_training_steps_are_those_of_chainers_functions(precision, tolerance, monkeypatch):
    """Of a ResNet-8, two steps: its stride-2 gradients come from cuDNN's stand-in."""
    module, frontend, memory = emulation.install(monkeypatch, precision, own=True)
    found = losses(network.resnet(1), 2, 2)
    assert {graph.kind for graph in frontend.graphs} == {"conv_dgrad"}
    assert sum("filter_gradient" in name for name in module.launched) == 2 * 7
    memory.check()
    functions._backend = REFERENCE
    np.testing.assert_allclose(found, losses(network.resnet(1), 2, 2), rtol=tolerance)
