"""Time every convolution of the report's networks on a GPU: our kernels and cuDNN's plans.

  python experiments/plans.py                     ours, and the first plan of cuDNN's heuristics
  python experiments/plans.py --all               beside the fastest plan
  python experiments/plans.py --precision fp16 -b 128 500

Prints a Markdown table. The process loads no PyTorch, whose libraries could stand in for missing
ones. Seconds for the first, some minutes with --all.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

# Python looks for modules beside the script first, and there 'resnet' is another script.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from resnet import command, flags, functions, record
from resnet.backends.gpu import cudnn, tensor_cores

# isort: split
import chainer  # after resnet, which lets it run on this NumPy

LAYERS = ((3, 16, 32, 1), (16, 16, 32, 1), (16, 32, 32, 2), (32, 32, 16, 1),
          (32, 64, 16, 2), (64, 64, 8, 1))  # channels in and out, size, stride  # fmt: skip
KINDS = (cudnn.FORWARD, cudnn.DATA, cudnn.WEIGHTS)
CALLS, ROUNDS = 20, 5  # between two looks at the GPU's clock, and how often


def dtype(precision: str) -> np.dtype:
    """Tell the type of the images at a precision."""
    return np.dtype("f2" if precision == "fp16" else "f4")


def convolutions(batchsize: int, precision: str) -> list[cudnn.Convolution]:
    """List one for each shape in the networks, at that precision."""
    least = 16 // dtype(precision).itemsize  # channels come in 16 bytes, as cuda.py packs them
    return [
        cudnn.Convolution((batchsize, max(inputs, least), size, size), outputs, stride, precision)
        for inputs, outputs, size, stride in LAYERS
    ]


def arrays(convolution: cudnn.Convolution) -> dict:
    """Draw random numbers for input, filters and output, by the plan's numbers."""
    rng = np.random.default_rng(0)
    return {
        uid: chainer.cuda.cupy.asarray(
            rng.standard_normal((n, h, w, c), np.float32).astype(dtype(convolution.precision))
        )
        for uid, (n, c, h, w) in convolution.shapes.items()
    }


def microseconds(call: Callable[[], None]) -> float:
    """Time a call on the GPU, recorded as in training, where the host's calls cost nothing.

    The median of several rounds, without the first.
    """
    cuda = chainer.cuda.cupy.cuda
    stream, times = cuda.Stream(non_blocking=True), []
    with stream:
        call()  # what it needs is there by now
        stream.synchronize()
        stream.begin_capture()
        try:
            for _ in range(CALLS):
                call()
        finally:
            graph = stream.end_capture()
        for _ in range(1 + ROUNDS):
            begin, end = cuda.Event(), cuda.Event()
            begin.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            times.append(1000 * cuda.get_elapsed_time(begin, end) / CALLS)
    return median(times[1:])


def timed(convolution: cudnn.Convolution, kind: str, every: bool) -> list[dict]:
    """Find name, workspace in KiB and time of the plan that is taken; then of all wanted."""
    numbers = arrays(convolution)  # a plan knows only where they are: they must stay there
    where = {uid: cudnn.address(array) for uid, array in numbers.items()}

    def one(graph, place: int) -> dict:
        size = graph.get_workspace_size_plan_at_index(place)
        workspace = chainer.cuda.cupy.empty(max(1, size), np.uint8)
        at = cudnn.address(workspace)

        def call() -> None:
            graph.execute_plan_at_index(where, at, place, handle=cudnn.handle())

        us = microseconds(call)
        return {"plan": graph.get_plan_name_at_index(place), "KiB": size / 1024, "us": us}

    graph = convolution.build(kind)
    found = [one(graph, next(possible(graph)))]  # it builds the first that is possible
    if every:
        graph = convolution.plans(kind)
        for place in possible(graph):
            with contextlib.suppress(Exception):  # it cannot be recorded: not for training
                found.append(one(graph, place))
    return found


def ours(convolution: cudnn.Convolution, kind: str) -> float | None:
    """Time our own kernel for it, in microseconds; None if there is none."""
    shape, filters = convolution.shapes[cudnn.X], convolution.out_shape[1]
    own = tensor_cores.find(shape, filters, convolution.stride, convolution.precision)
    if own is None or (kind == cudnn.DATA and not own.has_backward_data):
        return None
    numbers = arrays(convolution)
    x, y = numbers[cudnn.X], numbers[cudnn.Y]
    w = chainer.cuda.cupy.zeros((filters, shape[1], 3, 3), np.float32)
    run = {
        cudnn.FORWARD: lambda: own.forward(x, w, y),
        cudnn.DATA: lambda: own.backward_data(y, w, x),
        cudnn.WEIGHTS: lambda: own.backward_weights(x, y, w),
    }
    return microseconds(run[kind])


def possible(graph) -> Iterator[int]:
    """Build the plans that can be, in the order of the heuristics; their places."""
    for place in range(graph.get_execution_plan_count()):
        try:
            graph.build_plan_at_index(place)
        except Exception:  # not wanted, or not for this GPU
            continue
        yield place


def table(rows: list[tuple[cudnn.Convolution, str, float | None, list[dict]]]) -> str:
    """Lay out our kernels and the plans in Markdown, with the fastest of those that were timed."""
    head = ["Input", "Filters", "Stride", "Precision", "Convolution", "Ours, us", "Plan", "KiB",
            "us", "Fastest", "KiB", "us"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for convolution, kind, own, found in rows:
        shapes = (" x ".join(map(str, convolution.shapes[uid])) for uid in (cudnn.X, cudnn.W))
        label = [*shapes, str(convolution.stride), convolution.precision, kind]
        label.append("\N{EN DASH}" if own is None else f"{own:.1f}")
        fastest = min(found, key=lambda plan: plan["us"])
        for plan in (found[0], fastest):
            label += [plan["plan"], f"{plan['KiB']:.0f}", f"{plan['us']:.1f}"]
        lines.append(label)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main() -> None:
    p = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    p.add_argument("--batchsize", "-b", type=flags.whole_number(*flags.BATCH), nargs="+",
        default=[128], metavar="B", help="images at once (default: 128)")
    p.add_argument("--precision", choices=cudnn.PRECISIONS, nargs="+", default=cudnn.PRECISIONS,
        help="default: each")
    p.add_argument("--device", "-d", default="0", metavar="D",
        help="the number of a GPU (default: 0)")
    p.add_argument("--all", action="store_true",
        help="time all plans that training might take, too")
    # fmt: on
    args = p.parse_args()
    device = flags.find_device(args.device)
    try:
        backend = functions.use("cuda", device.xp is not np)
    except ValueError as error:
        raise command.InputError(f"{error}") from None
    device.use()
    rows = [
        (convolution, kind, ours(convolution, kind), timed(convolution, kind, args.all))
        for batchsize in args.batchsize
        for precision in args.precision
        for convolution in convolutions(batchsize, precision)
        for kind in KINDS
    ]
    print(f"{record.device_name(device)}, {backend}. Made by `{record.command()}`.\n")
    print(table(rows), end="")


if __name__ == "__main__":
    command.run(main)
