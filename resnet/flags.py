"""The command-line flags that all experiments share."""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from pathlib import Path

import chainer
import numpy as np

from resnet import augmentation, functions, parallel
from resnet.command import USAGE, InputError, Parser, path
from resnet.schedule import LAST_EPOCHS, STAGES

BATCHSIZE = 128  # He et al. 2015, 4.2, and the report
# Legal values, beyond all that is useful, so that a slip shows at once.
DEPTH = (1, 1000)  # modules per block; He et al. 2015 went up to 200
BATCH = (1, 50_000)  # images
SEED = (0, 2**32 - 1)  # NumPy's
EPOCHS = (1, 1_000_000)
SECONDS = (0, 1e9)  # 30 years
# Epochs of partial training, and of its stages; --epoch is the last one's length.
PARTIAL = {f"stage {k}": length for k, (length, _) in enumerate(STAGES, 1)}
PARTIAL["partial"] = sum(PARTIAL.values())


def whole_number(least: int, most: int):
    """Make an argument type: a whole number from ``least`` to ``most``."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not least <= number <= most:
            raise argparse.ArgumentTypeError(
                f"found '{text}', legal: a whole number from {least} to {most}"
            )
        return number

    return parse


def number(least: float, most: float):
    """Make an argument type: a number from ``least`` to ``most``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"found '{text}', legal: a number from {least:g} to {most:g}"
            )
        return value

    return parse


def parser(
    description: str,
    depths: str = "the report's five depths, 3 5 7 9 18",
    epochs: str = "train so many epochs instead of the full schedule",
) -> Parser:
    """Make a parser of the flags of every experiment but its schedule.

    Args:
        description: What ``--help`` begins with.
        depths: What is trained without ``--n``.
        epochs: What ``--epoch`` does.
    """
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    # fmt: off
    add("--n", type=whole_number(*DEPTH), nargs="+", metavar="N",
        help="modules per block, 6n + 2 layers where a module has two; several are trained one "
        f"after the other (default: {depths})")
    add("--batchsize", "-b", type=whole_number(*BATCH), default=BATCHSIZE, metavar="B",
        help="images per iteration (default: %(default)s)")
    add("--epoch", "-e", type=whole_number(*EPOCHS), metavar="E", help=epochs)
    add("--shorten", type=whole_number(1, 64_000), default=1, metavar="K",
        help="train on the schedule K times shorter, its drops and stages alike (default: 1)")
    add("--warmup", choices=("auto", "on", "off"), default="auto",
        help="rate 0.01 until the training error is below 80%% (default: auto, from 110 layers on)")
    add("--seed", type=whole_number(*SEED), default=0, metavar="S",
        help="fixes weights, order and augmentation (default: %(default)s)")
    add("--runs", type=whole_number(1, 1000), default=1, metavar="K",
        help="train with K seeds, from --seed up, and print mean and deviation (default: 1)")
    add("--augmentation", choices=augmentation.KINDS, default="report",
        help="report: random crops and flips; none, crop or flip show what they are good for "
        "(default: %(default)s)")
    add("--data", metavar="PATH",
        help="CIFAR-10 as archive, unpacked folder or Chainer's cache; 'synthetic' for "
        "the embedded stand-in (default: $CHAINER_DATASET_ROOT or ~/.chainer/dataset, "
        "downloaded when it is not there)")
    add("--subset", type=whole_number(1, 1_000_000), metavar="K",
        help="train on the first K training images only")
    add("--validate", action="store_true",
        help="hold out 5,000 training images, the last of each class, and evaluate on them; the "
        "test images are not touched")
    add("--device", "-d", metavar="D",
        help="cpu, or the number of a GPU (default: GPU 0 when there is one)")
    add("--backend", choices=functions.BACKENDS, default="auto",
        help="what computes: chainer, Chainer's own functions; onednn, ten times faster on a CPU; "
        "winograd, twice as fast again; cuda, on a GPU, with cuDNN's convolutions; tensorcores, "
        "with our own, never run on one yet (default: auto, which is winograd or cuda)")
    add("--precision", choices=functions.PRECISIONS,
        help="on a GPU: fp32; tf32, products of convolutions with 10 bits of mantissa; "
        "fp16, activations in 16 bits (default: tf32)")
    add("--communicator", choices=parallel.COMMUNICATORS,
        help="train with all processes that mpirun has started, each with its share of the batch: "
        "naive on CPUs, flat or pure_nccl on GPUs (default: one process)")
    add("--out", "-o", type=path, default=Path("runs"), metavar="FOLDER",
        help="folder for the run folders (default: %(default)s)")
    add("--resume", "-r", type=path, metavar="SNAPSHOT",
        help="go on from this snapshot (default: the newest in the run folder, if there is one)")
    add("--snapshot-interval", type=number(*SECONDS), default=60, metavar="SECONDS",
        help="time between snapshots (default: %(default)s)")
    add("--time-limit", type=number(*SECONDS), default=float("inf"), metavar="SECONDS",
        help="stop with a snapshot after so long, as on SIGTERM (default: none)")
    # fmt: on
    return p


