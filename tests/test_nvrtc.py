"""The CUDA kernels through NVIDIA's own compiler, without a GPU.

``pip install nvidia-cuda-nvrtc-cu12`` (up to 12.9 for sm_70) or ``nvidia-cuda-nvrtc`` (13).
"""

import ctypes
import functools
import glob
import re
import sysconfig
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p

import pytest

from resnet.backends.gpu import programs

# V100, A100, H100 and H200; and whether it is the program of convolutions.cu.
PROGRAMS = [(70, False), (80, False), (90, False), (80, True), (90, True)]
LIBRARIES = [
    path
    for folder in ("cuda_nvrtc", "cu13")
    for path in sorted(
        glob.glob(f"{sysconfig.get_path('purelib')}/nvidia/{folder}/lib/libnvrtc.so.*")
    )
]

pytestmark = pytest.mark.skipif(
    not LIBRARIES, reason="NVRTC is missing: pip install nvidia-cuda-nvrtc-cu12"
)


@functools.cache
def nvrtc():
    return ctypes.CDLL(LIBRARIES[0])


def supported():
    count = c_int()
    assert nvrtc().nvrtcGetNumSupportedArchs(byref(count)) == 0
    found = (c_int * count.value)()
    assert nvrtc().nvrtcGetSupportedArchs(found) == 0
    return list(found)


def text(program, size, get):
    """One of the texts that NVRTC keeps of a program."""
    length = c_size_t()
    assert getattr(nvrtc(), size)(program, byref(length)) == 0
    buffer = ctypes.create_string_buffer(length.value)
    assert getattr(nvrtc(), get)(program, buffer) == 0
    return buffer.value.decode()


@functools.cache
def compiled(architecture, on_tensor_cores):
    """Log, PTX and lowered names of the kernels, compiled as CuPy does it."""
    if architecture not in supported():
        pytest.skip(f"this NVRTC compiles for {supported()}, not for {architecture}")
    program = c_void_p()
    source, names = programs.program(on_tensor_cores)
    source = source.encode()
    assert nvrtc().nvrtcCreateProgram(byref(program), source, b"kernels.cu", 0, None, None) == 0
    for name in names:
        assert nvrtc().nvrtcAddNameExpression(program, name.encode()) == 0
    options = [f"--gpu-architecture=sm_{architecture}", "-std=c++17", "--ptxas-options=-v"]
    options = (c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc().nvrtcCompileProgram(program, len(options), options)
    log = text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
    assert status == 0, log
    lowered = {}
    for name in names:
        found = c_char_p()
        assert nvrtc().nvrtcGetLoweredName(program, name.encode(), byref(found)) == 0
        lowered[name] = found.value.decode()
    ptx = text(program, "nvrtcGetPTXSize", "nvrtcGetPTX")
    nvrtc().nvrtcDestroyProgram(byref(program))
    return log, ptx, lowered


@pytest.mark.parametrize(("architecture", "on_tensor_cores"), PROGRAMS)
def test_every_kernel_is_compiled_without_a_warning(architecture, on_tensor_cores):
    log, ptx, lowered = compiled(architecture, on_tensor_cores)
    assert "kernels.cu(" not in log, log
    for name in lowered.values():
        assert f".entry {name}(" in ptx


@pytest.mark.parametrize(("architecture", "on_tensor_cores"), PROGRAMS)
def test_no_kernel_spills_registers(architecture, on_tensor_cores):
    """And there are registers for three blocks on a multiprocessor, or one; it has 65,536."""
    log, _, lowered = compiled(architecture, on_tensor_cores)
    blocks = 1 if on_tensor_cores else 3
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", log)
    if not stacks:
        pytest.skip("this NVRTC does not say what is spilled")
    assert len(stacks) >= len(lowered)  # those of kernels.cu that are no templates, besides
    most = 8 if on_tensor_cores else 0  # a number or two, while the shared memory is filled
    assert all(max(map(int, found)) <= most for found in stacks), log
    registers = [int(found) for found in re.findall(r"Used (\d+) registers", log)]
    assert len(registers) >= len(lowered)
    assert max(registers) * blocks * programs.THREADS <= 65536, log


@pytest.mark.parametrize("architecture", [a for a, other in PROGRAMS if not other])
def test_activations_are_read_and_written_16_bytes_at_once(architecture):
    _, ptx, lowered = compiled(architecture, False)
    bodies = {
        name: ptx[ptx.index(f".entry {entry}(") :].split("\n}\n")[0]
        for name, entry in lowered.items()
    }
    for kernel in ("normalize", "gradient_sums", "input_gradient", "masked", "add"):
        for type, values in (("float", "f32"), ("Half", "u32")):
            body = bodies[f"{kernel}<{type}>"]
            assert f"ld.global.v4.{values}" in body and f"st.global.v4.{values}" in body
            assert "st.global.u16" not in body


@pytest.mark.parametrize("architecture", [a for a, wanted in PROGRAMS if wanted])
def test_convolutions_are_on_tensor_cores(architecture):
    """For 16 channels: 3 places in a row of the filter, 2 x 8 channels, 2 x 2 tiles of a warp."""
    _, ptx, lowered = compiled(architecture, True)
    entry = lowered["convolve<float, 16, 16, 16, 32, 8, 1, 1, false, false>"]
    body = ptx[ptx.index(f".entry {entry}(") :].split("\n}\n")[0]
    assert body.count("mma.sync.aligned.m16n8k8") == 3 * 2 * 2 * 2
    assert "ld.global.v4.f32" in body and "ld.local" not in body
