"""Puts data, network, updater and extensions into a trainer, and runs it in its folder."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
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
    run_folder,
    schedule,
    weights,
)
from resnet.batches import Batches, Images
from resnet.command import STOPPED, USAGE, InputError, clock, reason, unheard
from resnet.network import ARCHITECTURES, DEPTHS, GROUPS, Network, find_architecture
from resnet.parallel import ALONE, Processes
from resnet.stopping import StopRequest, UntilDone
from resnet.updater import Updater

MOMENTUM = 0.9  # He et al. 2015, 4.2
WEIGHT_DECAY = 1e-4  # He et al. 2015, 4.2
HELD_OUT = 5000  # images of the 45k/5k split, He et al. 2015, 4.2

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
    request: StopRequest = field(default_factory=StopRequest)
    processes: Processes = ALONE

    def __post_init__(self) -> None:
        args, size = self.args, len(self.dataset.train_y)
        if args.subset and args.subset > size:
            raise InputError(f"--subset: found {args.subset}, the training set has {size}", USAGE)
        if args.batchsize > self.size:
            raise InputError(
                f"--batchsize: found {args.batchsize}, legal: up to {self.size}, the training set",
                USAGE,
            )

    @property
    def size(self) -> int:
        """Number of images that are trained on: the first ones of the training set."""
        return self.args.subset or len(self.dataset.train_y)

    @cached_property
    def mean(self) -> np.ndarray:
        """Per-pixel mean of these images, float32 (3, 32, 32), in units of 0..1."""
        return cifar10.mean_image(self.dataset.train_x[: self.size])


def prepare(args: argparse.Namespace) -> Setting:
    """Choose device and backend and load the images, as the flags say."""
    request = StopRequest(STARTED + args.time_limit)
    flags.check(args)
    processes = parallel.join(args.communicator)
    if args.batchsize % processes.size:
        raise InputError(
            f"--batchsize: found {args.batchsize}, legal for {processes.size} processes: "
            "a multiple of their number",
            USAGE,
        )
    device = flags.find_device(args.device, processes.local)
    backend = flags.choose_backend(args.backend, device, args.precision)
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
                f"--validate: found {len(dataset.train_y)} training images, legal: more than "
                f"the {HELD_OUT} that are held out; or without the flag",
                USAGE,
            )
        dataset, evaluation = cifar10.hold_out(dataset, HELD_OUT), "validation"
    return Setting(args, dataset, evaluation, device, backend, request, processes)


def main(architecture: str, description: str) -> None:
    """Run the command that trains ``architecture``, at the depths and seeds that the flags name."""
    train_depths(architecture, flags.add_schedule(flags.parser(description)).parse_args())


def train_depths(architecture: str, args: argparse.Namespace) -> None:
    """Train ``architecture`` at the depths and seeds that the flags name."""
    run(partial(whole_network, architecture), args, tuple(DEPTHS))


def run(make: Callable[[int, int, Setting], Run], args, depths: Sequence[int]) -> None:
    """Train every depth and seed that the flags name, one after the other.

    Args:
        make: Makes of (n, seed, setting) a ``Run``, or what is trained and told of like one.
        args: The flags.
        depths: The values of n without ``--n``.
    """
    setting = prepare(args)
    seeds = range(args.seed, args.seed + args.runs)
    # All of them before the first is trained: a wrong flag shows at once.
    runs = [make(n, seed, setting) for n in dict.fromkeys(args.n or depths) for seed in seeds]
    with setting.request:
        for each in runs:
            each.train()
    if len(runs) > 1:
        print_summary(runs)


def whole_network(architecture: str, n: int, seed: int, setting: Setting) -> Run:
    """Make the run that trains a whole network, from its first weights to the end.

    Args:
        architecture: A name in ``network.ARCHITECTURES``.
        n: Modules per block.
        seed: Seed of weights, order and augmentation.
        setting: What it shares with the other runs of the command.

    Raises:
        InputError: There is no such architecture, or none that it is to stand beside.
    """
    kind = find_architecture(architecture)
    plan, chosen = choose_schedule(setting), choices(setting.args)
    return Run(
        setting=setting,
        title=f"{kind.describe(n)} (n = {n})",
        layers=kind.depth(n),
        identity=identify(setting, architecture, n, seed, plan, chosen),
        folder=name_folder(setting, f"{architecture}-{kind.depth(n)}", seed, chosen),
        schedule=plan,
        stream=seed,
        build=lambda: kind(n, seed),
    )


def choose_schedule(setting: Setting) -> schedule.Schedule:
    """Make the schedule of ``--schedule``, maybe shortened, or of ``--epoch`` and ``--drops``."""
    args = setting.args
    if args.epoch is not None:
        drops = args.drops if args.drops is not None else (args.epoch / 2, args.epoch * 3 / 4)
        return schedule.epochs(args.epoch, drops, setting.size, args.batchsize)
    if args.schedule == "report100":
        return schedule.report100(setting.size, args.batchsize).shortened(args.shorten)
    return schedule.he2015().shortened(args.shorten)


def choices(args: argparse.Namespace) -> dict:
    """List by name the choices that are not the report's; they are part of the identity."""
    kind = args.augmentation
    return {} if kind == "report" else {"augmentation": kind}