def add_schedule(p: Parser) -> Parser:
    """Add the flags that choose among the schedules for a whole network."""
    # fmt: off
    p.add_argument("--schedule", choices=("he2015", "report100"),
        help="he2015: 64k iterations, rate divided by 10 at 32k and 48k; report100: "
        "100 epochs, divided at 40 and 80 (default: he2015)")
    p.add_argument("--drops", type=number(0, EPOCHS[1]), nargs="+", metavar="EPOCH",
        help="with --epoch: divide the rate by 10 at these epochs, each after the one before "
        "(default: at 1/2 and 3/4 of the training, as he2015)")
    # fmt: on
    return p


def check(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together.

    Raises:
        InputError: With exit code 2, naming the flags.
    """
    drops = getattr(args, "drops", None)
    if drops is not None and args.epoch is None:
        raise InputError("--drops: needs --epoch; legal: --epoch E --drops EPOCH ...", USAGE)
    if drops is not None and any(a >= b for a, b in pairwise((*drops, args.epoch))):
        found = " ".join(f"{drop:g}" for drop in drops)
        raise InputError(
            f"--drops: found {found}, legal: epochs below --epoch {args.epoch}, "
            "each greater than the one before",
            USAGE,
        )
    if getattr(args, "schedule", None) is not None and args.epoch is not None:
        raise InputError("--schedule: found with --epoch, legal: one of them", USAGE)
    if args.shorten > 1 and args.epoch is not None:
        raise InputError("--shorten: found with --epoch, legal: one of them", USAGE)
    if args.seed + args.runs - 1 > SEED[1]:
        raise InputError(
            f"--seed, --runs: found seeds {args.seed} to {args.seed + args.runs - 1}, "
            f"legal: up to {SEED[1]}",
            USAGE,
        )
    if args.resume is not None and (args.n is None or len(args.n) > 1 or args.runs > 1):
        raise InputError(
            "--resume: one snapshot is of one network; legal: with one --n and one run", USAGE
        )


def spell(key: str, run: dict, other: dict) -> str:
    """Spell the flags that make a run what it is in one point, as they would be typed.

    Args:
        key: The point, a key of ``Run.identity``.
        run: The identity of the run.
        other: That of a run which differs from it in this point.
    """
    value = run.get(key)
    match key:
        case "n" | "seed" | "batchsize":
            return f"--{key} {value}"
        case "data":
            return f"--data with {value}"
        case "training images":
            return f"--subset {value}"
        case "evaluation":
            return "--validate" if value == "validation" else "no --validate"
        case "warm-up":
            return f"--warmup {'on' if value else 'off'}"
        case "augmentation":
            return f"--augmentation {value or 'report'}"
        case "scale":
            return f"--scale {1 if value is None else value}"
        case "freeze" | "new ends":
            return ("" if value else "no ") + f"--{key.replace(' ', '-')}"
        case "schedule":
            return _spell_schedule(run, other)
    return f"{key} {value}"


def _spell_schedule(run: dict, other: dict) -> str:
    plan = run["schedule"]
    name, _, factor = plan["name"].partition(" / ")
    shorten = f" --shorten {factor}" if factor else ""
    if name in ("he2015", "report100"):
        return f"--schedule {name}{shorten}"
    ends = plan["iterations"], *plan["drops"]
    epochs, *drops = (end * run["batchsize"] / run["training images"] for end in ends)
    if name in PARTIAL:
        stage = f"--{name} " if name != "partial" else ""
        epochs *= LAST_EPOCHS / PARTIAL[name]
        return stage + (shorten.lstrip() or f"--epoch {math.floor(epochs)}")
    text = f"--epoch {math.floor(epochs)}{shorten}"
    if other["schedule"]["iterations"] == plan["iterations"]:
        text += " --drops " + " ".join(f"{drop:g}" for drop in drops)
    return text


def find_device(name: str | None, local: int = 0) -> chainer.backend.Device:
    """Find the device of ``--device``; of several processes on a computer each has its own GPU.

    Args:
        name: The flag's value.
        local: Number of this process among those on its computer.

    Raises:
        InputError: There is no such device here.
    """
    gpus = functions.count_gpus()
    if name is None:
        name = str(local % gpus) if gpus else "cpu"
    if name in ("cpu", "-1", "@numpy"):
        return chainer.get_device("@numpy")
    index = name.removeprefix("@cupy:")
    if index.isascii() and index.isdigit() and len(index) < 4 and int(index) < gpus:
        return chainer.get_device(f"@cupy:{index}")
    none = f"; no GPU was found here: {functions.why_no_gpu()}"
    legal = "cpu" + (f" or a GPU from 0 to {gpus - 1}" if gpus else none)
    raise InputError(f"--device: found '{name}', legal: {legal}", USAGE)


def choose_backend(name: str, device: chainer.backend.Device, precision: str | None = None) -> str:
    """Let ``--backend`` compute from here on; ``functions.use``, whose line is returned.

    Args:
        name: The flag's value.
        device: Where the arrays will be.
        precision: The value of ``--precision``.

    Raises:
        InputError: With exit code 2: it cannot compute here; the message says what is missing.
    """
    try:
        return functions.use(name, device.xp is not np, precision)
    except ValueError as error:
        raise InputError(f"--backend {name}: {error}", USAGE) from None
