"""Measure the training step against PyTorch's, side by side in one run.

  python experiments/speed.py --n 3 9                       ResNet-20 and 56, batch 128
  python experiments/speed.py --n 3 5 7 9 18 --only ours    how cost grows with depth
  python experiments/speed.py --n 3 -b 32 64 128 256 512 --only ours
  python experiments/speed.py --n 3 -o speed                speed.json and speed.md
  python experiments/speed.py --n 3 9 18 --device 0         on a GPU, in each precision

Each variant is a process of its own; they take turns, a few steps each, so that all of them meet
the same machine. A step is forward, backward and the update of a ResNet with momentum and weight
decay on every parameter, on one batch that stays in the device's memory: no augmentation on either
side. On the CPU all is float32; on a GPU 20 steps at a time are measured, from call to completion.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

# Python looks for modules beside the script first, and there 'resnet' is another script.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from resnet import command, files, flags, functions, record, training
from resnet.functions.capture import EAGER, Captured
from resnet.network import CHANNELS, layers, resnet

OURS = {
    "ours": ("onednn", None),
    "chainer": ("chainer", None),
    **{f"ours {p}": ("cuda", p) for p in functions.PRECISIONS},
}  # variant: backend, precision
TORCH = ("torch", "torch channels_last", "torch compile")
HALF = ("ours fp16", "torch amp", "torch compile amp", "torch graph amp")  # the others: float32
ON_CPU = ("ours", "chainer", *TORCH)
ON_GPU = ("ours fp32", "ours tf32", "ours fp16", "chainer", *TORCH, "torch graph", *HALF[1:])
VARIANTS = tuple(dict.fromkeys(ON_CPU + ON_GPU))
NAMES = {"ours": "this project, oneDNN", "chainer": "this project, Chainer's own functions",
         **{f"ours {p}": f"this project, CUDA, {p}" for p in functions.PRECISIONS},
         "torch": "PyTorch", "torch channels_last": "PyTorch, channels last",
         "torch compile": "PyTorch, channels last, torch.compile",
         "torch graph": "PyTorch, channels last, torch.compile, one CUDA graph",
         "torch amp": "PyTorch, channels last, float16",
         "torch compile amp": "PyTorch, channels last, float16, torch.compile",
         "torch graph amp": "PyTorch, channels last, float16, torch.compile, one CUDA graph",
         }  # fmt: skip
TOGETHER = 20  # steps on a GPU between two looks at the clock: the host runs ahead of it
SCALE = 1024  # of PyTorch's float16 loss, as of our float16 gradients
RATE = 1e-3  # small: the same batch again and again must not blow up
BLANK = "\N{EN DASH}"
GEMM = 2048  # side of the matrices whose product measures the processor


def step_of(variant: str, n: int, batchsize: int, device) -> tuple[Callable, Callable]:
    """A function that trains a ResNet of 6n + 2 layers on one batch once.

    Returns:
        It, and one that waits until the device has done what it was asked to.

    Raises:
        RuntimeError: The variant cannot run here; the message says why.
    """
    rng = np.random.RandomState(0)
    # Channels last in memory, as augmentation makes them.
    x = rng.standard_normal((batchsize, 32, 32, 3)).astype(np.float32).transpose(0, 3, 1, 2)
    t = rng.randint(0, 10, batchsize).astype(np.int32)
    if variant not in OURS:
        return torch_step(variant, n, x, t, device)
    backend, precision = OURS[variant]
    device.use()
    gpu = device.xp is not np
    try:
        functions.use(backend, gpu, precision)
    except ValueError as error:
        raise RuntimeError(str(error)) from None
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
        return step, lambda: None
    wait = device.xp.cuda.runtime.deviceSynchronize
    return (Captured(step, lambda: None) if backend == "cuda" else step), wait


def torch_step(variant: str, n: int, x, t, device) -> tuple[Callable, Callable]:
    """The same in PyTorch."""
    try:
        import torch  # an extra, and only this process pays for loading it

        from experiments.torch_network import TorchNetwork
    except ImportError:
        raise RuntimeError("PyTorch is missing: pip install torch") from None
    gpu = device.xp is not np
    if gpu and not torch.cuda.is_available():
        raise RuntimeError("this PyTorch has no CUDA")
    there = torch.device("cuda", device.device.id) if gpu else torch.device("cpu")
    torch.set_num_threads(functions.onednn.threads())
    torch.backends.cudnn.benchmark = True
    network = TorchNetwork("resnet", n).to(there)
    inputs, labels = torch.as_tensor(x).to(there), torch.as_tensor(t, dtype=torch.int64).to(there)
    if variant == "torch":
        inputs = inputs.contiguous()
    else:
        network = network.to(memory_format=torch.channels_last)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    compiles = "compile" in variant or "graph" in variant
    forward = torch.compile(network) if compiles else network
    half = variant in HALF
    scale = SCALE if half else 1
    optimizer = torch.optim.SGD(
        network.parameters(), RATE / scale, training.MOMENTUM, weight_decay=training.WEIGHT_DECAY,
        fused=gpu,
    )  # fmt: skip

    def step() -> None:
        with torch.autocast(there.type, torch.float16, enabled=half):
            loss = torch.nn.functional.cross_entropy(forward(inputs), labels)
        optimizer.zero_grad()
        (loss * scale if half else loss).backward()
        optimizer.step()

    if not gpu:
        return step, lambda: None
    return (torch_graph(step) if "graph" in variant else step), torch.cuda.synchronize


def torch_graph(step: Callable[[], None]) -> Callable[[], None]:
    """A step of PyTorch's as one CUDA graph."""
    import torch

    side = torch.cuda.Stream()  # the default stream cannot be recorded
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(EAGER):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def work(variant: str, n: int, batchsize: int, device) -> None:
    """A variant's process: for each number read, so many measurements, and a line with them."""
    try:
        step, wait = step_of(variant, n, batchsize, device)
        for _ in range(2 if device.xp is np else EAGER + 2):
            step()  # compiles, builds primitives and plans, fills caches, records
        wait()
    except Exception as error:  # of another library, whatever it is: this variant cannot run
        print(json.dumps({"error": str(error).strip().splitlines()[0]}), flush=True)
        return
    print(json.dumps({}), flush=True)
    together = 1 if device.xp is np else TOGETHER
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            begin = time.perf_counter()
            for _ in range(together):
                step()
            wait()
            seconds.append((time.perf_counter() - begin) / together)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "together": together, "peak": peak}), flush=True)


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
        self.seconds: list[float] = []
        self.peak = 0.0
        words = [sys.executable, __file__, "--work", variant, "--n", str(n), "-b", str(batchsize)]
        words += ["--device", device]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip
        self.error = self._answer().get("error")

    def measure(self, count: int) -> float:
        """Let it measure ``count`` times; returns the seconds that took."""
        print(count, file=self.process.stdin, flush=True)
        answer = self._answer()
        if "error" in answer:
            self.error = answer["error"]
            return 0.0
        self.seconds += answer["seconds"]
        self.peak = answer["peak"]
        self.together = answer["together"]
        return sum(answer["seconds"]) * self.together

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": "its process died"}