def identify(
    setting: Setting, architecture: str, n: int, seed: int, plan: schedule.Schedule, chosen: dict
) -> dict:
    """Say what makes a run what it is: two runs that agree in it have equal logs."""
    deep = find_architecture(architecture).depth(n) >= schedule.WARM_UP_FROM
    warm_up = {"on": True, "off": False, "auto": deep}[setting.args.warmup]
    return {
        "architecture": architecture,
        "n": n,
        "seed": seed,
        "batchsize": setting.args.batchsize,
        "data": setting.dataset.name,
        "training images": setting.size,
        "evaluation": setting.evaluation,
        "schedule": json.loads(json.dumps(asdict(plan))),
        "warm-up": warm_up,
        **chosen,
    }


def name_folder(setting: Setting, net: str, seed: int, chosen: dict) -> Path:
    """Name the run folder of ``net``; see ``run_folder.run_name``."""
    return setting.args.out / run_folder.run_name(net, seed, setting.args.shorten, chosen)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: what is trained, and the folder in which it is kept.

    Attributes:
        setting: What it shares with the other runs of the command.
        title: What is trained, for the header.
        layers: How many weighted ones the network has.
        identity: As ``identify`` returns it.
        folder: The run folder.
        schedule: Rate of every iteration.
        stream: Seed of order and augmentation.
        build: Makes the network with its initial weights, on the CPU.
        extend: Adds extensions of its own to a trainer; they run before the log is written.
        groups: The groups of Table I that the network has.
    """

    setting: Setting
    title: str
    layers: int
    identity: dict
    folder: Path
    schedule: schedule.Schedule
    stream: int
    build: Callable[[], Network]
    extend: Callable[[training.Trainer], None] = lambda trainer: None
    groups: tuple[str, ...] = GROUPS

    def train(self) -> None:
        """Train to the end, from the newest snapshot if there is one, and save the blocks."""
        with run_folder.only_writers(self.folder, self.setting.processes):
            self._train()

    def _train(self) -> None:
        processes = self.setting.processes
        starts = run_folder.read_starts(self.folder, self.identity)
        if processes.agree(self.is_complete()):
            print(f"{self.folder}: already complete")
            if processes.rank == 0:
                self.repair_log()
            processes.wait()
            report(self.folder, self.setting)
            return
        self.setting.device.use()
        trainer, snapshots = self.make_trainer()
        if resumed := self.setting.args.resume:
            snapshots.resume(resumed, trainer)
        else:
            resumed = snapshots.resume_newest(trainer)
        start = self._start(trainer.updater.iteration)
        if resumed:
            self._refuse_other_formula(starts, start)
        self._print_header(trainer.updater, resumed, start["git"])
        if resumed and starts:
            _note_changes(starts, start)
        before = [each["packages"] for each in starts if "packages" in each]
        if before[-1:] == [start["packages"]]:
            del start["packages"]  # as at the start before
        starts.append(start)
        self.setting.request.unsaved = snapshots.age
        if processes.rank == 0:
            run_folder.write_record(self.folder, self.identity, starts)
        # A net that diverges is a result of the report: NaN is logged, not warned of.
        with np.errstate(over="ignore", invalid="ignore"):
            trainer.run(show_loop_exception_msg=False)
        reason = self.setting.request.reason or "a signal to another process"
        iteration = trainer.updater.iteration
        # Before the first update there is nothing to keep, nor a velocity that could be saved.
        wrote = f"; wrote {snapshots.save(trainer)}" if iteration else ""
        if iteration < self.schedule.iterations:
            launcher = f"mpirun -np {processes.size} " if processes.size > 1 else ""
            with unheard(sys.stdout):
                print(f"stopped by {reason} after iteration {iteration}{wrote}")
                print(f"to go on: {launcher}{record.command_here()}", flush=True)
            processes.wait()  # a launcher may end all when one has ended
            sys.exit(STOPPED)
        if processes.rank == 0:
            run_folder.write_record(self.folder, self.identity, starts, done=True)
            self._save_blocks(trainer.updater)
        processes.wait()
        report(self.folder, self.setting)

    def make_trainer(self) -> tuple[training.Trainer, run_folder.Snapshots]:
        """Make the trainer at its beginning, and its extension that keeps the snapshots."""
        setting, iterations = self.setting, self.schedule.iterations
        data, mean, processes = setting.dataset, setting.mean, setting.processes
        network = self.build()
        # Before hours are spent on what could not be saved.
        weights.check_groups(network, self.identity["architecture"])
        network.to_device(setting.device)
        optimizer = functions.momentum_sgd(network, MOMENTUM, WEIGHT_DECAY)
        trained_on = data.train_x[: setting.size], data.train_y[: setting.size]
        images = Images(*trained_on, mean, setting.device)
        held_out = Images(data.test_x, data.test_y, mean, setting.device)
        batches = Batches(images, setting.args.batchsize, self.stream, setting.args.augmentation)
        updater = Updater(optimizer, batches, self.schedule, self.identity["warm-up"], processes)
        until_done = UntilDone(iterations, setting.request)
        trainer = training.Trainer(updater, until_done, out=str(self.folder))
        epoch_end = extensions.EpochEnd(iterations)
        # Loss and accuracy of the epoch's batches, as they were when each was trained on.
        trainer.extend(extensions.TrainingStatistics(), trigger=epoch_end)
        # Accuracy on every image of the test set.
        evaluator = extensions.Evaluator(network, held_out, setting.evaluation, processes)
        trainer.extend(evaluator, trigger=epoch_end)
        # What this kind of training measures besides.
        self.extend(trainer)
        if processes.rank == 0:
            # The JSON list that plots are made from.
            log_report = extensions.Log(self.folder / "log", epoch_end)
            trainer.extend(log_report, name="LogReport")  # as in snapshots
            # What a person watches.
            trainer.extend(extensions.Progress(log_report, setting.evaluation, iterations))
        # All that a killed run needs to go on.
        snapshots = self._snapshots()
        trainer.extend(snapshots, name="snapshots")
        return trainer, snapshots

    def _snapshots(self) -> run_folder.Snapshots:
        return run_folder.Snapshots(self.folder, self.identity, self.setting.args.snapshot_interval)

    def is_complete(self) -> bool:
        """Tell whether the run folder holds the blocks of the last iteration, intact."""
        return self.has_saved(self.folder)

    def has_saved(self, folder: Path) -> bool:
        """Tell whether ``folder`` holds the blocks of this run's last iteration, intact.

        Raises:
            InputError: It holds those of another run, or none that can be read.
        """
        wanted = {name: self.identity[name] for name in ("architecture", "n", "seed")}
        wanted |= {"dataset": self.setting.dataset.name, "groups": self.groups}
        return run_folder.has_blocks(folder, wanted | {"iteration": self.schedule.iterations})

    def _refuse_other_formula(self, starts: list[dict], start: dict) -> None:
        found = [each["formula"] for each in starts if "formula" in each]
        if found and found[-1] != start["formula"]:
            raise InputError(
                f"{self.folder}: begun with modules that compute '{found[-1]}', "
                f"found '{start['formula']}'; legal: the former, or another --out"
            )

    def repair_log(self) -> None:
        """Write the log of a complete run again, from a snapshot, where it has changed.

        Raises:
            InputError: It or a snapshot cannot be read, or no snapshot holds it.
        """
        path, iterations = self.folder / "log", self.schedule.iterations
        try:
            run_folder.check_kept_log(self.folder, self.setting.evaluation, iterations)
        except (ValueError, FileNotFoundError) as error:
            why = f"{path}: damaged ({reason(error)})"
            found = self._snapshots().read_log(self.setting.evaluation, iterations)
            if found is None:
                raise InputError(
                    f"{why}, and no snapshot holds it; legal: remove {self.folder / 'blocks.h5'}, "
                    "and the same command trains again"
                ) from None
            entries, snapshot = found
            run_folder.write_log(path, entries)
            starts = run_folder.read_starts(self.folder, self.identity)
            run_folder.write_record(self.folder, self.identity, starts, done=True)
            print(f"warning: {why}; written again from {snapshot}", file=sys.stderr)

    def _print_header(self, updater: Updater, resumed: Path | None, git: dict | None) -> None:
        setting, plan = self.setting, self.schedule
        batchsize, processes = setting.args.batchsize, setting.processes
        drops = ", ".join(f"{drop:,}" for drop in plan.drops) or "none"
        warm_up = f", warm-up at {schedule.WARM_UP_RATE}" if self.identity["warm-up"] else ""
        parameters = updater.optimizer.target.count_params()
        print(f"Device: {record.device_name(setting.device)}")
        print(f"Backend: {setting.backend}")
        print(f"# Network: {self.title}, {parameters:,} parameters")
        print(
            f"# Data: {setting.dataset.name}, {setting.size:,} training and "
            f"{len(setting.dataset.test_y):,} {setting.evaluation} images"
        )
        print(f"# Augmentation: {augmentation.KINDS[setting.args.augmentation]}")
        shared = f", {batchsize // processes.size} in each of {processes.size} processes"
        print(f"# Minibatch-size: {batchsize}{shared if processes.size > 1 else ''}")
        print(
            f"# epoch: {plan.iterations * batchsize / setting.size:.1f} ({plan.iterations:,} "
            f"iterations, {plan.name}: rate {schedule.INITIAL_RATE}, "
            f"a tenth from iterations {drops}{warm_up})"
        )
        print(f"# Seed: {self.identity['seed']}")
        print(f"# Code: {record.describe_code(git)}")
        print(f"# Run folder: {self.folder}")
        if resumed:
            print(f"# Going on from {resumed}, iteration {updater.iteration:,}")
        if first := functions.first_start():
            print(first)
        print(flush=True)

    def _start(self, iteration: int) -> dict:
        kind = ARCHITECTURES[self.identity["architecture"]]
        return {
            "label": kind.label,
            "beside": kind.beside,
            "layers": self.layers,
            "formula": kind.formula,
            "sources": record.sources(kind.module, kind.block, kind.stem, kind.head),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "iteration": iteration,
            "command": record.command(),
            "data": self.setting.dataset.source,
            "data digest": self.setting.dataset.digest,
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
            architecture=self.identity["architecture"],
            n=self.identity["n"],
            dataset=self.setting.dataset.name,
            classes=self.setting.dataset.classes,
            seed=self.identity["seed"],
            epoch=updater.epoch,
            iteration=updater.iteration,
            groups=network.groups,
        )
        weights.save(self.folder / "blocks.h5", network, description, self.setting.mean)


def _note_changes(starts: list[dict], start: dict) -> None:
    """Print what is other than before, and may make the run another than it would have been."""
    if (device := starts[-1].get("device")) != start["device"]:
        print(f"NOTE: begun on {device}: on another processor the last digits")
        print("      of the log may differ from those of an uninterrupted run.\n", flush=True)
    if changed := record.changed_sources(starts, start):
        print(f"NOTE: {', '.join(changed)}: changed since this run was begun. If it computes")
        print("      something else now, the run is of neither.\n", flush=True)


def result(folder: Path, evaluation: str) -> tuple[dict, dict, bool]:
    """Find of a log: last entry, entry of the best evaluation, and whether the loss diverged.

    Of partial training only the last stage counts: before it blocks are missing.
    """
    log = files.read_json(folder / "log")
    whole = [entry for entry in log if entry.get("stage") == log[-1].get("stage")]
    best = max(whole, key=lambda entry: entry[f"{evaluation}/main/accuracy"])
    return log[-1], best, not all(math.isfinite(entry["main/loss"]) for entry in log)


def report(folder: Path, setting: Setting) -> None:
    """Print what a complete run has reached."""
    key = f"{setting.evaluation}/main/accuracy"
    last, best, diverged = result(folder, setting.evaluation)
    if diverged:
        print("DIVERGED: the training loss is no longer a number; the log says from when")
    what = f"{setting.evaluation} accuracy on {setting.dataset.name}"
    print(f"{what}, last epoch ({last['epoch']}): {last[key]:.2%}")
    chosen = "on the very images it is measured on, so not a result"
    print(f"{what}, best epoch ({best['epoch']}): {best[key]:.2%} (chosen {chosen})")
    print(
        f"training took {clock(last['elapsed_time'])}; log, snapshots, blocks.h5 and "
        f"args.json are in {folder}\n",
        flush=True,
    )


def print_summary(runs: Sequence[Run]) -> None:
    """Print last-epoch accuracy by depth: mean and sample standard deviation over the seeds."""
    setting = runs[0].setting
    evaluation, data = setting.evaluation, setting.dataset.name
    print(f"{evaluation} accuracy on {data}, last epoch, by layers:")
    for layers in dict.fromkeys(run.layers for run in runs):
        results = [result(run.folder, evaluation) for run in runs if run.layers == layers]
        values = [100 * last[f"{evaluation}/main/accuracy"] for last, _, _ in results]
        deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
        diverged = sum(diverged for _, _, diverged in results)
        note = f", {diverged} of them diverged" if diverged else ""
        runs_note = f"{len(values)} run{'s' * (len(values) > 1)}{note}"
        print(f"{layers:5d}  {mean(values):6.2f}{deviation} %  ({runs_note})", flush=True)
