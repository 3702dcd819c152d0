"""Winograd's convolution: the algebra, its rounding, and the code that is made for a processor."""

import re

import numpy as np
import pytest
import torch
from conftest import python
from llvmlite import ir

from resnet import functions
from resnet.backends.cpu import onednn, vectors, winograd

pytestmark = pytest.mark.skipif(
    not onednn.available(by_tiles=True)[0], reason=onednn.available(by_tiles=True)[1]
)
PROCESSORS = {  # name of the registers, LLVM's name and features
    "ymm": ("haswell", "+avx,+avx2,+fma"),
    "zmm": ("skylake-avx512", "+avx,+avx2,+fma,+avx512f,+avx512vl,+avx512bw,+avx512dq"),
}
SHAPES = [(16, 32), (32, 16), (64, 8), (64, 4), (32, 12), (8, 20)]


def test_the_transforms_are_those_of_a_correlation():
    """A^T [(G g) * (B^T d)] has the four values of a filter of three over six inputs."""
    rng = np.random.default_rng(0)
    d, g = rng.standard_normal(6), rng.standard_normal(3)
    y = winograd.A.T @ ((winograd.G @ g) * (winograd.BT @ d))
    np.testing.assert_allclose(y, np.correlate(d, g, "valid"), rtol=1e-12)


def rows(x):
    """(N, H, W, C) as the kernels take it."""
    return x.reshape(onednn._row_shape(x.transpose(0, 3, 1, 2).shape))


@pytest.mark.parametrize(("channels", "side"), SHAPES)
def test_rounding_is_a_few_times_that_of_a_direct_convolution(channels, side):
    """Norm of the error, relative: of the output and of both gradients, against float64."""
    if not winograd.fits((5, channels, side, side), channels, 1):
        pytest.skip(f"{channels} channels do not fill vectors of {vectors.name()}")
    rng = np.random.default_rng(channels + side)
    shape = 5, side, side, channels
    x, g = (rng.standard_normal(shape).astype("f") for _ in range(2))
    w = rng.standard_normal((channels, channels, 3, 3)).astype("f")
    convolution = winograd.Convolution((5, channels, side, side), threads=2)
    y, gx, gw = np.empty_like(x), np.empty_like(x), np.empty_like(w)
    none, no_rows = np.empty((0, 0), "f"), np.empty((0, 0, 0), "f")
    convolution.convolve(rows(x), none, no_rows, no_rows, w, rows(y))
    width = rows(x).shape[2]
    same = np.repeat(np.array([[1], [0], [0]], "f"), width, axis=1)  # g is the gradient of y
    convolution.gradients(
        rows(g), rows(y), same, rows(x), none, no_rows, w, gw, rows(gx), adds=False
    )
    tensors = [torch.tensor(a).double().requires_grad_() for a in (x.transpose(0, 3, 1, 2), w)]
    expected = torch.conv2d(*tensors, padding=1)
    expected.backward(torch.tensor(g.transpose(0, 3, 1, 2)).double())
    found = y.transpose(0, 3, 1, 2), gx.transpose(0, 3, 1, 2), gw
    for ours, exact in zip(found, (expected, *(t.grad for t in tensors)), strict=True):
        exact = exact.detach().numpy()
        assert np.linalg.norm(ours - exact) < 2e-6 * np.linalg.norm(exact)


def test_gradients_are_added_to_what_is_there():
    rng = np.random.default_rng(0)
    x, g, before = (rng.standard_normal((3, 8, 8, 64)).astype("f") for _ in range(3))
    w = rng.standard_normal((64, 64, 3, 3)).astype("f")
    convolution = winograd.Convolution((3, 64, 8, 8), threads=2)
    none, no_rows = np.empty((0, 0), "f"), np.empty((0, 0, 0), "f")
    same = np.repeat(np.array([[1], [0], [0]], "f"), rows(x).shape[2], axis=1)
    results = []
    for adds in (False, True):
        gx = before.copy()
        arguments = rows(g), rows(x), same, rows(x), none, no_rows, w, np.empty_like(w), rows(gx)
        convolution.gradients(*arguments, adds=adds)
        results.append(gx)
    np.testing.assert_allclose(results[1], results[0] + before, rtol=1e-5, atol=1e-5)


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
        code = vectors.Code(module, "product", lanes)
        steps = winograd.Steps(code, channels, 8, winograd.TILES)
        a, b, out, _, count, *_ = code.function.args
        steps.product(a, channels, 1, b, out, steps.tiles, count, adds=True)
        code.builder.ret_void()

    text = assembly(register, product)
    fused = re.findall(rf"vfmadd\d+ps.*%{register}", text)
    assert len(fused) >= 4 * min(2, channels // 8)
    assert not re.findall(rf"(%{register}\d+, .*\(%r[sb]p|\(%r[sb]p.*, %{register})", text)
    assert not re.findall(rf"v(mul|add)ps.*%{register}", text)


@pytest.mark.parametrize("register", PROCESSORS)
def test_the_transforms_use_the_widest_vectors(register):
    def whole(module, lanes):
        winograd.convolve(vectors.Code(module, "convolve", lanes), 32, 16, adds=False)

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