def gemm_rate(count: int = 5) -> float:
    """Median rate of a float32 matrix product, in flop per second."""
    a = np.ones((GEMM, GEMM), np.float32)
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begin)
    return 2 * GEMM**3 / median(seconds)


def flop(n: int) -> int:
    """Floating-point operations that a training step needs per image: the products alone.

    Forward, and backward for weights and inputs, but for the inputs of the first layer.
    """
    first, second, third = CHANNELS
    stem = 32 * 32 * 9 * 3 * first
    rest = 32 * 32 * 9 * 2 * n * first * first
    rest += 16 * 16 * 9 * (first * second + (2 * n - 1) * second * second)
    rest += 8 * 8 * 9 * (second * third + (2 * n - 1) * third * third) + third * 10
    return 2 * (3 * rest + 2 * stem)


def measure(
    n: int, batchsize: int, variants: list[str], rounds: int, turn: float, device: str = "cpu"
) -> list[dict]:
    """Let the variants take turns of about ``turn`` seconds; a result for each."""
    workers = []
    for variant in variants:
        print(f"# ResNet-{layers(n)}, batch {batchsize}: starting {variant}", file=sys.stderr)
        workers.append(Worker(variant, n, batchsize, device))
    alive = [worker for worker in workers if worker.error is None]
    counts = {}
    for worker in alive:  # one each tells how many fill a turn; it is not counted
        counts[worker.variant] = max(1, round(turn / max(worker.measure(1), 1e-3)))
        worker.seconds.clear()
    rates = []
    for k in range(rounds):
        print(f"# round {k + 1} of {rounds}", file=sys.stderr)
        if device == "cpu":
            rates.append(gemm_rate(1))
        for worker in alive[k % len(alive) :] + alive[: k % len(alive)]:  # no one always first
            worker.measure(counts[worker.variant])
    for worker in alive:
        worker.stop()
    rate = median(rates) if rates else None
    return [result(worker, n, batchsize, rate) for worker in workers]


