"""oneDNN's convolutions: a batch part by part, and what is said where there is no oneDNN."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from resnet.backends.cpu import onednn, primitives


@pytest.mark.skipif(not onednn.available()[0], reason=onednn.available()[1])
@pytest.mark.parametrize(("images", "count"), [(1, 5), (2, 3), (5, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_batch_is_computed_in_parts_the_last_of_which_may_be_smaller(
    monkeypatch, images, count, stride
):
    """Output and both gradients are PyTorch's in double precision whatever the parts are."""
    rng = np.random.default_rng(stride)
    x = rng.standard_normal((5, 8, 6, 6)).astype("f")
    w = rng.standard_normal((16, 8, 3, 3)).astype("f")
    largest = max(x[0].nbytes, 4 * 16 * (6 // stride) ** 2)
    monkeypatch.setattr(primitives, "PART", images * largest)
    convolution = primitives.Convolution(x.shape, 16, stride, threads=1)
    assert (convolution.images, len(convolution.forward.parts)) == (images, count)
    g = rng.standard_normal(convolution.out_shape).astype("f")
    none, no_rows = onednn._NOTHING, onednn._NO_ROWS
    x_rows, g_rows = (onednn._rows(onednn._channels_last(a)) for a in (x, g))
    y, gx, gw = np.empty_like(g_rows), np.empty_like(x_rows), np.empty_like(w)
    convolution.convolve(x_rows, none, no_rows, no_rows, w, y)
    same = np.repeat(np.array([[1], [0], [0]], "f"), g_rows.shape[2], axis=1)
    convolution.gradients(g_rows, y, same, x_rows, none, no_rows, w, gw, gx, adds=False)
    tensors = [torch.tensor(a).double().requires_grad_() for a in (x, w)]
    expected = torch.conv2d(*tensors, stride=stride, padding=1)
    expected.backward(torch.tensor(g).double())
    found = onednn._images(y, g.shape), onednn._images(gx, x.shape), gw
    for ours, exact in zip(found, (expected, *(t.grad for t in tensors)), strict=True):
        exact = exact.detach().numpy()
        assert np.abs(ours - exact).max() < 1e-5 * np.abs(exact).max()


def absent(name):
    raise OSError(f"{name}: cannot open shared object file")


def old(name):
    def dnnl_version():
        return SimpleNamespace(contents=SimpleNamespace(major=2))

    return SimpleNamespace(dnnl_version=dnnl_version)


@pytest.mark.parametrize(
    ("load", "line"),
    [
        (absent, "oneDNN or its libgomp1 is missing: pip install onednn-cpu-gomp"),
        (old, "oneDNN is not version 3"),
    ],
)
def test_without_the_library_one_line_says_what_is_missing(monkeypatch, load, line):
    monkeypatch.setattr(ctypes, "CDLL", load)
    with pytest.raises(primitives.Missing) as error:
        primitives.library.__wrapped__()
    assert str(error.value) == line
