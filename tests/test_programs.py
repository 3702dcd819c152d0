"""Which kernels there are, and for which GPUs."""

import re

import pytest

from resnet.backends.gpu import programs

SHARED_MEMORY = 163 << 10  # bytes that a block may have on an A100; on an H100 227


def test_every_kernel_of_the_sources_is_named():
    source, _ = programs.program(True)
    known = {*programs.KERNELS, *programs.ON_TENSOR_CORES}
    names = re.findall(r"__global__ void __launch_bounds__\(THREADS\)\s+(\w+)\(", source)
    assert source.count("__global__") == len(names)
    assert {name.partition("<")[0] for name in known} == set(names)
    assert f"THREADS = {programs.THREADS};" in source


def test_a_gpu_without_tf32_is_not_given_what_it_cannot_compile():
    source, known = programs.program(False)
    assert "mma.sync" not in source and not set(known) & set(programs.ON_TENSOR_CORES)


@pytest.mark.parametrize("name", programs.ON_TENSOR_CORES)
def test_no_kernel_wants_more_shared_memory_than_there_is(name):
    assert programs.ON_TENSOR_CORES[name] <= SHARED_MEMORY
