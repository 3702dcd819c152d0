"""Puts data, network, updater and extensions into a trainer, and runs it in its folder."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev

import chainer
import numpy as np
from chainer import training

from resnet import (
    augmentation,
    cifar10,
    extensions,
    files,
    flags,
    functions,
    parallel,
    record,
    schedule,
    weights,
)
from resnet.command import USAGE, InputError, clock, reason, unheard
from resnet.network import ARCHITECTURES, DEPTHS, Network, depth
from resnet.parallel import ALONE, Processes
from resnet.updater import Images, Updater

MOMENTUM = 0.9  # He et al. 2015, 4.2
WEIGHT_DECAY = 1e-4  # He et al. 2015, 4.2
HELD_OUT = 5000  # images of the 45k/5k split, He et al. 2015, 4.2
WARM_UP_FROM = 18  # modules per block: He et al. 2015, 4.2, on the net of 110 layers
UNFINISHED = 75  # exit status of a run that was asked to stop; the same command goes on

STARTED = time.monotonic()  # of this process, nearly


@dataclass(frozen=True)
class Setting:
    """What all runs of one command share.

    Attributes:
        args: Flags of ``flags.parser``.
        dataset: The images.
        evaluation: ``test``, or ``validation`` when the dataset's test part was held out.
        device: Where to compute.
        backend: What computes, for the record.
        request: Stops training, on a signal or when ``--time-limit`` is over.
        processes: Those that train together.
    """

    args: argparse.Namespace
    dataset: cifar10.Dataset
    evaluation: str
    device: chainer.backend.Device
    backend: str
    request: extensions.StopRequest = field(default_factory=extensions.StopRequest)
    processes: Processes = ALONE


def prepare(args: argparse.Namespace) -> Setting:
    """Choose device and backend and load the images, as the flags say."""
    request = extensions.StopRequest(STARTED + args.time_limit)
    flags.check(args)
    processes = parallel.join(args.communicator)
    if args.batchsize % processes.size:
        raise InputError(
            f"--batchsize: found {args.batchsize}, legal for {processes.size} processes: "
            "a multiple of their number",
            USAGE,
        )
    device = flags.find_device(args.device, processes.local)
    try:
        backend = functions.use(args.backend, device.xp is not np, args.precision)
    except ValueError as error:
        raise InputError(f"--backend {args.backend}: {error}", USAGE) from None
    if processes.rank > 0:
        processes.wait()  # the first one may have to download it
    dataset = cifar10.load(args.data)
    if processes.rank == 0:
        processes.wait()
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
    return Setting(args, dataset, evaluation, device, backend, request, processes)


def main(architecture: str, description: str) -> None:
    """The command that trains ``architecture``: the depths and seeds that the flags name."""
    args = flags.add_schedule(flags.parser(description)).parse_args()
    run(lambda n, seed, setting: Run(architecture, n, seed, setting), args, tuple(DEPTHS))


def run(kind: Callable[[int, int, Setting], Run], args, depths: Sequence[int]) -> None:
    """Train every depth and seed that the flags name, one after the other.

    Args:
        kind: Makes the run of (n, seed, setting).
        args: The flags.
        depths: The values of n without ``--n``.
    """
    setting = prepare(args)
    seeds = range(args.seed, args.seed + args.runs)
    # All of them before the first is trained: a wrong flag shows at once.
    runs = [kind(n, seed, setting) for n in args.n or depths for seed in seeds]
    with setting.request:
        for each in runs:
            each.train()
    if len(runs) > 1:
        print_summary(runs)


class Run:
    """One training run and its folder.

    Args:
        architecture: A name in ``network.ARCHITECTURES``.
        n: Modules per block.
        seed: Seed of weights, order and augmentation.
        setting: What it shares with the other runs of the command.

    Attributes:
        folder: The run folder.
        schedule: Rate of every iteration.
    """

    def __init__(self, architecture: str, n: int, seed: int, setting: Setting) -> None:
        self.architecture, self.n, self.seed, self.setting = architecture, n, seed, setting
        self.dataset, self.evaluation = setting.dataset, setting.evaluation
        self.args = args = setting.args
        size = min(args.subset or len(self.dataset.train_y), len(self.dataset.train_y))
        if args.subset and args.subset > size:
            raise InputError(f"--subset: found {args.subset}, the training set has {size}", USAGE)
        if args.batchsize > size:
            raise InputError(
                f"--batchsize: found {args.batchsize}, legal: up to {size}, the training set", USAGE
            )
        self.size = size
        self.train_x, self.train_y = self.dataset.train_x[:size], self.dataset.train_y[:size]
        self.schedule = self.choose_schedule()
        self.warm_up = args.warmup == "on" or (args.warmup == "auto" and n >= WARM_UP_FROM)
        self.folder = args.out / self.folder_name(architecture)
        self.stream = seed  # of order and augmentation
        self.request = setting.request

    @cached_property
    def mean(self) -> np.ndarray:
        """Per-pixel mean of the training images, float32 (3, 32, 32), in units of 0..1."""
        return cifar10.mean_image(self.train_x)

    def folder_name(self, what: str) -> str:
        """Name of the run folder of ``what``; see ``files.run_name``."""
        shorten = {"shorten": self.args.shorten} if self.args.shorten > 1 else {}
        return files.run_name(f"{what}-{depth(self.n)}", self.seed, shorten | self.choices)

    # What a kind of training of its own changes.

    def choose_schedule(self) -> schedule.Schedule:
        """The schedule of ``--schedule``, maybe shortened, or of ``--epoch`` and ``--drops``."""
        args = self.args
        if args.epoch is not None:
            drops = args.drops if args.drops is not None else (args.epoch / 2, args.epoch * 3 / 4)
            return schedule.epochs(args.epoch, drops, self.size, args.batchsize)
        if args.schedule == "report100":
            return schedule.report100(self.size, args.batchsize).shortened(args.shorten)
        return schedule.he2015().shortened(args.shorten)

    @property
    def choices(self) -> dict:
        """The choices beyond the report's that were made, by name; part of the identity."""
        kind = self.args.augmentation
        return {} if kind == "report" else {"augmentation": kind}

    @property
    def title(self) -> str:
        """What is trained, for the header."""
        return f"{ARCHITECTURES[self.architecture].title}, {depth(self.n)} layers (n = {self.n})"

    @property
    def identity(self) -> dict:
        """What makes this run what it is: two runs that agree in it have equal logs."""
        return {
            "architecture": self.architecture,
            "n": self.n,
            "seed": self.seed,
            "batchsize": self.args.batchsize,
            "data": self.dataset.name,
            "training images": self.size,
            "evaluation": self.evaluation,
            "schedule": json.loads(json.dumps(asdict(self.schedule))),
            "warm-up": self.warm_up,
            **self.choices,
        }

    def build(self) -> Network:
        """The network with its initial weights, on the CPU."""
        return ARCHITECTURES[self.architecture](self.n, self.seed)

    def extend(self, trainer: training.Trainer) -> None:
        """Add extensions of its own, which run before the log is written."""

    # What all kinds share.

    def train(self) -> None:
        """Train to the end, from the newest snapshot if there is one, and save the blocks."""
        with only_writers(self.folder, self.setting.processes):
            self._train()

    def _train(self) -> None:
        processes = self.setting.processes
        starts = read_starts(self.folder, self.identity)
        if processes.agree(self.is_complete()):
            print(f"{self.folder}: already complete")
            if processes.rank == 0:
                self.repair_log()
            processes.wait()
            self.report()
            return
        self.setting.device.use()
        trainer, snapshots = self.make_trainer()
        resumed = self._resume(trainer, snapshots)
        start = self._start(trainer.updater.iteration)
        self._print_header(trainer.updater, resumed, start["git"])
        if resumed and (before := starts[-1:]) and before[0].get("device") != start["device"]:
            print(f"NOTE: begun on {before[0].get('device')}: on another processor the last digits")
            print("      of the log may differ from those of an uninterrupted run.\n", flush=True)
        before = [each["packages"] for each in starts if "packages" in each]
        if before[-1:] == [start["packages"]]:
            del start["packages"]  # as at the start before
        starts.append(start)
        self.request.unsaved = snapshots.age
        if processes.rank == 0:
            write_record(self.folder, self.identity, starts)
        # A net that diverges is a result of the report: NaN is logged, not warned of.
        with np.errstate(over="ignore", invalid="ignore"):
            trainer.run(show_loop_exception_msg=False)
        reason = self.request.reason or "a signal to another process"
        iteration = trainer.updater.iteration
        # Before the first update there is nothing to keep, nor a velocity that could be saved.
        wrote = f"; wrote {snapshots.save(trainer)}" if iteration else ""
        if iteration < self.schedule.iterations:
            launcher = f"mpirun -np {processes.size} " if processes.size > 1 else ""
            with unheard(sys.stdout):
                print(f"stopped by {reason} after iteration {iteration}{wrote}")
                print(f"to go on: {launcher}{record.command_here()}", flush=True)
            processes.wait()  # a launcher may end all when one has ended
            sys.exit(UNFINISHED)
        if processes.rank == 0:
            self._save_blocks(trainer.updater)
        processes.wait()
        self.report()

    def make_trainer(self) -> tuple[training.Trainer, extensions.Snapshots]:
        """The trainer at its beginning, and its extension that keeps the snapshots."""
        data, args, iterations = self.dataset, self.args, self.schedule.iterations
        device = self.setting.device
        network = self.build()
        network.to_device(device)
        optimizer = functions.momentum_sgd(network, MOMENTUM, WEIGHT_DECAY)
        images = Images(self.train_x, self.train_y, self.mean, device)
        held_out = Images(data.test_x, data.test_y, self.mean, device)
        updater = Updater(
            optimizer,
            images,
            args.batchsize,
            self.schedule,
            self.warm_up,
            self.stream,
            self.setting.processes,
            args.augmentation,
        )
        until_done = extensions.UntilDone(iterations, self.request)
        trainer = training.Trainer(updater, until_done, out=str(self.folder))
        epoch_end = extensions.EpochEnd(iterations)
        # Loss and accuracy of the epoch's batches, as they were when each was trained on.
        trainer.extend(extensions.TrainingStatistics(), trigger=epoch_end)
        # Accuracy on every image of the test set.
        evaluator = extensions.Evaluator(network, held_out, self.evaluation, self.setting.processes)
        trainer.extend(evaluator, trigger=epoch_end)
        # What this kind of training measures besides.
        self.extend(trainer)
        if self.setting.processes.rank == 0:
            # The JSON list that plots are made from.
            log_report = extensions.Log(self.folder / "log", epoch_end)
            trainer.extend(log_report, name="LogReport")  # as in snapshots
            # What a person watches.
            trainer.extend(extensions.Progress(log_report, self.evaluation, iterations))
        # All that a killed run needs to go on.
        snapshots = self._snapshots()
        trainer.extend(snapshots, name="snapshots")
        return trainer, snapshots

    def _snapshots(self) -> extensions.Snapshots:
        return extensions.Snapshots(self.folder, self.identity, self.args.snapshot_interval)

    def is_complete(self) -> bool:
        """Whether the run folder holds the blocks of the last iteration, intact."""
        found = saved_blocks(self.folder)
        return found is not None and found.iteration >= self.schedule.iterations

    def repair_log(self) -> None:
        """Write the log of a complete run again, from a snapshot, where it cannot be read.

        Raises:
            InputError: No snapshot holds it.
        """
        path, iterations = self.folder / "log", self.schedule.iterations
        try:
            extensions.check_log(files.read_json(path), self.evaluation, iterations)
        except (ValueError, FileNotFoundError) as error:
            why = f"{path}: damaged ({reason(error)})"
            found = self._snapshots().read_log(self.evaluation, iterations)
            if found is None:
                raise InputError(
                    f"{why}, and no snapshot holds it; legal: remove {self.folder / 'blocks.h5'}, "
                    "and the same command trains again"
                ) from None
            entries, snapshot = found
            extensions.write_log(path, entries)
            print(f"warning: {why}; written again from {snapshot}", file=sys.stderr)

    def result(self) -> tuple[dict, dict, bool]:
        """Of the log: last entry, entry of the best evaluation, and whether the loss diverged.

        Of partial training only the last stage counts: before it blocks are missing.
        """
        log = files.read_json(self.folder / "log")
        whole = [entry for entry in log if entry.get("stage") == log[-1].get("stage")]
        best = max(whole, key=lambda entry: entry[f"{self.evaluation}/main/accuracy"])
        return log[-1], best, not all(math.isfinite(entry["main/loss"]) for entry in log)

    def report(self) -> None:
        """Print what the complete run has reached."""
        key = f"{self.evaluation}/main/accuracy"
        last, best, diverged = self.result()
        if diverged:
            print("DIVERGED: the training loss is no longer a number; the log says from when")
        what = f"{self.evaluation} accuracy on {self.dataset.name}"
        print(f"{what}, last epoch ({last['epoch']}): {last[key]:.2%}")
        chosen = "on the very images it is measured on, so not a result"
        print(f"{what}, best epoch ({best['epoch']}): {best[key]:.2%} (chosen {chosen})")
        print(
            f"training took {clock(last['elapsed_time'])}; log, snapshots, blocks.h5 and "
            f"args.json are in {self.folder}\n",
            flush=True,
        )

    def _resume(self, trainer, snapshots) -> Path | None:
        if self.args.resume is None:
            return snapshots.resume_newest(trainer)
        snapshots.resume(self.args.resume, trainer)
        return self.args.resume

    def _print_header(self, updater: Updater, resumed: Path | None, git: dict | None) -> None:
        plan, batchsize = self.schedule, self.args.batchsize
        drops = ", ".join(f"{drop:,}" for drop in plan.drops) or "none"
        warm_up = f", warm-up at {schedule.WARM_UP_RATE}" if self.warm_up else ""
        parameters = updater.optimizer.target.count_params()
        print(f"Device: {record.device_name(self.setting.device)}")
        print(f"Backend: {self.setting.backend}")
        print(f"# Network: {self.title}, {parameters:,} parameters")
        print(
            f"# Data: {self.dataset.name}, {self.size:,} training and "
            f"{len(self.dataset.test_y):,} {self.evaluation} images"
        )
        print(f"# Augmentation: {augmentation.KINDS[self.args.augmentation]}")
        processes = self.setting.processes
        shared = f", {batchsize // processes.size} in each of {processes.size} processes"
        print(f"# Minibatch-size: {batchsize}{shared if processes.size > 1 else ''}")
        print(
            f"# epoch: {plan.iterations * batchsize / self.size:.1f} ({plan.iterations:,} "
            f"iterations, {plan.name}: rate {schedule.INITIAL_RATE}, "
            f"a tenth from iterations {drops}{warm_up})"
        )
        print(f"# Seed: {self.seed}")
        print(f"# Code: {record.describe_code(git)}")
        print(f"# Run folder: {self.folder}")
        if resumed:
            print(f"# Going on from {resumed}, iteration {updater.iteration:,}")
        if first := functions.first_start():
            print(first)
        print(flush=True)

    def _start(self, iteration: int) -> dict:
        kind = ARCHITECTURES[self.architecture]
        return {
            "label": kind.label,
            "beside": kind.beside,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "iteration": iteration,
            "command": record.command(),
            "data": self.dataset.source,
            "data digest": self.dataset.digest,
            "device": record.device_name(self.setting.device),
            "backend": self.setting.backend,
            "processes": self.setting.processes.size,
            "versions": record.versions(),
            "packages": record.packages(),
            "git": record.git_state(),
        }

    def _save_blocks(self, updater: Updater) -> None:
        network = updater.optimizer.target
        description = weights.Description(
            architecture=self.architecture,
            n=self.n,
            dataset=self.dataset.name,
            classes=self.dataset.classes,
            seed=self.seed,
            epoch=updater.epoch,
            iteration=updater.iteration,
            groups=network.groups,
        )
        weights.save(self.folder / "blocks.h5", network, description, self.mean)


