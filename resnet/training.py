"""Puts data, network, updater and extensions into a trainer; the flags all experiments share."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import chainer
import h5py
import numpy as np
from chainer import training
from chainer.training.extensions import LogReport

from resnet import __version__, cifar10, extensions, files, functions, schedule, weights
from resnet.command import USAGE, InputError, Parser, clock
from resnet.network import ARCHITECTURES, DEPTHS, layers
from resnet.updater import Images, Updater

BATCHSIZE = 128  # He et al. 2015, 4.2, and the report
MOMENTUM = 0.9  # He et al. 2015, 4.2
WEIGHT_DECAY = 1e-4  # He et al. 2015, 4.2
HELD_OUT = 5000  # images of the 45k/5k split, He et al. 2015, 4.2
UNFINISHED = 75  # exit status of a run that was asked to stop; the same command goes on

NAMES = {"plain": "plain network", "resnet": "ResNet", "resresnet": "ResResNet"}


def whole_number(least: int):
    """An argument type: a whole number from ``least`` up."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or number < least:
            raise argparse.ArgumentTypeError(
                f"found '{text}', legal: a whole number from {least} up"
            )
        return number

    return parse


def number(least: float):
    """An argument type: a number from ``least`` up."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"found '{text}', legal: a number from {least:g} up")
        return value

    return parse


def parser(description: str) -> Parser:
    """The flags that every experiment has."""
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--n",
        type=whole_number(1),
        help="modules per block, 6n + 2 layers "
        "(default: the report's five depths, 3 5 7 9 18, one after the other)",
    )
    p.add_argument(
        "--batchsize",
        "-b",
        type=whole_number(1),
        default=BATCHSIZE,
        help="images per iteration (default: %(default)s)",
    )
    p.add_argument(
        "--schedule",
        choices=("he2015", "report100"),
        default="he2015",
        help="he2015: 64k iterations, rate divided by 10 at 32k and 48k; report100: "
        "100 epochs, divided at 40 and 80 (default: %(default)s)",
    )
    p.add_argument(
        "--epoch",
        "-e",
        type=whole_number(1),
        help="train so many epochs instead of a named schedule",
    )
    p.add_argument(
        "--drops",
        type=number(0),
        nargs="+",
        metavar="EPOCH",
        help="with --epoch: divide the rate by 10 at these epochs "
        "(default: at 1/2 and 3/4 of the training, as he2015)",
    )
    p.add_argument(
        "--warmup",
        choices=("auto", "on", "off"),
        default="auto",
        help="rate 0.01 until the training error is below 80%% (default: auto, from n = 18 on)",
    )
    p.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        help="fixes weights, order and augmentation (default: %(default)s)",
    )
    p.add_argument(
        "--data",
        metavar="PATH",
        help="CIFAR-10 as archive, unpacked folder or Chainer's cache; 'synthetic' for "
        "the embedded stand-in (default: $CHAINER_DATASET_ROOT or ~/.chainer/dataset, "
        "downloaded when it is not there)",
    )
    p.add_argument(
        "--subset",
        type=whole_number(1),
        metavar="K",
        help="train on the first K training images only",
    )
    p.add_argument(
        "--validate",
        action="store_true",
        help="hold out 5,000 training images and evaluate on them; the test images are not touched",
    )
    p.add_argument(
        "--device", "-d", help="cpu, or the number of a GPU (default: GPU 0 when there is one)"
    )
    p.add_argument(
        "--backend",
        choices=functions.BACKENDS,
        default="auto",
        help="what computes on the CPU: chainer, Chainer's own functions; onednn, several times "
        "faster (default: auto, the fastest that is installed)",
    )
    p.add_argument(
        "--out",
        "-o",
        type=Path,
        default=Path("runs"),
        help="folder for the run folders (default: %(default)s)",
    )
    p.add_argument(
        "--resume",
        "-r",
        type=Path,
        metavar="SNAPSHOT",
        help="go on from this snapshot (default: the newest in the run folder, if there is one)",
    )
    p.add_argument(
        "--snapshot-interval",
        type=number(0),
        default=60,
        metavar="SECONDS",
        help="time between snapshots (default: %(default)s)",
    )
    return p


def find_device(name: str | None) -> chainer.backend.Device:
    """The device of ``--device``.

    Raises:
        InputError: There is no such device here.
    """
    gpus = chainer.cuda.cupy.cuda.runtime.getDeviceCount() if chainer.cuda.available else 0
    if name is None:
        name = "0" if gpus else "cpu"
    if name in ("cpu", "-1", "@numpy"):
        return chainer.get_device("@numpy")
    index = name.removeprefix("@cupy:")
    if index.isdigit() and int(index) < gpus:
        return chainer.get_device(f"@cupy:{index}")
    legal = "cpu" + (f" or a GPU from 0 to {gpus - 1}" if gpus else "; no GPU was found here")
    raise InputError(f"--device: found '{name}', legal: {legal}", USAGE)


def run(architecture: str, args: argparse.Namespace) -> None:
    """Train ``architecture`` as the flags say: one depth, or the report's five."""
    if args.drops is not None and args.epoch is None:
        raise InputError("--drops: needs --epoch; legal: --epoch E --drops EPOCH ...", USAGE)
    if args.resume is not None and args.n is None:
        raise InputError("--resume: needs --n, the depth of that snapshot's network", USAGE)
    device = find_device(args.device)
    try:
        backend = functions.use(args.backend)
    except ValueError as error:
        raise InputError(f"--backend {args.backend}: {error}", USAGE) from None
    dataset = cifar10.load(args.data)
    if dataset.name == "synthetic":
        print("NOTE: these are synthetic images made by this program. They are NOT CIFAR-10, and")
        print("      an accuracy on them says nothing about CIFAR-10.")
    evaluation = "test"
    if args.validate:
        if len(dataset.train_y) <= HELD_OUT:
            raise InputError(
                f"--validate: holds out {HELD_OUT} images, the set has {len(dataset.train_y)}",
                USAGE,
            )
        dataset, evaluation = cifar10.hold_out(dataset, HELD_OUT), "validation"
    for n in [args.n] if args.n else DEPTHS:
        Run(architecture, n, args, dataset, evaluation, device, backend).train()


