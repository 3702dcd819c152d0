"""Winograd's convolution: its rounding, and the code that is made for a processor."""

import re

import chainer
import numpy as np
import pytest
import torch
from conftest import python
from llvmlite import ir

from resnet import functions
from resnet.backends.cpu import onednn, transforms, vectors, winograd

pytestmark = pytest.mark.skipif(
    not onednn.available(by_tiles=True)[0], reason=onednn.available(by_tiles=True)[1]
)
PROCESSORS = {  # name of the registers, LLVM's name and features
    "ymm": ("haswell", "+avx,+avx2,+fma"),
    "zmm": ("skylake-avx512", "+avx,+avx2,+fma,+avx512f,+avx512vl,+avx512bw,+avx512dq"),
}
SHAPES = [  # channels, filters, side, stride
    *((c, c, side, 1) for c, side in [(16, 32), (32, 16), (64, 8), (64, 4), (32, 12), (8, 20)]),
    *((c, 2 * c, side, 2) for c, side in [(16, 32), (32, 16), (64, 8), (8, 24)]),
    (64, 16, 8, 1),
    (64, 16, 16, 2),
]


def rows(x):
    """(N, H, W, C) as the kernels take it."""
    return x.reshape(onednn._row_shape(x.transpose(0, 3, 1, 2).shape))


def gradients(convolution, x, g, w, gx, adds=False):
    """Those of the filters; gx is written."""
    gw, nothing = np.empty_like(w), (np.empty((0, 0), "f"), np.empty((0, 0, 0), "f"))
    as_it_is = np.repeat(np.array([[1], [0], [0]], "f"), rows(g).shape[2], axis=1)
    convolution.gradients(rows(g), rows(g), as_it_is, rows(x), *nothing, w, gw, rows(gx), adds=adds)
    return gw