def result(worker: Worker, n: int, batchsize: int, rate: float | None) -> dict:
    """What one variant has measured; ``rate`` is that of the processor's matrix product."""
    found = {"layers": layers(n), "batchsize": batchsize, "variant": worker.variant}
    if worker.error is not None:
        return {**found, "error": worker.error}
    middle = median(worker.seconds)
    low, high = np.percentile(worker.seconds, (10, 90))
    return {
        **found,
        "ms": 1000 * middle,
        "ms 10 %": 1000 * low,
        "ms 90 %": 1000 * high,
        "steps": len(worker.seconds) * worker.together,
        "images/s": batchsize / middle,
        "peak MiB": worker.peak,
        "GFLOP/s": flop(n) * batchsize / middle / 1e9,
        "of sgemm": rate and flop(n) * batchsize / middle / rate,
        "sgemm GFLOP/s": rate and rate / 1e9,
    }


def table(results: list[dict]) -> str:
    """The results as a Markdown table, with each one's ratio to the best of PyTorch's.

    float16 is compared with float16. PyTorch's float32 may use TF32, as ``ours tf32`` does.
    """
    head = ["Layers", "Batch", "Variant", "ms per step (10 % .. 90 %)", "Images/s",
            "Best PyTorch = 1", "Peak MiB", "Of sgemm"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for r in results:
        label = [str(r["layers"]), str(r["batchsize"]), NAMES[r["variant"]]]
        if "error" in r:
            lines.append([*label, f"not run: {r['error']}", *[BLANK] * 4])
            continue
        rivals = [
            q["images/s"]
            for q in results
            if "error" not in q
            and q["variant"] not in OURS
            and (q["variant"] in HALF) == (r["variant"] in HALF)
            and (q["layers"], q["batchsize"]) == (r["layers"], r["batchsize"])
        ]
        digits = 1 if r["ms"] >= 10 else 3
        times = (f"{r[key]:.{digits}f}" for key in ("ms", "ms 10 %", "ms 90 %"))
        spread = "{} ({} .. {})".format(*times)
        ratio = f"{r['images/s'] / max(rivals):.2f}" if rivals else BLANK
        share = BLANK if r["of sgemm"] is None else f"{r['of sgemm']:.0%}"
        numbers = [f"{r['images/s']:.0f}", ratio, f"{r['peak MiB']:.0f}", share]
        lines.append([*label, spread, *numbers])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def conditions(device) -> dict:
    """What the measurement was made on."""
    try:
        from importlib.metadata import version

        torch = version("torch")
    except ImportError:
        torch = None
    return {
        "processor": f"{os.cpu_count()} cores, {platform.machine()}",
        "device": record.device_name(device),
        "threads": functions.onednn.threads(),
        "backend": functions.use("auto", device.xp is not np),
        "versions": {**record.versions(), "torch": torch},
        "git": record.git_state(),
        "command": record.command(),
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
        work(args.work, args.n[0], args.batchsize[0], device)
        return
    possible = ON_CPU if device.xp is np else ON_GPU
    variants = args.only or possible
    if not set(variants) <= set(possible):
        found = next(variant for variant in variants if variant not in possible)
        raise command.InputError(
            f"--only: found '{found}', legal with --device {args.device}: {', '.join(possible)}",
            command.USAGE,
        )
    results = []
    for n in args.n:
        for batchsize in args.batchsize:
            results += measure(n, batchsize, variants, args.rounds, args.turn, args.device)
    made = conditions(device)
    text = (
        f"{'Float32' if device.xp is np else made['processor']}, {made['device']}, "
        f"{made['threads']} threads, "
        f"PyTorch {made['versions']['torch'] or 'missing'}, {made['backend']}. "
        f"Made by `{made['command']}`.\n\n{table(results)}"
    )
    print(text)
    if args.out:
        files.write_json(args.out.with_suffix(".json"), {**made, "results": results})
        with files.whole(args.out.with_suffix(".md")) as temporary:
            temporary.write_text(text)


if __name__ == "__main__":
    command.run(main)