class Run:
    """One training run and its folder.

    Args:
        architecture: A name in ``network.ARCHITECTURES``.
        n: Modules per block.
        args: Flags of ``parser``.
        dataset: The images.
        evaluation: ``test``, or ``validation`` when the dataset's test part was held out.
        device: Where to compute.
        backend: What computes, for the record.
    """

    def __init__(self, architecture, n, args, dataset, evaluation, device, backend="") -> None:
        self.architecture, self.n, self.args = architecture, n, args
        self.dataset, self.evaluation, self.device = dataset, evaluation, device
        self.backend = backend
        self.request = extensions.StopRequest()
        size = min(args.subset or len(dataset.train_y), len(dataset.train_y))
        if args.subset and args.subset > len(dataset.train_y):
            raise InputError(
                f"--subset: found {args.subset}, the training set has {len(dataset.train_y)}", USAGE
            )
        if args.batchsize > size:
            raise InputError(
                f"--batchsize: found {args.batchsize}, legal: up to {size}, the training set", USAGE
            )
        self.size = size
        self.schedule = choose_schedule(args, size)
        self.warm_up = args.warmup == "on" or (args.warmup == "auto" and n >= 18)
        self.folder = args.out / f"{architecture}-{layers(n)}-seed{args.seed}"

    @property
    def identity(self) -> dict:
        """What makes this run what it is: two runs that agree in it have equal logs."""
        return {
            "architecture": self.architecture,
            "n": self.n,
            "seed": self.args.seed,
            "batchsize": self.args.batchsize,
            "data": self.dataset.name,
            "training images": self.size,
            "evaluation": self.evaluation,
            "schedule": json.loads(json.dumps(asdict(self.schedule))),
            "warm-up": self.warm_up,
        }

    def train(self) -> None:
        """Train to the end, from the newest snapshot if there is one, and save the blocks."""
        make_folder(self.folder)
        record = self._read_record()
        if self._is_complete():
            print(f"{self.folder}: already complete")
            self._report()
            return
        self.device.use()
        trainer, snapshots = self._trainer()
        start = self._resume(trainer, snapshots)
        self._print_header(trainer.updater, start)
        self._write_record(record, trainer.updater.iteration)
        # A net that diverges is a result of the report: NaN is logged, not warned of.
        with self.request, np.errstate(over="ignore", invalid="ignore"):
            trainer.run(show_loop_exception_msg=False)
        path = snapshots.save(trainer)
        iteration = trainer.updater.iteration
        if iteration < self.schedule.iterations:
            print(
                f"stopped by {self.request.signal.name} after iteration {iteration}; wrote {path}"
            )
            print(f"to go on: {command()}", flush=True)
            sys.exit(UNFINISHED)
        self._save_blocks(trainer)
        self._report()

    def _trainer(self) -> tuple[training.Trainer, extensions.Snapshots]:
        data, args, iterations = self.dataset, self.args, self.schedule.iterations
        network = ARCHITECTURES[self.architecture](self.n, args.seed)
        network.to_device(self.device)
        optimizer = functions.momentum_sgd(network, MOMENTUM, WEIGHT_DECAY)
        train_x, train_y = data.train_x[: self.size], data.train_y[: self.size]
        self.mean = cifar10.mean_image(train_x)
        images = Images(train_x, train_y, self.mean, self.device)
        held_out = Images(data.test_x, data.test_y, self.mean, self.device)
        updater = Updater(optimizer, images, args.batchsize, self.schedule, self.warm_up, args.seed)
        until_done = extensions.UntilDone(iterations, self.request)
        trainer = training.Trainer(updater, until_done, out=str(self.folder))
        epoch_end = extensions.EpochEnd(iterations)
        # Loss and accuracy of the epoch's batches, as they were when each was trained on.
        trainer.extend(extensions.TrainingStatistics(), trigger=epoch_end)
        # Accuracy on every image of the test set.
        trainer.extend(extensions.Evaluator(held_out, self.evaluation), trigger=epoch_end)
        # The JSON list that plots are made from.
        log_report = LogReport(trigger=epoch_end)
        trainer.extend(log_report)
        # What a person watches.
        trainer.extend(extensions.Progress(log_report, self.evaluation, iterations))
        # All that a killed run needs to go on.
        snapshots = extensions.Snapshots(self.folder, self.identity, args.snapshot_interval)
        trainer.extend(snapshots, name="snapshots")
        return trainer, snapshots

    def _resume(self, trainer, snapshots) -> Path | None:
        if self.args.resume is None:
            return snapshots.resume_newest(trainer)
        snapshots.resume(self.args.resume, trainer)
        return self.args.resume

    def _print_header(self, updater: Updater, start: Path | None) -> None:
        plan, total = self.schedule, self.schedule.iterations
        drops = ", ".join(f"{drop:,}" for drop in plan.drops) or "none"
        warm_up = f", warm-up at {schedule.WARM_UP_RATE}" if self.warm_up else ""
        name, depth = NAMES[self.architecture], layers(self.n)
        parameters = updater.optimizer.target.count_params()
        print(f"Device: {device_name(self.device)}")
        print(f"Backend: {self.backend}")
        print(f"# Network: {name}, {depth} layers (n = {self.n}), {parameters:,} parameters")
        print(
            f"# Data: {self.dataset.name}, {self.size:,} training and "
            f"{len(self.dataset.test_y):,} {self.evaluation} images"
        )
        print(f"# Minibatch-size: {self.args.batchsize}")
        print(
            f"# epoch: {total * self.args.batchsize / self.size:.1f} ({total:,} iterations, "
            f"{plan.name}: rate {schedule.INITIAL_RATE}, "
            f"a tenth from iterations {drops}{warm_up})"
        )
        print(f"# Seed: {self.args.seed}")
        print(f"# Run folder: {self.folder}")
        if start:
            print(f"# Going on from {start}, iteration {updater.iteration:,}")
        print(flush=True)

    def _read_record(self) -> dict:
        path = self.folder / "args.json"
        try:
            record = json.loads(path.read_text())
        except FileNotFoundError:
            return {"run": self.identity, "starts": []}
        except ValueError:
            raise InputError(f"{path}: not JSON; remove it or choose another --out") from None
        extensions.refuse_other_run(str(path), record.get("run", {}), self.identity)
        return record

    def _write_record(self, record: dict, iteration: int) -> None:
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "iteration": iteration,
            "command": command(),
            "data": self.dataset.source,
            "device": device_name(self.device),
            "backend": self.backend,
            "versions": versions(),
            "git": git_state(),
        }
        record["starts"].append(start)
        files.write_json(self.folder / "args.json", record)

    def _is_complete(self) -> bool:
        path = self.folder / "blocks.h5"
        return path.exists() and weights.describe(path).iteration >= self.schedule.iterations

    def _save_blocks(self, trainer) -> None:
        updater = trainer.updater
        description = weights.Description(
            architecture=self.architecture,
            n=self.n,
            dataset=self.dataset.name,
            classes=self.dataset.classes,
            seed=self.args.seed,
            epoch=updater.epoch,
            iteration=updater.iteration,
        )
        weights.save(self.folder / "blocks.h5", updater.optimizer.target, description, self.mean)

    def _report(self) -> None:
        key = f"{self.evaluation}/main/accuracy"
        log = json.loads((self.folder / "log").read_text())
        last, best = log[-1], max(log, key=lambda entry: entry[key])
        what = f"{self.evaluation} accuracy on {self.dataset.name}"
        print(f"{what}, last epoch ({last['epoch']}): {last[key]:.2%}")
        chosen = "on the very images it is measured on, so not a result"
        print(f"{what}, best epoch ({best['epoch']}): {best[key]:.2%} (chosen {chosen})")
        print(
            f"training took {clock(last['elapsed_time'])}; log, snapshots, blocks.h5 and "
            f"args.json are in {self.folder}",
            flush=True,
        )


