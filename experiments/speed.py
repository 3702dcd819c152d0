"""Measure the training step against PyTorch's, side by side in one run.

  python experiments/speed.py --n 3 9                       ResNet-20 and 56, batch 128
  python experiments/speed.py --n 3 5 7 9 18 --only ours    how cost grows with depth
  python experiments/speed.py --n 3 -b 32 64 128 256 512 --only ours
  python experiments/speed.py --n 3 -o speed                speed.json and speed.md
  python experiments/speed.py --n 3 9 18 --device 0         on a GPU, in each precision

Each variant is a process of its own; they take turns, a few steps each, so that all of them meet
the same machine. (A GPU that only one process may use, in mode EXCLUSIVE_PROCESS, has them one
after the other.) A step is forward, backward and the update of a ResNet with momentum and weight
decay on every parameter, on one batch that stays in the device's memory: no augmentation on either
side. On a GPU 20 steps at a time are measured, from call to completion.

Times are medians with 10 % and 90 %. Processor time is that of all threads of the process together,
waiting in a loop included: on a machine that others use, too, it tells more than the clock does.
Peak memory is the process's, on a GPU what the library's pools have taken from the device.

The floor is no training: it does the multiplications and additions of a step's layers, and nothing
else, as products of large float32 matrices, by the faster of NumPy and oneDNN. That is a direct
step with all else for nothing. The second floor does as many as Winograd's F(4x4, 3x3): a quarter
with stride 1, nine sixteenths with stride 2. Its transforms would be for nothing, too.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
import timeit
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple, TextIO

# Python looks for modules beside the script first, and there 'resnet' is another script.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from resnet import command, files, flags, functions, record, training
from resnet.backends.cpu import onednn, primitives
from resnet.backends.gpu.capture import EAGER, Captured
from resnet.network import CHANNELS, resnet

CPU_BACKENDS = tuple(name for name in functions.BACKENDS if name not in ("auto", *functions.ON_GPU))
OURS = {
    "ours": ("auto", None),
    **{name: (name, None) for name in CPU_BACKENDS},
    **{f"ours {p}": ("cuda", p) for p in functions.PRECISIONS},
    **{f"tensorcores {p}": ("tensorcores", p) for p in functions.PRECISIONS},
}  # variant: backend, precision
TORCH = {
    "torch": "PyTorch",
    "torch channels_last": "PyTorch, channels last",
    "torch compile": "PyTorch, channels last, torch.compile",
    "torch graph": "PyTorch, channels last, torch.compile, one CUDA graph",
}  # may be followed by a precision
# What is left of the products of layers of stride 1 and 2, but for the first layer.
FLOORS = {"floor": (1, 1), "floor winograd": (36 / 144, 81 / 144)}
ON_CPU = ("ours", *CPU_BACKENDS, "torch", "torch channels_last", "torch compile",
          "torch channels_last bf16", "torch compile bf16", *FLOORS)  # fmt: skip
ON_GPU = (*(f"ours {p}" for p in functions.PRECISIONS), "chainer",
          *(f"tensorcores {p}" for p in functions.PRECISIONS), *TORCH,
          *(f"{name} fp16" for name in TORCH if name != "torch"))  # fmt: skip
VARIANTS = tuple(dict.fromkeys(ON_CPU + ON_GPU))
PRECISIONS = {"fp32": "float32", "tf32": "TF32", "fp16": "float16", "bf16": "bfloat16"}
TOGETHER = 20  # steps on a GPU between two looks at the clock: the host runs ahead of it
RATE = 1e-3  # small: the same batch again and again must not blow up
BLANK = "\N{EN DASH}"
SIDE, COLUMNS = 512, 8192  # of the floor's matrices: a factor's side, columns at most
VECTORS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # which of them a processor has
SETTINGS = ("OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "NUMBA_CPU_NAME")
COMPUTE_MODE, EXCLUSIVE_PROCESS = 20, 3  # CUDA's numbers of an attribute and of its value


class Step(NamedTuple):
    """What the process of a variant runs.

    Args:
        run: Trains on one batch once.
        wait: Waits until the device has done what it was asked to.
        peak: Bytes of memory it has taken so far.
        backend: One line of ``functions.use``; of ours only.
    """

    run: Callable[[], object]
    wait: Callable[[], object] = lambda: None
    peak: Callable[[], int] = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    backend: str = ""


def parts(variant: str) -> tuple[str, str]:
    """Split a variant into name and precision.

    PyTorch's float32 may use TF32 on a GPU, as ``ours tf32`` does.
    """
    name, _, last = variant.rpartition(" ")
    return (name, PRECISIONS[last]) if last in PRECISIONS else (variant, "float32")


def step_of(variant: str, n: int, batchsize: int, device) -> Step:
    """Prepare a variant: a training step of a ResNet of 6n + 2 layers, or a floor.

    Raises:
        InputError: The variant cannot run here; the message says why.
    """
    if variant in FLOORS:
        return Step(products(flop(n, *FLOORS[variant]) * batchsize))
    rng = np.random.RandomState(0)
    # Channels last in memory, as augmentation makes them.
    x = rng.standard_normal((batchsize, 32, 32, 3)).astype(np.float32).transpose(0, 3, 1, 2)
    t = rng.randint(0, 10, batchsize).astype(np.int32)
    gpu = device.xp is not np
    if variant not in OURS:
        try:  # an extra, and only this process pays for loading it
            from experiments.torch_network import training_step
        except ImportError:
            raise command.InputError("PyTorch is missing: pip install torch") from None
        number = device.device.id if gpu else None
        return Step(*training_step(n, x, t, RATE, *parts(variant), number))
    name, kind = OURS[variant]
    device.use()
    try:
        backend = functions.use(name, gpu, kind)
    except ValueError as error:
        raise command.InputError(str(error)) from None
    network = resnet(n)
    network.to_device(device)
    optimizer = functions.momentum_sgd(network, training.MOMENTUM, training.WEIGHT_DECAY)
    optimizer.lr = RATE
    x, t = device.send(x), device.send(t)

    def step() -> None:
        loss = functions.softmax_cross_entropy(network(x), t)
        network.cleargrads()
        loss.backward()
        optimizer.update()

    if not gpu:
        return Step(step, backend=backend)
    pools = [device.xp.get_default_memory_pool()]
    if name in functions.ON_GPU:
        step = Captured(step, lambda: None)
        pools.append(step.pool)
    wait = device.xp.cuda.runtime.deviceSynchronize
    return Step(step, wait, lambda: sum(pool.total_bytes() for pool in pools), backend)


def products(count: float) -> Callable[[], object]:
    """Multiply float32 matrices, ``count`` operations, by the faster of two libraries.

    Returns:
        A function that computes them and returns their number and the last one.
    """
    columns = count / (2 * SIDE**2)
    pieces = math.ceil(columns / COLUMNS)
    width = round(columns / pieces)
    a, b, out = (np.ones((SIDE, size), np.float32) for size in (SIDE, width, width))
    ways = [functools.partial(np.matmul, a, b, out)]
    with contextlib.suppress(primitives.Missing):
        plain, one, none = ctypes.c_char(b"N"), ctypes.c_float(1), ctypes.c_float(0)
        side, size = ctypes.c_int64(SIDE), ctypes.c_int64(width)
        # These pointers keep their matrices alive.
        a, b, c = (matrix.ctypes.data_as(ctypes.c_void_p) for matrix in (a, b, out))
        words = plain, plain, side, size, side, one, a, side, b, size, none, c, size
        ways.append(functools.partial(primitives.library().dnnl_sgemm, *words))
    fastest = min(ways, key=lambda way: median(timeit.repeat(way, number=1, repeat=5)))

    def run() -> tuple[int, np.ndarray]:
        for _ in range(pieces):
            fastest()
        return pieces, out

    return run


def flop(n: int, same: float = 1, strided: float = 1) -> float:
    """Count the floating-point operations of a training step per image: the products alone.

    Forward, and backward for weights and inputs, but for the inputs of the first layer.

    Args:
        n: Modules per block.
        same, strided: What of the products of layers of stride 1 and 2 is counted.
    """
    first, second, third = CHANNELS
    stem, fc = 32 * 32 * 9 * 3 * first, third * 10
    same *= 32 * 32 * 2 * n * first**2 + (2 * n - 1) * (16 * 16 * second**2 + 8 * 8 * third**2)
    strided *= 16 * 16 * first * second + 8 * 8 * second * third
    return 2 * (3 * (9 * (same + strided) + fc) + 2 * stem)


def work(variant: str, n: int, batchsize: int, device, out: TextIO) -> None:
    """Be a variant's process: for each number read, measure so often, and print a line."""

    def answer(**values) -> None:
        print(json.dumps(values), file=out, flush=True)

    gpu = device.xp is not np
    try:
        step = step_of(variant, n, batchsize, device)
        for _ in range(EAGER + 2 if gpu else 2):
            step.run()  # compiles, builds primitives and plans, fills caches, records
        step.wait()
        if isinstance(step.run, Captured) and step.run.graph is None:
            raise RuntimeError("no CUDA graph of its step; the warning above says why")
    except command.InputError as error:
        answer(error=str(error))
        return
    except Exception as error:  # of another library, whatever it is: this variant cannot run
        traceback.print_exc()
        answer(error=(str(error).strip().splitlines() or [type(error).__name__])[0])
        return
    answer(backend=step.backend)
    together = TOGETHER if gpu else 1
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            wall, processor = time.perf_counter(), time.process_time()
            for _ in range(together):
                step.run()
            step.wait()
            spent = time.perf_counter() - wall, time.process_time() - processor
            times.append([seconds / together for seconds in spent])
        answer(times=times, together=together, peak=step.peak() / 2**20)


