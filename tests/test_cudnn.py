"""cuDNN's plans in a stand-in's hands, and what is said where there is no cuDNN."""

import emulation
import numpy as np
import pytest

from resnet import functions
from resnet.backends.gpu import cuda, cudnn, programs


@pytest.fixture
def frontend(request, monkeypatch):
    """What stands in for cuDNN's frontend, in the precision that the test asks for."""
    _, frontend, memory = emulation.install(monkeypatch, getattr(request, "param", "tf32"))
    yield frontend
    memory.check()


@pytest.mark.parametrize("frontend", ["fp32", "tf32", "fp16"], indirect=True)
def test_a_plan_says_how_arrays_lie_and_what_is_not_wanted(frontend):
    """Steps must come in the order that the frontend needs: see emulation.Graph."""
    convolution = cudnn.Convolution((2, 16, 9, 8), 32, 2, functions._backend.precision)
    assert convolution.out_shape == (2, 32, 5, 4)
    xp, dtype = programs.cupy(), functions._backend.dtype
    x, w, y = (xp.empty(shape, dtype) for shape in ((2, 9, 8, 16), (32, 3, 3, 16), (2, 5, 4, 32)))
    for array in (x, w, y):
        array.fill(0)
    convolution.forward(x, w, y)
    convolution.backward_data(y, w, x)
    convolution.backward_weights(x, y, w)
    of_x = [2, 16, 9, 8], [9 * 8 * 16, 1, 8 * 16, 16]
    of_w = [32, 16, 3, 3], [9 * 16, 1, 3 * 16, 16]
    of_y = [2, 32, 5, 4], [5 * 4 * 32, 1, 4 * 32, 32]
    expected = {
        "conv_fprop": ({"image": of_x, "weight": of_w}, of_y),
        "conv_dgrad": ({"loss": of_y, "filter": of_w}, of_x),
        "conv_wgrad": ({"image": of_x, "loss": of_y}, of_w),
    }
    assert [graph.kind for graph in frontend.graphs] == list(expected)
    for graph in frontend.graphs:
        inputs, output = expected[graph.kind]
        assert {name: (t.dim, t.stride) for name, t in graph.inputs.items()} == inputs
        assert (graph.output.dim, graph.output.stride) == output
        tensors = [*graph.inputs.values(), graph.output]
        assert {t.data_type for t in tensors} == {functions._backend.dtype.str[1:]}
        assert graph.stride == [2, 2]
        (unwanted,) = (notes for step, *notes in graph.done if step == "deselect_numeric_notes")
        assert {"NONDETERMINISTIC", "DOWN_CONVERT_INPUTS"} <= set(unwanted[0])
        assert ("TENSOR_CORE" in unwanted[0]) == (functions._backend.precision == "fp32")


def test_a_plan_is_built_once_for_all_layers_of_a_shape(frontend):
    shape = (2, 16, 4, 4)
    arrays = [np.zeros(s, "f") for s in ((2, 4, 4, 16), (16, 16, 3, 3), (2, 4, 4, 16))]
    for _ in range(3):
        cuda._convolution(shape, 16, 1, "tf32", False).forward(*arrays)
    assert len(frontend.graphs) == 1
    cuda._convolution(shape, 16, 1, "fp32", False).forward(*arrays)
    assert len(frontend.graphs) == 2


@pytest.mark.parametrize(
    ("workspaces", "chosen"),
    [((16 << 20, 4 << 20, 288 << 10, 0), 288 << 10), ((16 << 20, 4 << 20), 16 << 20)],
    ids=["one does not", "all do"],
)
def test_a_plan_that_copies_whole_images_is_taken_where_there_is_no_other(
    frontend, workspaces, chosen
):
    """Among the others, too, the first of the heuristics is taken."""
    frontend.workspaces = workspaces
    graph = cudnn.Convolution((2, 16, 4, 4), 16, 1, "tf32").build(cudnn.FORWARD)
    assert graph.get_workspace_size() == chosen


def test_plans_run_on_the_current_stream(frontend, monkeypatch):
    arrays = [np.zeros(s, "f") for s in ((2, 4, 4, 16), (16, 3, 3, 16), (2, 4, 4, 16))]
    for stream in (7, 8, 7):
        monkeypatch.setattr(cudnn, "stream", lambda stream=stream: stream)
        cudnn.Convolution((2, 16, 4, 4), 16, 1, "tf32").forward(*arrays)
        assert frontend.stream == stream


def test_a_shape_without_a_plan_is_named(frontend):
    frontend.workspaces = []
    with pytest.raises(RuntimeError, match=r"no plan for conv_fprop, tf32, input \(2, 16, 4, 4\)"):
        cudnn.Convolution((2, 16, 4, 4), 16, 1, "tf32").forward(*[np.zeros(1)] * 3)


def no_frontend():
    raise ImportError("No module named 'cudnn'")


class WithoutCudnn:
    def backend_version(self):
        raise RuntimeError("Unable to find symbol cudnnGetVersion")


class WithOldCudnn:
    def backend_version(self):
        return 8907

    def backend_version_string(self):
        return "8.9.7"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        (no_frontend, "pip install 'nvidia-cudnn-frontend==1.22.1'"),
        (WithoutCudnn, "found none): pip install nvidia-cudnn-cu13"),
        (WithOldCudnn, "found 8.9.7): pip install nvidia-cudnn-cu13"),
    ],
)
def test_without_cudnn_one_line_says_so(monkeypatch, module, line):
    monkeypatch.setattr(cuda, "why_no_gpu", lambda: None)
    monkeypatch.setattr(cudnn, "_cuda_version", lambda: 13000)
    monkeypatch.setattr(cudnn, "_import_frontend", module)
    monkeypatch.setattr(cudnn, "frontend", cudnn.frontend.__wrapped__)
    with pytest.raises(ValueError, match="pip install") as error:
        functions.use("cuda", gpu=True)
    assert line in str(error.value) and "\n" not in str(error.value)
