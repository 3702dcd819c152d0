"""cuDNN's convolutions, through nvidia-cudnn-frontend and the addresses of CuPy's arrays.

CuPy 14 brings no cuDNN, CuPy 13 only an old one; the frontend takes whichever libcudnn 9 is
installed. Arrays are channels last: images (N, H, W, C), filters (K, 3, 3, C). A plan is built once
per shape and kept.
"""

from __future__ import annotations

import functools

import chainer

FRONTEND = "nvidia-cudnn-frontend==1.22.1"  # later ones need packages of hundreds of megabytes
KERNEL, PAD = 3, 1
X, W, Y = 1, 2, 3  # numbers by which a plan knows input, filters and output
FORWARD, DATA, WEIGHTS = "conv_fprop", "conv_dgrad", "conv_wgrad"  # the frontend's names
WORKSPACE = 2 << 20  # bytes; a plan that wants more copies all images of a batch
PRECISIONS = ("fp32", "tf32", "fp16")


class Missing(Exception):
    """The frontend or cuDNN is not here, or not one that these calls fit."""


def _import_frontend():
    import cudnn  # an extra; it loads hundreds of megabytes

    return cudnn


@functools.cache
def frontend():
    """The module ``cudnn`` of nvidia-cudnn-frontend.

    Raises:
        Missing: It or cuDNN 9 is not installed; the message has the command that mends it.
    """
    try:
        module = _import_frontend()
    except (ImportError, AssertionError) as error:  # it asserts that there is one libcudnn
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise Missing(
            f"cuDNN's frontend cannot be imported ({reason[0]}): pip install '{FRONTEND}'"
        ) from None
    try:
        version = module.backend_version()
    except RuntimeError:
        version = 0
    if version < 90000:
        found = module.backend_version_string() if version else "none"
        major = _cuda_version() // 1000
        raise Missing(f"cuDNN 9 is missing (found {found}): pip install nvidia-cudnn-cu{major}")
    return module


def version() -> str:
    """Version of cuDNN, such as 9.13.0."""
    return frontend().backend_version_string()


def _cuda_version() -> int:
    """Version of CUDA that CuPy is built for, such as 13000; 13000, too, without a CuPy."""
    try:
        return chainer.cuda.cupy.cuda.runtime.runtimeGetVersion()
    except AttributeError:
        return 13000


def address(array) -> int:
    """Where an array begins in the memory of the GPU."""
    return array.data.ptr


def stream() -> int:
    """CuPy's current stream, as CUDA knows it."""
    return chainer.cuda.cupy.cuda.get_current_stream().ptr


def compute_capability() -> int:
    """Compute capability of CuPy's current GPU, such as 90."""
    return int(chainer.cuda.cupy.cuda.Device().compute_capability)


@functools.cache
def _create_handle() -> int:
    return frontend().create_handle()


_stream_of_handle: int | None = None