class Worker:
    """The process of one variant, and what it has measured.

    Args:
        variant: One of ``VARIANTS``.
        n: Modules per block.
        batchsize: Images per step.
        device: Flag ``--device`` of the process.
    """

    def __init__(self, variant: str, n: int, batchsize: int, device: str) -> None:
        self.variant = variant
        self.times: list[list[float]] = []  # of a step: by the clock, of the processors
        words = [sys.executable, __file__, "--work", variant, "--n", str(n), "-b", str(batchsize)]
        words += ["--device", device]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        answer = self._answer()
        self.error, self.backend = answer.get("error"), answer.get("backend")

    def measure(self, count: int) -> float:
        """Let it measure ``count`` times; returns the seconds that took."""
        if self.error is None:
            with contextlib.suppress(BrokenPipeError):  # it died; there will be no answer
                print(count, file=self.process.stdin, flush=True)
            answer = self._answer()
            self.error = answer.get("error")
        if self.error is not None:
            return 0.0
        self.times += answer["times"]
        self.peak, self.together = answer["peak"], answer["together"]
        return sum(wall for wall, _ in answer["times"]) * self.together

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            return {"error": f"its process ended with status {self.process.wait()}"}
        return json.loads(line)


def measure(
    n: int, batchsize: int, variants: list[str], rounds: int, turn: float, device: str = "cpu"
) -> list[dict]:
    """Let the variants take turns of about ``turn`` seconds; a result for each."""
    workers = []
    for variant in variants:
        print(f"# ResNet-{resnet.depth(n)}, batch {batchsize}: starting {variant}", file=sys.stderr)
        workers.append(Worker(variant, n, batchsize, device))
    counts = {}
    for worker in workers:  # one each tells how many fill a turn; it is not counted
        counts[worker.variant] = max(1, round(turn / max(worker.measure(1), 1e-3)))
        worker.times.clear()
    for k in range(rounds):
        print(f"# round {k + 1} of {rounds}", file=sys.stderr)
        first = k % len(workers)  # no one always first
        for worker in workers[first:] + workers[:first]:
            worker.measure(counts[worker.variant])
    for worker in workers:
        worker.stop()
    return [result(worker, n, batchsize) for worker in workers]


