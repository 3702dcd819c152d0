"""A stand-in for a GPU: the CUDA backend on NumPy arrays, with the real kernels' source.

``kernels.cu`` is compiled for the CPU, and cuDNN's frontend replaced by one whose plans convolve
in double precision what lies at the addresses they are given, as the dimensions and strides say.
"""

import contextlib
import ctypes
import functools
import itertools
import shutil
import subprocess
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest

from resnet import functions
from resnet.backends.gpu import capture, cuda, cudnn, programs

HERE = Path(__file__).resolve().parent
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(
    COMPILER is None, reason="g++ is missing: it compiles the CUDA kernels for the CPU"
)
CAPABILITY = 90  # of the GPU that is stood in for
SHARED_MEMORY = 227 << 10  # bytes that a block may have there


@functools.cache
def library():
    """The kernels as a shared library."""
    folder = Path(tempfile.mkdtemp())
    names = folder / "names"
    known = *programs.KERNELS, *programs.ON_TENSOR_CORES
    names.write_text("".join(f"KERNEL({name})\n" for name in known))
    words = [COMPILER, "-std=c++17", "-O2", "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC",
             "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE",
             f'-DSOURCE="{programs.SOURCE}"', f'-DCONVOLUTIONS="{programs.CONVOLUTIONS}"',
             f'-DLIST="{names}"', HERE / "emulation.cpp", "-o", folder / "kernels.so"]  # fmt: skip
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(folder / "kernels.so"))
    shutil.rmtree(folder)
    loaded.launch.restype = ctypes.c_char_p
    return loaded


class Stream:
    """A stream of CuPy's: what it is given while it records is done when the recording is launched.

    What NumPy computes is done at once and never again: a replay shows whether anything but kernels
    and plans is needed.

    Attributes:
        recording: The work recorded so far, or None.
        refuses: ``begin_capture`` or ``end_capture``, if that is to fail.
        log: What has been asked of it.
        ptr: Its number: 0 while it is the default stream, as it is before ``use``.
    """

    def __init__(self, non_blocking=True) -> None:
        self.recording: list | None = None
        self.refuses = None
        self.log: list[str] = []
        self.ptr = 0

    def do(self, work) -> None:
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def use(self):
        self.log.append("use")
        self.ptr = 7

    def synchronize(self):
        assert self.recording is None
        self.log.append("synchronize")

    def _ask(self, what) -> None:
        self.log.append(what)
        if self.refuses == what:
            raise RuntimeError(f"CUDA refuses {what}")

    def begin_capture(self):
        self._ask("begin_capture")
        self.recording = []

    def end_capture(self):
        recording, self.recording = self.recording, None
        self._ask("end_capture")
        return types.SimpleNamespace(launch=lambda stream: [work() for work in recording])


class Module:
    """What ``cupy.RawModule`` is for the GPU.

    Attributes:
        stream: The stream that everything runs on.
        reversed: Run threads and blocks from the last to the first.
        launched: Names of the kernels so far.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.reversed = False
        self.launched: list[str] = []

    def get_function(self, name: str):
        def kernel(grid, block, arguments, shared_mem=0):
            assert len(grid) == len(block) == 1
            assert shared_mem <= kernel.max_dynamic_shared_size_bytes
            for a in arguments:  # CuPy would pass Python's own numbers as 64 bits
                assert isinstance(a, (np.ndarray, np.generic)), (name, a)
            boxes = [
                ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray)
                else ctypes.create_string_buffer(a.tobytes(), a.nbytes)
                for a in arguments
            ]  # fmt: skip
            sizes = (ctypes.c_int * len(boxes))(*map(ctypes.sizeof, boxes))
            pointers = (ctypes.c_void_p * len(boxes))(*map(ctypes.addressof, boxes))
            self.launched.append(name)

            def work():
                assert arguments  # the arrays live as long as the work may be done
                wrong = library().launch(
                    name.encode(), *grid, *block, shared_mem,
                    len(boxes), sizes, pointers, self.reversed,
                )  # fmt: skip
                assert wrong is None, f"{name}: {wrong.decode()}"

            self.stream.do(work)

        kernel.max_dynamic_shared_size_bytes = 48 << 10  # CUDA's default
        return kernel


class Memory:
    """NumPy, whose new arrays lie between guards and hold NaN until something is written."""

    GUARD = 64  # bytes on either side

    def __init__(self, stream: Stream) -> None:
        self.buffers: list[tuple] = []
        pool = types.SimpleNamespace(malloc=None)
        self.cuda = types.SimpleNamespace(
            Stream=lambda non_blocking: stream,
            get_current_stream=lambda: stream,
            MemoryPool=lambda: pool,
            using_allocator=lambda malloc: contextlib.nullcontext(),
        )

    def __getattr__(self, name):
        return getattr(np, name)

    def empty(self, shape, dtype=np.float32):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        buffer = np.full(size + 2 * self.GUARD + 16, 0xFF, np.uint8)
        begin = self.GUARD + -(buffer.ctypes.data + self.GUARD) % 16
        self.buffers.append((buffer, begin, begin + size))
        return buffer[begin : begin + size].view(dtype).reshape(shape)

    def empty_like(self, array):
        return self.empty(array.shape, array.dtype)

    def check(self) -> None:
        """No guard has been written to."""
        for buffer, begin, end in self.buffers:
            assert (buffer[:begin] == 0xFF).all() and (buffer[end:] == 0xFF).all()
        self.buffers.clear()


class Tensor:
    """A tensor of a graph of the frontend."""

    def __init__(self, dim=None, stride=None, data_type=None, uid=None, name=""):
        self.dim, self.stride, self.data_type, self.uid = dim, stride, data_type, uid
        self.is_output = False

    def set_uid(self, uid):
        self.uid = uid
        return self

    def set_data_type(self, data_type):
        self.data_type = data_type
        return self

    def set_output(self, is_output):
        self.is_output = is_output
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self

    def array(self, address):
        """What lies there, as an array of this tensor's shape and strides."""
        dtype = np.dtype(self.data_type)
        extent = 1 + sum((d - 1) * s for d, s in zip(self.dim, self.stride, strict=True))
        memory = (ctypes.c_char * (extent * dtype.itemsize)).from_address(address)
        strides = [s * dtype.itemsize for s in self.stride]
        return np.lib.stride_tricks.as_strided(np.frombuffer(memory, dtype), self.dim, strides)