def choose_schedule(args: argparse.Namespace, size: int) -> schedule.Schedule:
    """The schedule of ``--schedule``, or of ``--epoch`` and ``--drops``, for ``size`` images."""
    if args.epoch is not None:
        drops = args.drops if args.drops is not None else (args.epoch / 2, args.epoch * 3 / 4)
        return schedule.epochs(args.epoch, drops, size, args.batchsize)
    if args.schedule == "report100":
        return schedule.report100(size, args.batchsize)
    return schedule.he2015()


def make_folder(folder: Path) -> None:
    """Create the run folder and see that it can be written to, before hours are spent.

    Raises:
        InputError: It cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.whole(folder / "writable") as temporary:
            temporary.write_bytes(bytes(4096))
        (folder / "writable").unlink()
    except OSError as error:
        raise InputError(
            f"--out: cannot write to {folder} ({error.strerror}); legal: a writable folder"
        ) from None


def command() -> str:
    """The command line of this process, to be typed again."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def device_name(device: chainer.backend.Device) -> str:
    """Name of the processor behind a device."""
    if device.xp is not np:
        properties = device.xp.cuda.runtime.getDeviceProperties(device.device.id)
        return f"GPU {device.device.id}, {properties['name'].decode()}"
    return f"CPU, {len(os.sched_getaffinity(0))} cores, {platform.machine()}"


def versions() -> dict[str, str]:
    """Versions of all that computes."""
    found = {
        "resnet": __version__,
        "python": platform.python_version(),
        "chainer": chainer.__version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
    }
    if chainer.cuda.available:
        found["cupy"] = chainer.cuda.cupy.__version__
    return found


def git_state() -> dict | None:
    """Commit of the checkout and whether it has uncommitted changes; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *words], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