def is_exclusive(device) -> bool:
    """Tell whether one process at a time may use this GPU."""
    if device.xp is np:
        return False
    attribute = device.xp.cuda.runtime.deviceGetAttribute
    return attribute(COMPUTE_MODE, device.device.id) == EXCLUSIVE_PROCESS


def result(worker: Worker, n: int, batchsize: int) -> dict:
    """Sum up what one variant has measured."""
    found = {"layers": resnet.depth(n), "batchsize": batchsize, "variant": worker.variant}
    found |= {"precision": parts(worker.variant)[1], "backend": worker.backend}
    if worker.error is not None:
        return {**found, "error": worker.error}
    for name, values in zip(("ms", "processor ms"), np.transpose(worker.times), strict=True):
        low, middle, high = 1000 * np.percentile(values, (10, 50, 90))
        found |= {name: middle, f"{name} 10 %": low, f"{name} 90 %": high}
    return {
        **found,
        "steps": len(worker.times) * worker.together,
        "images/s": 1000 * batchsize / found["ms"],
        "peak MiB": worker.peak,
        "GFLOP/s": flop(n) * batchsize / found["ms"] / 1e6,
    }


def label(r: dict) -> str:
    """Name a variant in the table."""
    if r["variant"] in FLOORS:
        return r["variant"].replace("winograd", "of F(4x4, 3x3)")
    if r["variant"] in OURS:
        return "this project, " + (r["backend"] or OURS[r["variant"]][0]).split()[0]
    return TORCH[parts(r["variant"])[0]]


