"""Measure the training step against PyTorch's, side by side in one run.

  python experiments/speed.py --n 3 9                       ResNet-20 and 56, batch 128
  python experiments/speed.py --n 3 5 7 9 18 --only ours    how cost grows with depth
  python experiments/speed.py --n 3 -b 32 64 128 256 512 --only ours
  python experiments/speed.py --n 3 -o speed                speed.json and speed.md

Each variant is a process of its own; they take turns, a few steps each, so that all of them meet
the same machine. A step is forward, backward and the update of a ResNet with momentum and weight
decay on every parameter, float32, on one batch that stays in memory: no augmentation on either
side.
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
from resnet.network import CHANNELS, layers, resnet

OURS = {"ours": "onednn", "chainer": "chainer"}  # variant: backend
TORCH = ("torch", "torch channels_last", "torch compile")
VARIANTS = (*OURS, *TORCH)
NAMES = {"ours": "this project, oneDNN", "chainer": "this project, Chainer's own functions",
         "torch": "PyTorch", "torch channels_last": "PyTorch, channels last",
         "torch compile": "PyTorch, channels last, torch.compile"}  # fmt: skip
RATE = 1e-3  # small: the same batch again and again must not blow up
BLANK = "\N{EN DASH}"
GEMM = 2048  # side of the matrices whose product measures the processor


def step_of(variant: str, n: int, batchsize: int) -> Callable[[], None]:
    """A function that trains a ResNet of 6n + 2 layers on one batch once.

    Raises:
        RuntimeError: The variant cannot run here; the message says why.
    """
    rng = np.random.RandomState(0)
    # Channels last in memory, as augmentation makes them.
    x = rng.standard_normal((batchsize, 32, 32, 3)).astype(np.float32).transpose(0, 3, 1, 2)
    t = rng.randint(0, 10, batchsize).astype(np.int32)
    if variant in OURS:
        try:
            functions.use(OURS[variant])
        except ValueError as error:
            raise RuntimeError(str(error)) from None
        network = resnet(n)
        optimizer = functions.momentum_sgd(network, training.MOMENTUM, training.WEIGHT_DECAY)
        optimizer.lr = RATE

        def step() -> None:
            loss = functions.softmax_cross_entropy(network(x), t)
            network.cleargrads()
            loss.backward()
            optimizer.update()

        return step
    return torch_step(variant, n, x, t)


def torch_step(variant: str, n: int, x: np.ndarray, t: np.ndarray) -> Callable[[], None]:
    """The same in PyTorch."""
    try:
        import torch  # an extra, and only this process pays for loading it

        from experiments.torch_network import TorchNetwork
    except ImportError:
        raise RuntimeError("PyTorch is missing: pip install torch") from None
    torch.set_num_threads(functions.onednn.threads())
    network = TorchNetwork("resnet", n)
    inputs, labels = torch.as_tensor(x), torch.as_tensor(t, dtype=torch.int64)
    if variant == "torch":
        inputs = inputs.contiguous()
    else:
        network = network.to(memory_format=torch.channels_last)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    forward = torch.compile(network) if variant == "torch compile" else network
    optimizer = torch.optim.SGD(
        network.parameters(), RATE, training.MOMENTUM, weight_decay=training.WEIGHT_DECAY
    )

    def step() -> None:
        loss = torch.nn.functional.cross_entropy(forward(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def work(variant: str, n: int, batchsize: int) -> None:
    """A variant's process: for each number read, so many steps and a line with their seconds."""
    try:
        step = step_of(variant, n, batchsize)
        step()  # compiles, builds primitives, fills caches
        step()
    except Exception as error:  # of another library, whatever it is: this variant cannot run
        print(json.dumps({"error": str(error).strip().splitlines()[0]}), flush=True)
        return
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "peak": peak}), flush=True)


class Worker:
    """The process of one variant, and what it has measured.

    Args:
        variant: One of ``VARIANTS``.
        n: Modules per block.
        batchsize: Images per step.
    """

    def __init__(self, variant: str, n: int, batchsize: int) -> None:
        self.variant = variant
        self.seconds: list[float] = []
        self.peak = 0.0
        words = [sys.executable, __file__, "--work", variant, "--n", str(n), "-b", str(batchsize)]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip
        self.error = self._answer().get("error")

    def steps(self, count: int) -> float:
        """Let it do ``count`` steps; returns the seconds they took."""
        print(count, file=self.process.stdin, flush=True)
        answer = self._answer()
        if "error" in answer:
            self.error = answer["error"]
            return 0.0
        self.seconds += answer["seconds"]
        self.peak = answer["peak"]
        return sum(answer["seconds"])

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


