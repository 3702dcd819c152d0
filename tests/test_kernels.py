"""The CPU's kernels: what they promise beyond what test_functions.py holds against PyTorch."""

import numpy as np
import pytest

kernels = pytest.importorskip("resnet.backends.cpu.kernels", reason="Numba is missing")


def test_kernels_arrays_begin_with_a_cache_line():
    for shape in ((3,), (5, 7), (1 << 16,)):
        array = kernels.empty(shape)
        assert array.shape == shape and array.dtype == np.float32
        assert array.ctypes.data % 64 == 0 and array.flags.c_contiguous


def test_relu_lets_what_is_no_number_through_as_numpy_does():
    """A diverged network must not look like a working one."""
    x = np.array([[[-1, 0, 2, np.nan]]], np.float32)
    y, g, none = np.empty_like(x), np.empty_like(x), x[:0]
    kernels.finish(x, np.array([[1] * 4, [0] * 4], np.float32), none, y)
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    kernels.add_relu(x, x, y)
    np.testing.assert_array_equal(y, np.maximum(2 * x, 0))
    kernels.masked(np.ones_like(x), y, g)
    np.testing.assert_array_equal(g, [[[0, 0, 1, 1]]])