def handle() -> int:
    """cuDNN's handle, on CuPy's current stream."""
    global _stream_of_handle
    handle, current = _create_handle(), stream()
    if current != _stream_of_handle:
        frontend().set_stream(handle=handle, stream=current)
        _stream_of_handle = current
    return handle


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Strides of a logical (N, C, H, W) that is channels last, in values."""
    _, c, h, w = shape
    return [h * w * c, 1, w * c, c]


class Convolution:
    """The three 3x3 convolutions of a layer: forward, and backward for the data and the weights.

    Args:
        shape: (N, C, H, W) of the input.
        channels: K, channels of the output.
        stride: 1 or 2.
        precision: ``fp32``: float32 throughout; ``tf32``: float32 values, whose products may be
            taken with 10 bits of mantissa; ``fp16``: float16 values, summed in float32.

    Attributes:
        out_shape: (N, K, H, W) of the output.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], channels: int, stride: int, precision: str
    ) -> None:
        n, c, *size = shape
        out = ((length + 2 * PAD - KERNEL) // stride + 1 for length in size)
        self.out_shape = (n, channels, *out)
        self.shapes = {X: shape, W: (channels, c, KERNEL, KERNEL), Y: self.out_shape}
        self.stride = stride
        self.precision = precision
        self._plans: dict[str, tuple] = {}

    def forward(self, x, w, y) -> None:
        """Fill y with the convolution of x and w."""
        self._execute(FORWARD, x, w, y)

    def backward_data(self, gy, w, gx) -> None:
        """Fill gx with the gradient of the input."""
        self._execute(DATA, gx, w, gy)

    def backward_weights(self, x, gy, gw) -> None:
        """Fill gw with the gradient of the filters."""
        self._execute(WEIGHTS, x, gw, gy)

    def _execute(self, kind: str, x, w, y) -> None:
        if kind not in self._plans:
            graph = self.build(kind)
            xp = chainer.backend.get_array_module(x)
            self._plans[kind] = graph, xp.empty(max(1, graph.get_workspace_size()), "u1")
        graph, workspace = self._plans[kind]
        arrays = {X: address(x), W: address(w), Y: address(y)}
        graph.execute(arrays, address(workspace), handle=handle())

    def graph(self, kind: str):
        """The frontend's description of one convolution; nothing is built yet."""
        cudnn = frontend()
        types = cudnn.data_type
        values = types.HALF if self.precision == "fp16" else types.FLOAT
        graph = cudnn.pygraph(
            io_data_type=values,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            handle=handle(),
            # Without it the frontend asks the CUDA runtime, which it looks for under the names
            # libcudart.so.12 and .13; CuPy has it within itself, and a wheel's is not found so.
            sm_version=compute_capability(),
        )

        def tensor(uid: int):
            shape = list(self.shapes[uid])
            return graph.tensor(dim=shape, stride=_strides(shape), data_type=values, uid=uid)

        inputs, result = {
            FORWARD: ({"image": X, "weight": W}, Y),
            DATA: ({"loss": Y, "filter": W}, X),
            WEIGHTS: ({"image": X, "loss": Y}, W),
        }[kind]
        output = getattr(graph, kind)(
            **{name: tensor(uid) for name, uid in inputs.items()},
            padding=[PAD, PAD],
            stride=[self.stride, self.stride],
            dilation=[1, 1],
        )
        shape = list(self.shapes[result])
        output.set_uid(result).set_data_type(values).set_output(True)
        output.set_dim(shape).set_stride(_strides(shape))
        return graph

    def build(self, kind: str):
        """Build the plan of one convolution: of those that are wanted, the heuristics' first.

        No stopwatch chooses one today and another tomorrow. The heuristics often put one first
        that reorders all images of a batch before and after; one with a small workspace does not.

        Raises:
            RuntimeError: cuDNN has no plan.
        """
        try:
            try:
                return self._build(kind, WORKSPACE)
            except Exception:  # the frontend's own types, and RuntimeError
                return self._build(kind, None)
        except Exception as error:
            x, w = self.shapes[X], self.shapes[W]
            raise RuntimeError(
                f"cuDNN {version()} has no plan for {kind}, {self.precision}, input {x}, filters "
                f"{w}, stride {self.stride}: {error}; --backend chainer does without cuDNN"
            ) from error

    def _build(self, kind: str, workspace: int | None):
        graph = self.plans(kind)
        if workspace is not None:
            graph.deselect_workspace_greater_than(workspace)
        graph.check_support()
        graph.build_plans(frontend().build_plan_policy.HEURISTICS_CHOICE)
        return graph

    def plans(self, kind: str):
        """The description of one convolution with its plans, in the order of the heuristics.

        Those that are not wanted cannot be built: the same run must give the same bits, of products
        as exact as ``precision`` says.
        """
        cudnn = frontend()
        notes, modes = cudnn.numerical_note, cudnn.heur_mode
        unwanted = [notes.NONDETERMINISTIC, notes.REDUCED_PRECISION_REDUCTION,
                    notes.DOWN_CONVERT_INPUTS]  # fmt: skip
        if self.precision == "fp32":
            unwanted.append(notes.TENSOR_CORE)
        graph = self.graph(kind)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([modes.A, modes.FALLBACK])
        graph.deselect_numeric_notes(unwanted)  # of the plans that are there by now
        return graph