def print_summary(runs: Sequence[Run]) -> None:
    """Print last-epoch accuracy by depth: mean and sample standard deviation over the seeds."""
    evaluation, data = runs[0].evaluation, runs[0].dataset.name
    print(f"{evaluation} accuracy on {data}, last epoch, by layers:")
    for n in dict.fromkeys(run.n for run in runs):
        results = [run.result() for run in runs if run.n == n]
        values = [100 * last[f"{evaluation}/main/accuracy"] for last, _, _ in results]
        deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
        diverged = sum(diverged for _, _, diverged in results)
        note = f", {diverged} of them diverged" if diverged else ""
        runs_note = f"{len(values)} run{'s' * (len(values) > 1)}{note}"
        print(f"{depth(n):5d}  {mean(values):6.2f}{deviation} %  ({runs_note})", flush=True)


def read_starts(folder: Path, identity: dict) -> list[dict]:
    """What args.json says of the processes that worked in ``folder`` before this one.

    Raises:
        InputError: It is damaged, or the folder is of another run.
    """
    path = folder / "args.json"
    try:
        content = files.read_json(path)
        found, starts = dict(content["run"]), list(map(dict, content["starts"]))
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path}: not the record of a run; remove it or choose another --out"
        ) from None
    extensions.refuse_other_run(str(folder), found, identity)
    return starts


