"""Code of vectors: it computes, is kept, and is compiled again where it was damaged."""

import ctypes

import numpy as np
import pytest
from conftest import deny
from llvmlite import ir

from resnet.backends.cpu import onednn, vectors

pytestmark = pytest.mark.skipif(
    not onednn.available(by_tiles=True)[0], reason=onednn.available(by_tiles=True)[1]
)


def triple(lanes):
    """y = 3 x, a vector after the other."""
    module = ir.Module()
    code = vectors.Code(module, "triple", lanes, pointers=2, ahead=1)
    x, y, count, _ = code.function.args
    with code.loop(count) as i:
        code.store(3.0 * code.load(code.at(x, (i, lanes))), code.at(y, (i, lanes)))
    code.builder.ret_void()
    return module


def test_code_computes_what_it_says(tmp_path):
    (address,) = vectors.load(vectors.object_code(triple, "triple", tmp_path), ["triple"])
    lanes = vectors.lanes()
    x, y = np.arange(2 * lanes + 1, dtype=np.float32), np.zeros(2 * lanes + 1, np.float32)
    pointer = ctypes.c_void_p
    function = ctypes.CFUNCTYPE(None, pointer, pointer, ctypes.c_int64, pointer)
    function(address)(x.ctypes.data, y.ctypes.data, 2, None)
    np.testing.assert_array_equal(y[:-1], 3 * x[:-1])
    assert y[-1] == 0  # not a vector's


def test_code_is_compiled_once_and_again_where_it_was_damaged(tmp_path):
    code = vectors.object_code(triple, "triple", tmp_path)
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    assert vectors.object_code(None, "triple", tmp_path) == code  # nothing is built
    for damaged in (whole[: len(whole) // 2], whole[:-1] + b"?", b""):
        kept.write_bytes(damaged)
        assert vectors.object_code(triple, "triple", tmp_path) == code
        assert kept.read_bytes() == whole


def test_code_is_compiled_again_where_what_is_kept_cannot_be_read(tmp_path, monkeypatch):
    code = vectors.object_code(triple, "triple", tmp_path)
    deny(monkeypatch, *tmp_path.iterdir())
    assert vectors.object_code(triple, "triple", tmp_path) == code


def test_code_is_compiled_where_nothing_can_be_kept(tmp_path):
    missing = tmp_path / "missing"
    code = vectors.object_code(triple, "triple", missing)
    assert code == vectors.object_code(triple, "triple", tmp_path) and not missing.exists()


@pytest.mark.parametrize(
    ("features", "lanes"),
    [
        ("+sse4.2,-avx2", 0),
        ("+avx2,-fma", 0),
        ("+avx2,+fma,-avx512f", 8),
        ("+avx2,+fma,+avx512f", 16),
    ],
)
def test_vectors_are_as_long_as_the_processor_has_them(features, lanes):
    assert vectors.lanes(features) == lanes