@pytest.mark.parametrize(("channels", "filters", "side", "stride"), SHAPES)
def test_rounding_is_a_few_times_that_of_a_direct_convolution(channels, filters, side, stride):
    """Norm of the error, relative: of the output and of both gradients, against float64."""
    if not winograd.fits((5, channels, side, side), filters, stride):
        pytest.skip(f"{channels} and {filters} channels do not fill vectors of {vectors.name()}")
    rng = np.random.default_rng(channels + side)
    x = rng.standard_normal((5, side, side, channels)).astype("f")
    g = rng.standard_normal((5, side // stride, side // stride, filters)).astype("f")
    w = rng.standard_normal((filters, channels, 3, 3)).astype("f")
    convolution = winograd.Convolution((5, channels, side, side), filters, stride, threads=2)
    y, gx = np.empty_like(g), np.empty_like(x)
    none, no_rows = np.empty((0, 0), "f"), np.empty((0, 0, 0), "f")
    convolution.convolve(rows(x), none, no_rows, no_rows, w, rows(y))
    gw = gradients(convolution, x, g, w, gx)
    tensors = [torch.tensor(a).double().requires_grad_() for a in (x.transpose(0, 3, 1, 2), w)]
    expected = torch.conv2d(*tensors, stride=stride, padding=1)
    expected.backward(torch.tensor(g.transpose(0, 3, 1, 2)).double())
    found = y.transpose(0, 3, 1, 2), gx.transpose(0, 3, 1, 2), gw
    for ours, exact in zip(found, (expected, *(t.grad for t in tensors)), strict=True):
        exact = exact.detach().numpy()
        assert np.linalg.norm(ours - exact) < 2e-6 * np.linalg.norm(exact)


@pytest.mark.parametrize(("channels", "side", "stride"), [(16, 32, 1), (32, 16, 1), (32, 16, 2)])
def test_rounding_of_the_filters_gradient_over_many_images_of_what_a_relu_leaves(
    channels, side, stride
):
    """The mean of what is positive goes through all points, and cancels in sums over tiles."""
    rng = np.random.default_rng(channels + stride)
    small, filters = side // stride, channels * stride
    x = np.maximum(rng.standard_normal((64, side, side, channels)), 0).astype("f")
    g = rng.standard_normal((64, small, small, filters)).astype("f")
    w = rng.standard_normal((filters, channels, 3, 3)).astype("f")
    convolution = winograd.Convolution((64, channels, side, side), filters, stride, threads=2)
    found = gradients(convolution, x, g, w, np.empty_like(x))
    weight = torch.tensor(w).double().requires_grad_()
    images, gy = (torch.tensor(a.transpose(0, 3, 1, 2)).double() for a in (x, g))
    torch.conv2d(images, weight, stride=stride, padding=1).backward(gy)
    exact = weight.grad.numpy()
    assert np.linalg.norm(found - exact) < 4e-6 * np.linalg.norm(exact)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_are_added_to_what_is_there(stride):
    rng = np.random.default_rng(0)
    x, before = (rng.standard_normal((3, 8, 8, 64)).astype("f") for _ in range(2))
    g = rng.standard_normal((3, 8 // stride, 8 // stride, 64)).astype("f")
    w = rng.standard_normal((64, 64, 3, 3)).astype("f")
    convolution = winograd.Convolution((3, 64, 8, 8), 64, stride, threads=2)
    results = [before.copy(), before.copy()]
    for adds, gx in enumerate(results):
        gradients(convolution, x, g, w, gx, bool(adds))
    np.testing.assert_allclose(results[1], results[0] + before, rtol=1e-5, atol=1e-5)


def test_the_filters_have_the_same_gradient_whether_the_images_have_one_or_not():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 64, 8, 8)).astype("f")
    weight = chainer.Parameter(rng.standard_normal((64, 64, 3, 3)).astype("f"))
    functions.use("winograd")
    found = []
    for images in (x, chainer.Variable(x)):
        y = functions.finished(functions.convolution(images, weight, stride=2))
        y.grad = np.ones_like(y.array)
        weight.cleargrad()
        y.backward()
        found.append(weight.grad)
    np.testing.assert_array_equal(*found)


def test_other_shapes_are_left_to_a_direct_convolution():
    for shape, filters, stride in [
        ((5, 3, 32, 32), 16, 1),  # channels fill no vector
        ((5, 16, 32, 32), 24 if vectors.lanes() == 16 else 12, 1),
        ((5, 16, 30, 30), 16, 1),  # no tiles of four
        ((5, 16, 12, 12), 16, 2),  # of eight
        ((5, 16, 32, 16), 16, 1),
        ((5, 16, 32, 32), 16, 4),
    ]:
        assert not winograd.fits(shape, filters, stride)


def assembly(register, build):
    name, features = PROCESSORS[register]
    module = ir.Module()
    build(module, vectors.lanes(features))
    machine = vectors.target(name, features)
    return machine.emit_assembly(vectors.optimized(module, machine))


@pytest.mark.parametrize("register", PROCESSORS)
@pytest.mark.parametrize("channels", [16, 32, 64])
def test_products_keep_their_sums_in_registers_and_fuse_multiplication_and_addition(
    register, channels
):
    def product(module, lanes):
        code = vectors.Code(module, "product", lanes, pointers=3)
        steps = winograd.Steps(code, points=6, across=2)
        a, b, out, count = code.function.args
        steps.product(a, channels, 1, b, out, steps.tiles, count, channels, adds=True)
        code.builder.ret_void()

    text = assembly(register, product)
    fused = re.findall(rf"vfmadd\d+ps.*%{register}", text)
    assert len(fused) >= 4 * min(2, channels // 8)
    assert not re.findall(rf"(%{register}\d+, .*\(%r[sb]p|\(%r[sb]p.*, %{register})", text)
    assert not re.findall(rf"v(mul|add)ps.*%{register}", text)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("register", PROCESSORS)
def test_the_transforms_use_the_widest_vectors(register, stride):
    x, y = winograd.Images(32, 16, 4 * stride), winograd.Images(64, 16 // stride, 4)
    form = transforms.FORMS[stride]

    def whole(module, lanes):
        code = vectors.Code(module, "forward", lanes, pointers=4, ahead=3)
        winograd.forward(code, form, x, y)

    text = assembly(register, whole)
    counts = {
        name: len(re.findall(rf"v(?:fn?m|add|sub)\w*ps.*%{name}", text)) for name in PROCESSORS
    }
    others = sum(counts.values()) - counts[register]
    assert counts[register] > 100 > 10 * others


def test_a_processor_without_avx2_computes_directly_and_one_line_says_so():
    code = "from resnet import functions; print(functions.use()); functions.use('winograd')"
    done = python("-c", code, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="+sse4.2")
    assert done.stdout.startswith("onednn (") and "no AVX2" in done.stdout
    assert "ValueError: needs a processor with AVX2 or AVX-512" in done.stderr


def test_three_starts_end_alike_with_and_without_it():
    """A difference of 1e-6 at the start grows; that of the rounding is no larger."""
    from test_onednn import train

    from resnet import network

    ends = {}
    for backend in ("onednn", "winograd"):
        functions.use(backend)
        ends[backend] = []
        for start in range(3):
            net = network.resnet(1)
            net.conv1.conv.W.array += np.float32(1e-6 * start)
            ends[backend].append(train(net, 60, batchsize=16)[-20:].mean())
    direct, tiles = map(np.array, ends.values())
    spread = max(np.ptp(direct), np.ptp(tiles))
    assert abs(direct.mean() - tiles.mean()) < 2 * spread + 1e-3