def write_record(folder: Path, identity: dict, starts: list[dict]) -> None:
    """Write args.json: what the run is, and which processes have worked on it."""
    files.write_json(folder / "args.json", {"run": identity, "starts": starts})


def saved_blocks(folder: Path) -> weights.Description | None:
    """What the blocks.h5 of a run folder holds; None where it is missing, or damaged."""
    path = folder / "blocks.h5"
    try:
        return weights.describe(path) if path.exists() else None
    except InputError as error:
        print(f"warning: {error}; it will be written again", file=sys.stderr)
        return None


@contextlib.contextmanager
def only_writers(folder: Path, processes: Processes) -> Iterator[None]:
    """Create ``folder`` and have the right to write into it, as ``files.only_writer`` says.

    Raises:
        InputError: Another process has it, or the folder cannot be written to.
    """
    if processes.rank > 0:
        processes.wait()
        yield
        return
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # First the lock: who writes here already is what a second one has to be told.
            held.enter_context(files.only_writer(folder))
            with files.whole(folder / "writable") as temporary:  # before hours are spent
                temporary.write_bytes(bytes(4096))
            (folder / "writable").unlink()
        except OSError as error:
            raise InputError(
                f"--out: cannot write to {folder} ({error.strerror}); legal: a writable folder"
            ) from None
        processes.wait()
        yield
