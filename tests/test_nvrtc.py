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

from resnet.backends.gpu import kernels

ARCHITECTURES = (70, 80, 90)  # V100, A100, H100 and H200
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
def compiled(architecture):
    """Log, PTX and lowered names of the kernels, compiled as CuPy does it."""
    if architecture not in supported():
        pytest.skip(f"this NVRTC compiles for {supported()}, not for {architecture}")
    program = c_void_p()
    source = kernels.SOURCE.read_bytes()
    assert nvrtc().nvrtcCreateProgram(byref(program), source, b"kernels.cu", 0, None, None) == 0
    for name in kernels.KERNELS:
        assert nvrtc().nvrtcAddNameExpression(program, name.encode()) == 0
    options = [f"--gpu-architecture=sm_{architecture}", "-std=c++17", "--ptxas-options=-v"]
    options = (c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc().nvrtcCompileProgram(program, len(options), options)
    log = text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
    assert status == 0, log
    lowered = {}
    for name in kernels.KERNELS:
        found = c_char_p()
        assert nvrtc().nvrtcGetLoweredName(program, name.encode(), byref(found)) == 0
        lowered[name] = found.value.decode()
    ptx = text(program, "nvrtcGetPTXSize", "nvrtcGetPTX")
    nvrtc().nvrtcDestroyProgram(byref(program))
    return log, ptx, lowered


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_compiled_without_a_warning(architecture):
    log, ptx, lowered = compiled(architecture)
    assert "kernels.cu(" not in log, log
    for name in lowered.values():
        assert f".entry {name}(" in ptx


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills_registers(architecture):
    """And there are registers for three blocks on a multiprocessor, which has 65,536."""
    log, _, lowered = compiled(architecture)
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", log)
    if not stacks:
        pytest.skip("this NVRTC does not say what is spilled")
    assert len(stacks) == len(lowered)
    assert all(found == ("0", "0", "0") for found in stacks), log
    registers = [int(found) for found in re.findall(r"Used (\d+) registers", log)]
    assert len(registers) == len(lowered) and max(registers) * 3 * kernels.THREADS <= 65536, log


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activations_are_read_and_written_16_bytes_at_once(architecture):
    _, ptx, lowered = compiled(architecture)
    bodies = {
        name: ptx[ptx.index(f".entry {entry}(") :].split("\n}\n")[0]
        for name, entry in lowered.items()
    }
    for kernel in ("normalize", "gradient_sums", "input_gradient", "masked", "add"):
        for type, values in (("float", "f32"), ("Half", "u32")):
            body = bodies[f"{kernel}<{type}>"]
            assert f"ld.global.v4.{values}" in body and f"st.global.v4.{values}" in body
            assert "st.global.u16" not in body