def table(results: list[dict]) -> str:
    """Lay out the results as a Markdown table.

    How many times as fast each one is as the best of PyTorch's, in float32 and in any precision, by
    wall time and in brackets by processor time.
    """
    head = ["Layers", "Batch", "Variant", "Precision", "ms per step (10 % .. 90 %)",
            "Processor ms (10 % .. 90 %)", "Images/s", "Best float32 PyTorch = 1",
            "Best PyTorch = 1", "Peak MiB", "Floor = 1"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for r in results:
        start = [str(r["layers"]), str(r["batchsize"]), label(r), r["precision"]]
        if "error" in r:
            lines.append([*start, f"not run: {r['error']}", *[BLANK] * 6])
            continue
        beside = [
            q
            for q in results
            if "error" not in q and (q["layers"], q["batchsize"]) == (r["layers"], r["batchsize"])
        ]
        torch = [q for q in beside if q["variant"].startswith("torch")]
        full = [q for q in torch if q["precision"] == "float32"]
        floor = [q for q in beside if q["variant"] == "floor"]
        lines.append(
            [*start, spread(r, "ms"), spread(r, "processor ms"), f"{r['images/s']:.0f}",
             ratio(r, full), ratio(r, torch), f"{r['peak MiB']:.0f}", ratio(r, floor)]
        )  # fmt: skip
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def spread(r: dict, name: str) -> str:
    """Write median and deciles."""
    digits = 1 if r[name] >= 10 else 3
    values = (f"{r[key]:.{digits}f}" for key in (name, f"{name} 10 %", f"{name} 90 %"))
    return "{} ({} .. {})".format(*values)


def ratio(r: dict, rivals: list[dict]) -> str:
    """Write how many times as fast it is as the best of the others."""
    if not rivals:
        return BLANK
    best = (min(q[name] for q in rivals) / r[name] for name in ("ms", "processor ms"))
    return "{:.2f} ({:.2f})".format(*best)


def conditions(device) -> dict:
    """Tell what the measurement was made on."""
    try:
        from importlib.metadata import version

        torch = version("torch")
    except ImportError:
        torch = None
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:  # not Linux
        words = []
    machine = f"{os.cpu_count()} cores", platform.machine(), *(v for v in VECTORS if v in words)
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    return {
        "processor": ", ".join((record.processor(), *machine)),
        "device": record.device_name(device),
        "threads": onednn.threads(),
        "backend": functions.use("auto", device.xp is not np),
        "versions": {**record.versions(), "torch": torch},
        "git": record.git_state(),
        "command": " ".join((*settings, record.command())),
    }


def main() -> None:
    p = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    p.add_argument("--n", type=flags.whole_number(*flags.DEPTH), nargs="+", default=[3],
        metavar="N", help="modules per block (default: 3)")
    p.add_argument("--batchsize", "-b", type=flags.whole_number(*flags.BATCH), nargs="+",
        default=[128], metavar="B", help="images per step (default: 128)")
    p.add_argument("--only", choices=VARIANTS, nargs="+",
        help="measure these variants only (default: all that the device is for)")
    p.add_argument("--device", "-d", default="cpu", metavar="D",
        help="cpu, or the number of a GPU (default: cpu)")
    p.add_argument("--rounds", type=flags.whole_number(1, 10_000), default=10, metavar="R",
        help="turns of every variant (default: 10)")
    p.add_argument("--turn", type=flags.number(0, 3600), default=2, metavar="SECONDS",
        help="length of a turn, one step at least (default: 2)")
    p.add_argument("--out", "-o", type=command.path, metavar="NAME",
        help="write NAME.json and NAME.md besides")
    p.add_argument("--work", choices=VARIANTS, help=argparse.SUPPRESS)
    # fmt: on
    args = p.parse_args()
    device = flags.find_device(args.device)
    if args.work:
        with os.fdopen(os.dup(1), "w") as out:
            os.dup2(2, 1)  # what libraries print is no answer
            work(args.work, args.n[0], args.batchsize[0], device, out)
        return
    gpu = device.xp is not np
    possible = ON_GPU if gpu else ON_CPU
    variants = args.only or list(possible)
    if not args.only and not gpu:
        variants.remove(functions.use().split()[0])  # "ours" is this backend
    if not set(variants) <= set(possible):
        found = next(variant for variant in variants if variant not in possible)
        raise command.InputError(
            f"--only: found '{found}', legal with --device {args.device}: {', '.join(possible)}",
            command.USAGE,
        )
    if args.out and not args.out.parent.is_dir():  # to be known before all is measured
        raise command.InputError(
            f"--out: found '{args.out}', legal: a name in a folder that exists", command.USAGE
        )
    groups = [[variant] for variant in variants] if is_exclusive(device) else [variants]
    results = []
    for n, batchsize, group in itertools.product(args.n, args.batchsize, groups):
        results += measure(n, batchsize, group, args.rounds, args.turn, args.device)
    made = conditions(device)
    text = (
        f"{made['processor']}, {made['device'] + ', ' if gpu else ''}{made['threads']} threads, "
        f"PyTorch {made['versions']['torch'] or 'missing'}, {made['backend']}. "
        f"Made by `{made['command']}`.\n\n{table(results)}"
    )
    print(text)
    if args.out:
        files.write_json(args.out.with_suffix(".json"), {**made, "results": results})
        files.write(args.out.with_suffix(".md"), text)
    wanted = OURS if args.only or gpu else ("ours",)  # not every processor has every backend
    failed = [r for r in results if "error" in r and r["variant"] in wanted]
    if failed:
        raise command.InputError("not run: {variant} ({error})".format(**failed[0]))


if __name__ == "__main__":
    command.run(main)
