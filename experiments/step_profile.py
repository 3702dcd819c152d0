"""Where the time of a training step goes: that of each pass of the CPU backend.

  OMP_NUM_THREADS=1 python experiments/step_profile.py --n 3    processor time
  python experiments/step_profile.py --n 3                      by the clock, with all threads

With one thread, what a pass costs is what this process has computed in it, whatever else runs. With
more it is time by the clock, in which work that one of them does alone shows in full; let nothing
else run. Medians over steps.

``--without`` leaves steps of Winograd's convolutions out, the transforms to the points, those back
or the products: the results are wrong then, and what a step costs is what is missing.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

# Python looks for modules beside the script first, and there 'resnet' is another script.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from resnet import command, flags, functions
from resnet.backends.cpu import onednn
from resnet.network import resnet

BATCHSIZE = flags.BATCHSIZE
PASSES = {  # function of resnet.backends.cpu.kernels -> what it is
    "convolve_by_tiles": "Winograd's convolutions, forward",
    "convolve_backward_by_tiles": "Winograd's convolutions, both gradients",
    "convolve": "direct convolutions, forward",
    "convolve_backward": "direct convolutions, both gradients",
    "filters_from_points": "filters' gradients from the points",
    "output_gradient": "gradient before the last ReLU",
    "finish": "last normalization and ReLU",
    "widen": "shortcuts of option A",
    "widen_gradient": "shortcuts of option A",
    "batch_statistics": "statistics of the batch",
    "scale_and_shift": "statistics of the batch",
    "input_coefficients": "statistics of the batch",
    "momentum_step": "optimizer",
}

STEPS = {"read": "transforms to the points", "write": "transforms back", "product": "products"}


def leave_out(steps: list[str]) -> str:
    """Have Winograd's convolutions compiled without these of their ``STEPS``; what to call that."""
    for each in steps:
        setattr(onednn.winograd.Steps, each, lambda *_, **__: None)
        onednn.winograd.KEPT = Path(os.devnull)  # such code is not kept
    return "".join(f", without the {STEPS[each]}" for each in steps)


def measured(function, times: list[float], clock):
    """Wrap ``function``, which then adds its time to the last of ``times``."""

    @functools.wraps(function)
    def call(*arguments):
        begin = clock()
        result = function(*arguments)
        times[-1] += clock() - begin
        return result

    return call


def main() -> None:
    p = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=flags.whole_number(*flags.DEPTH), default=3, metavar="N",
                   help="modules per block (default: %(default)s)")  # fmt: skip
    p.add_argument("--steps", type=flags.whole_number(1, 10**6), default=20, metavar="K",
                   help="steps that are measured (default: %(default)s)")  # fmt: skip
    p.add_argument("--backend", choices=("onednn", "winograd"), default="winograd",
                   help="what computes (default: %(default)s)")  # fmt: skip
    p.add_argument("--without", choices=STEPS, nargs="+", default=[], metavar="STEP",
                   help=f"leave out of Winograd's convolutions: {', '.join(STEPS)}")  # fmt: skip
    args = p.parse_args()
    if args.without and args.backend != "winograd":
        p.error(f"--without: found with --backend {args.backend}, legal: with winograd")
    line = flags.choose_backend(args.backend, flags.find_device("cpu"))
    profile(args.n, args.steps, line + leave_out(args.without))


def profile(n: int, steps: int, line: str) -> None:
    """Train ``steps`` steps and print what each pass of them took."""
    if onednn.threads() > 1:
        clock, kind = time.perf_counter, "by the clock"
    else:
        clock, kind = time.thread_time, "of processor time"
    kernels = onednn.kernels
    times = defaultdict(list)
    for name, what in PASSES.items():
        setattr(kernels, name, measured(getattr(kernels, name), times[what], clock))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCHSIZE, 3, 32, 32)).astype(np.float32)
    t = rng.integers(0, 10, BATCHSIZE).astype(np.int32)
    network = resnet(n)
    optimizer = functions.momentum_sgd(network, 0.9, 1e-4)
    optimizer.lr = 0.01
    whole = []
    for step in range(3 + steps):
        for each in times.values():
            each.append(0.0)
        begin = clock()
        loss = functions.softmax_cross_entropy(network(x), t)
        network.cleargrads()
        loss.backward()
        optimizer.update()
        whole.append(clock() - begin)
        if step < 3:  # compiles, and finds its memory
            whole.clear()
            for each in times.values():
                each.clear()
    total = statistics.median(whole)
    rows = sorted(((statistics.median(each), what) for what, each in times.items()), reverse=True)
    rows.append((total - sum(seconds for seconds, _ in rows), "pooling, loss, graph and the rest"))
    what = f"ResNet-{resnet.depth(n)}, batch {BATCHSIZE}, {line}"
    print(f"{what}: {1e3 * total:.0f} ms a step {kind}\n")
    print("| pass | ms | share |\n| --- | --- | --- |")
    for seconds, what in rows:
        if seconds > 0:
            print(f"| {what} | {1e3 * seconds:.2f} | {seconds / total:.0%} |")


if __name__ == "__main__":
    command.run(main)