class Graph:
    """``cudnn.pygraph``: one convolution.

    Attributes:
        workspace: Bytes that the plan wants: the first of ``Frontend.workspaces`` within the limit.
    """

    STEPS = ("validate", "build_operation_graph", "create_execution_plans",
             "deselect_numeric_notes", "check_support", "build_plans")  # fmt: skip

    def __init__(self, frontend, io_data_type, intermediate_data_type, compute_data_type, handle,
                 sm_version):  # fmt: skip
        assert intermediate_data_type == compute_data_type == "f4"
        assert sm_version == CAPABILITY  # else the frontend looks for a libcudart.so
        self.frontend, self.handle = frontend, handle
        self.limit = np.inf
        self.built: set[int] = set()
        self.done: list[tuple] = []
        frontend.graphs.append(self)

    def tensor(self, **settings):
        return Tensor(**settings)

    def _convolution(self, kind, padding, stride, dilation, **inputs):
        assert padding == [1, 1] and dilation == [1, 1]
        self.kind, self.inputs, self.stride, self.output = kind, inputs, stride, Tensor()
        return self.output

    def __getattr__(self, name):
        if name in ("conv_fprop", "conv_dgrad", "conv_wgrad"):
            return functools.partial(self._convolution, name)
        if name in self.STEPS:
            return lambda *arguments: self._step(name, *arguments)
        raise AttributeError(name)

    def _step(self, name, *arguments):
        assert len(self.done) == self.STEPS.index(name), f"{name} out of order"
        if name == "validate":
            assert self.output.is_output
        if name == "check_support":
            fitting = [size for size in self.frontend.workspaces if size <= self.limit]
            if not fitting:
                raise RuntimeError("no engine")
            self.workspace = fitting[0]
        self.done.append((name, *arguments))

    def deselect_workspace_greater_than(self, limit):
        assert self.done[-1][0] == "deselect_numeric_notes"  # the plans are there by then
        self.limit = limit

    def get_workspace_size(self):
        return self.workspace

    # Any plan by its place in the order of the heuristics.

    def get_execution_plan_count(self):
        assert self.done[-1][0] in ("deselect_numeric_notes", "build_plans")
        return len(self.frontend.workspaces)

    def build_plan_at_index(self, index):
        if self.frontend.workspaces[index] > self.limit:
            raise RuntimeError("deselected")
        self.built.add(index)

    def get_workspace_size_plan_at_index(self, index):
        return self.frontend.workspaces[index]

    def get_plan_name_at_index(self, index):
        return f"plan {index}"

    def execute_plan_at_index(self, addresses, workspace, index, handle):
        assert index in self.built
        self._run(addresses, workspace, handle)

    def execute(self, addresses, workspace, handle):
        assert len(self.done) == len(self.STEPS)
        self._run(addresses, workspace, handle)

    def _run(self, addresses, workspace, handle):
        assert handle == self.handle == self.frontend.HANDLE
        assert workspace and self.frontend.stream is not None
        assert all(address % 16 == 0 for address in addresses.values())

        def work():
            inputs = {name: t.array(addresses[t.uid]) for name, t in self.inputs.items()}
            out = self.output.array(addresses[self.output.uid])
            out[...] = CONVOLUTIONS[self.kind](self.stride, out.shape, **inputs)

        self.frontend.work.do(work)