def measure(n: int, batchsize: int, variants: list[str], rounds: int, turn: float) -> list[dict]:
    """Let the variants take turns of about ``turn`` seconds; a result for each."""
    workers = []
    for variant in variants:
        print(f"# ResNet-{layers(n)}, batch {batchsize}: starting {variant}", file=sys.stderr)
        workers.append(Worker(variant, n, batchsize))
    alive = [worker for worker in workers if worker.error is None]
    counts = {}
    for worker in alive:  # one step each tells how many fill a turn; it is not counted
        counts[worker.variant] = max(1, round(turn / max(worker.steps(1), 1e-3)))
        worker.seconds.clear()
    rates = []
    for k in range(rounds):
        print(f"# round {k + 1} of {rounds}", file=sys.stderr)
        rates.append(gemm_rate(1))
        for worker in alive[k % len(alive) :] + alive[: k % len(alive)]:  # no one always first
            worker.steps(counts[worker.variant])
    for worker in alive:
        worker.stop()
    return [result(worker, n, batchsize, median(rates)) for worker in workers]


def result(worker: Worker, n: int, batchsize: int, rate: float) -> dict:
    """What one variant has measured."""
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
        "steps": len(worker.seconds),
        "images/s": batchsize / middle,
        "peak MiB": worker.peak,
        "of sgemm": flop(n) * batchsize / middle / rate,
        "sgemm GFLOP/s": rate / 1e9,
    }


def table(results: list[dict]) -> str:
    """The results as a Markdown table, with each one's ratio to the best of PyTorch's."""
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
            and q["variant"] in TORCH
            and (q["layers"], q["batchsize"]) == (r["layers"], r["batchsize"])
        ]
        spread = f"{r['ms']:.1f} ({r['ms 10 %']:.1f} .. {r['ms 90 %']:.1f})"
        ratio = f"{r['images/s'] / max(rivals):.2f}" if rivals else BLANK
        numbers = [f"{r['images/s']:.0f}", ratio, f"{r['peak MiB']:.0f}", f"{r['of sgemm']:.0%}"]
        lines.append([*label, spread, *numbers])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def conditions() -> dict:
    """What the measurement was made on."""
    try:
        from importlib.metadata import version

        torch = version("torch")
    except ImportError:
        torch = None
    return {
        "processor": f"{os.cpu_count()} cores, {platform.machine()}",
        "threads": functions.onednn.threads(),
        "backend": functions.use("auto"),
        "versions": {**record.versions(), "torch": torch},
        "git": record.git_state(),
        "command": record.command(),
    }


def main() -> None:
    p = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    p.add_argument("--n", type=flags.whole_number(1), nargs="+", default=[3], metavar="N",
        help="modules per block (default: 3)")
    p.add_argument("--batchsize", "-b", type=flags.whole_number(1), nargs="+", default=[128],
        metavar="B", help="images per step (default: 128)")
    p.add_argument("--only", choices=VARIANTS, nargs="+", default=VARIANTS,
        help="measure these variants only (default: all)")
    p.add_argument("--rounds", type=flags.whole_number(1), default=10, metavar="R",
        help="turns of every variant (default: 10)")
    p.add_argument("--turn", type=flags.number(0), default=2, metavar="SECONDS",
        help="length of a turn, one step at least (default: 2)")
    p.add_argument("--out", "-o", type=Path, metavar="NAME",
        help="write NAME.json and NAME.md besides")
    p.add_argument("--work", choices=VARIANTS, help=argparse.SUPPRESS)
    # fmt: on
    args = p.parse_args()
    if args.work:
        work(args.work, args.n[0], args.batchsize[0])
        return
    results = []
    for n in args.n:
        for batchsize in args.batchsize:
            results += measure(n, batchsize, list(args.only), args.rounds, args.turn)
    made = conditions()
    text = (
        f"Float32, {made['threads']} threads, {made['processor']}, "
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
