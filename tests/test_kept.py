"""Compiled kernels on the disk: found again, of one kind only, compiled again where damaged."""

import errno

import numpy as np
import pytest
from conftest import deny

kept = pytest.importorskip("resnet.backends.cpu.kept", reason="Numba is missing")

import numba  # noqa: E402

from resnet.backends.cpu import vectors  # noqa: E402


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Makes, as each process does, a kernel whose code is kept in ``tmp_path``."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def double(x):
        return x + x

    return lambda: kept.njit()(double)


def times(kernel):
    """How often one more process compiles it, to compute 2 * 21."""
    new = kernel()
    assert new(21) == 42
    return sum(new.stats.cache_misses.values())


def test_a_kernel_is_compiled_once_and_again_where_it_was_damaged(kernel, tmp_path):
    assert [times(kernel), times(kernel)] == [1, 0]
    (file,) = tmp_path.rglob("*.nbc")
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], whole[:-1] + b"?"):
        file.write_bytes(damaged)
        assert [times(kernel), times(kernel)] == [1, 0]


def test_a_kernel_is_compiled_where_what_is_kept_cannot_be_read(kernel, tmp_path, monkeypatch):
    times(kernel)
    deny(monkeypatch, *tmp_path.rglob("*.nbc"))
    assert times(kernel) == 1


def test_a_kernel_computes_where_the_disk_is_full(kernel, tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(kept.files, "whole", full)
    assert [times(kernel), times(kernel)] == [1, 1]
    assert not list(tmp_path.rglob("*.nbc"))


def test_kernels_of_processes_that_compile_at_once_do_not_take_each_others_place(kernel, tmp_path):
    """As neither knows of the other's files, the names have to differ by themselves."""
    names = set()
    for argument in (1, 1.0, np.ones(2), np.ones(2, np.float32)):
        kernel()(argument)
        (file,) = tmp_path.rglob("*.nbc")
        names.add(file.name)
        file.unlink()
    assert len(names) == 4


def test_processors_that_share_a_folder_have_kernels_of_their_own(monkeypatch, tmp_path):
    found = set()
    for features in ("+avx2,+fma", "+avx2,+fma,+avx512f"):
        monkeypatch.setattr(vectors, "processor", lambda features=features: ("any", features))
        kept.mark.cache_clear()
        assert not kept.exist(tmp_path)
        (tmp_path / f"kernels.add-1.py313.{kept.mark()}.0.nbc").touch()
        assert kept.exist(tmp_path)
        found.add(kept.mark())
    kept.mark.cache_clear()
    assert len(found) == 2