def windows(x, out_shape, stride):
    """For each place of a 3x3 filter, the padded pixels that it meets."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = out_shape[2:]
    for r, s in itertools.product(range(3), repeat=2):
        rows = slice(r, r + (height - 1) * stride[0] + 1, stride[0])
        columns = slice(s, s + (width - 1) * stride[1] + 1, stride[1])
        yield r, s, padded[:, :, rows, columns]


def forward(stride, shape, image, weight):
    y = np.zeros(shape)
    for r, s, x in windows(image.astype(float), shape, stride):
        y += np.einsum("nchw,kc->nkhw", x, weight[:, :, r, s].astype(float), optimize=True)
    return y


def data(stride, shape, loss, filter):
    padded = np.zeros((*shape[:2], shape[2] + 2, shape[3] + 2))
    for r, s in itertools.product(range(3), repeat=2):
        part = np.einsum("nkhw,kc->nchw", loss.astype(float), filter[:, :, r, s].astype(float),
                         optimize=True)  # fmt: skip
        height, width = loss.shape[2:]
        rows = slice(r, r + (height - 1) * stride[0] + 1, stride[0])
        columns = slice(s, s + (width - 1) * stride[1] + 1, stride[1])
        padded[:, :, rows, columns] += part
    return padded[:, :, 1:-1, 1:-1]


def weights(stride, shape, image, loss):
    gw = np.zeros(shape)
    for r, s, x in windows(image.astype(float), loss.shape, stride):
        gw[:, :, r, s] = np.einsum("nchw,nkhw->kc", x, loss.astype(float), optimize=True)
    return gw


CONVOLUTIONS = {"conv_fprop": forward, "conv_dgrad": data, "conv_wgrad": weights}


class Frontend:
    """The module ``cudnn``.

    Attributes:
        graphs: All graphs so far.
        stream: The stream of the handle.
        workspaces: Bytes that each plan wants, in the order of the heuristics.
    """

    HANDLE = 4711
    data_type = types.SimpleNamespace(FLOAT="f4", HALF="f2")
    heur_mode = types.SimpleNamespace(A="A", FALLBACK="FALLBACK")
    build_plan_policy = types.SimpleNamespace(HEURISTICS_CHOICE="HEURISTICS_CHOICE")
    numerical_note = types.SimpleNamespace(
        **{name: name for name in ("NONDETERMINISTIC", "REDUCED_PRECISION_REDUCTION",
                                   "TENSOR_CORE", "DOWN_CONVERT_INPUTS")}
    )  # fmt: skip

    def __init__(self, work: Stream) -> None:
        self.work = work
        self.graphs: list[Graph] = []
        self.stream = None
        self.workspaces = [32]

    def backend_version(self):
        return 91300

    def backend_version_string(self):
        return "9.13.0"

    def create_handle(self):
        return self.HANDLE

    def set_stream(self, handle, stream):
        assert handle == self.HANDLE
        self.stream = stream

    def pygraph(self, **settings):
        return Graph(self, **settings)


def install(monkeypatch, precision="tf32", own=False):
    """Let the CUDA backend compute on NumPy arrays; returns its kernels, cuDNN and memory."""
    stream = Stream()
    module, frontend, memory = Module(stream), Frontend(stream), Memory(stream)
    monkeypatch.setattr(programs, "ARRAY", np.ndarray)
    monkeypatch.setattr(programs, "cupy", lambda: memory)
    monkeypatch.setattr(programs, "shared_memory", lambda: SHARED_MEMORY)
    monkeypatch.setattr(programs, "_module", lambda _: module)
    monkeypatch.setattr(programs, "_function", functools.cache(programs._function.__wrapped__))
    monkeypatch.setattr(cuda, "_arrived", functools.cache(cuda._arrived.__wrapped__))
    monkeypatch.setattr(functions, "_backend", capture.Recorded(precision, own))
    monkeypatch.setattr(cudnn, "frontend", lambda: frontend)
    monkeypatch.setattr(cudnn, "_create_handle", frontend.create_handle)
    monkeypatch.setattr(cudnn, "compute_capability", lambda: CAPABILITY)
    monkeypatch.setattr(cudnn, "_stream_of_handle", None)
    monkeypatch.setattr(cuda, "_convolution", functools.cache(cuda._Convolution))
    monkeypatch.setattr(cudnn, "address", lambda array: array.ctypes.data)
    monkeypatch.setattr(cudnn, "stream", lambda: 1)
    return module, frontend, memory
