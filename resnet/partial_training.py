"""Initialization of weights by partial training (report, III.B): one block, then two, then three.

What the report leaves open is settled as follows.

- Its top is the input's side: top-down trains conv2 first, bottom-up conv4.
- For a block that is not there stands average pooling where the block has stride 2, then channels
  of zeros (``AbsentBlock``), so that every group keeps its shape through the stages.
- conv1 and fc carry over to the next stage like the blocks: they were trained together with them,
  and fresh ones would send noise through the blocks before. ``--new-ends`` draws them anew.
- Momentum begins at zero in each stage: the rate jumps back from 0.01 to 0.1, and the files that
  connect the stages, perhaps days apart, hold weights alone.
- Batch-normalization statistics are part of a block's weights and go with them.
- A scaled block (``--scale``) has the last gamma of each of its modules multiplied by lambda, so
  that a module begins as the identity plus a perturbation of size lambda. To scale a convolution
  in front of a normalization would leave the function as it was.
- A frozen block (``--freeze``) computes as at test time and does not change by a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import chainer
from chainer import training as chainer_training

from resnet import extensions, files, run_folder, schedule, training, weights
from resnet.command import USAGE, InputError
from resnet.network import BLOCKS, GROUPS, Network, resnet
from resnet.schedule import LAST_EPOCHS, STAGES
from resnet.training import Run, Setting

ORDERS = {"top-down": BLOCKS, "bottom-up": BLOCKS[::-1]}
DEPTHS = (5,)  # the report's net for this has 32 layers


class PartialTraining:
    """The three stages, each a run, and the folder that joins them.

    ``setting.args`` has, beside the flags of all experiments, ``stage``, ``scale``, ``freeze`` and
    ``new_ends``.

    Args:
        order: ``top-down`` or ``bottom-up``.
        n: Modules per block.
        seed: Seed of weights, order and augmentation.
        setting: What it shares with the other runs of the command.

    Attributes:
        layers, identity, folder, schedule: As those of a ``Run``.
        stages: Runs in a row, each of which begins with what the one before saved.
    """

    def __init__(self, order: str, n: int, seed: int, setting: Setting) -> None:
        args, name = setting.args, order.replace("-", "_")
        if args.resume is not None and args.stage is None:
            raise InputError("--resume: a snapshot is of one stage; legal: with --stage K", USAGE)
        self.order, self.n, self.seed, self.setting = order, n, seed, setting
        self.layers = resnet.depth(n)
        self.chosen = training.choices(args) | options(args)
        plans = [stage_schedule(k, args, setting.size) for k in range(1, len(STAGES) + 1)]
        self.schedule = in_a_row(plans)
        identity = training.identify(setting, "resnet", n, seed, self.schedule, self.chosen)
        self.identity = {**identity, "architecture": name}
        self.folder = training.name_folder(setting, f"{name}-{self.layers}", seed, self.chosen)
        self.stages = [self.make_stage(number, plan) for number, plan in enumerate(plans, 1)]

    # A stage.

    def make_stage(self, number: int, plan: schedule.Schedule) -> Run:
        """Make the run that trains a ResNet with the first ``number`` blocks of the order."""
        n, seed, setting = self.n, self.seed, self.setting
        identity = training.identify(setting, "resnet", n, seed, plan, self.chosen)
        return Run(
            setting=setting,
            title=f"ResNet-{self.layers} (n = {n}), {self.order}, stage {number} of {len(STAGES)} "
            f"with {', '.join(self.present(number))}",
            layers=self.layers,
            identity={**identity, "order": self.order, "stage": number},
            folder=self.folder / f"stage{number}",
            schedule=plan,
            stream=seed + (number << 32),  # other batches than the stage before
            build=partial(self.build, number),
            extend=partial(self.extend, number),
            groups=tuple(name for name in GROUPS if name in ("conv1", *self.present(number), "fc")),
        )

    def present(self, number: int) -> tuple[str, ...]:
        """List the blocks of stage ``number``, the new one last."""
        return ORDERS[self.order][:number]

    def build(self, number: int) -> Network:
        """Make the network of stage ``number``, its earlier blocks as the stage before left them.

        Raises:
            InputError: The stage before is not complete.
        """
        network = resnet(self.n, self.seed, self.present(number))
        *earlier, new = self.present(number)
        if earlier:
            before = self.stages[number - 2]
            if not before.is_complete():
                raise InputError(
                    f"{before.folder}: not complete, and stage {number} begins with its blocks; "
                    f"legal: --stage {number - 1} first, or no --stage"
                )
            groups = (*earlier, *(() if self.setting.args.new_ends else ("conv1", "fc")))
            weights.load(before.folder / "blocks.h5", network, "resnet", groups)
            scale(network[new], self.setting.args.scale)
        return network

    def extend(self, number: int, trainer: chainer_training.Trainer) -> None:
        """Freeze blocks if wanted, measure how far they move, and join the logs."""
        epoch_end = extensions.EpochEnd(self.stages[number - 1].schedule.iterations)
        network = trainer.updater.optimizer.target
        if self.setting.args.freeze:
            network.freeze(self.present(number)[:-1])
        # How far each block moves: the report's explanation of what it saw.
        trainer.extend(extensions.Distance(network), trigger=epoch_end)
        if self.setting.processes.rank == 0:
            # The log of all stages, for the plots.
            trainer.extend(
                lambda _: self.join(),
                name="join",
                trigger=epoch_end,
                priority=extensions.AFTER_LOG,
            )

    # All stages.

    def train(self) -> None:
        """Train every stage that is not complete, and put the last one's blocks beside the log."""
        with run_folder.only_writers(self.folder, self.setting.processes):
            self._train()

    def _train(self) -> None:
        run_folder.read_starts(self.folder, self.identity)
        processes = self.setting.processes
        complete = processes.agree(self.is_complete())
        if processes.rank == 0:
            for stage in self.stages:  # of those that are complete now, each log is read again
                if stage.is_complete():
                    stage.repair_log()
            if complete:
                self.repair_log()
        processes.wait()
        if complete:
            print(f"{self.folder}: already complete")
            training.report(self.folder, self.setting)
            return
        for number, stage in enumerate(self.stages, 1):
            if self.setting.args.stage in (None, number):
                stage.train()
        if processes.agree(self.stages[-1].is_complete()):
            if processes.rank == 0:
                self.join(done=True)
                content = files.read_ours(self.stages[-1].folder / "blocks.h5")
                files.write(self.folder / "blocks.h5", content)
            processes.wait()
            training.report(self.folder, self.setting)

    def is_complete(self) -> bool:
        """Tell whether the folder holds the blocks of the last stage, intact."""
        return self.stages[-1].has_saved(self.folder)

    def repair_log(self) -> None:
        """Join the logs of the stages again where the whole one has changed."""
        evaluation, iterations = self.setting.evaluation, self.schedule.iterations
        try:
            run_folder.check_kept_log(self.folder, evaluation, iterations)
        except (ValueError, FileNotFoundError):
            self.join(done=True)

    def join(self, done: bool = False) -> None:
        """Write one log and one args.json from those of the stages, of which all may be done."""
        entries, starts = [], []
        iterations = seconds = 0
        for number, stage in enumerate(self.stages, 1):
            try:
                log = files.read_json(stage.folder / "log")
                run_folder.check_log(log, self.setting.evaluation)
            except (FileNotFoundError, ValueError):
                break
            for entry in log:
                iteration = iterations + entry["iteration"]
                epoch = round(iteration * self.setting.args.batchsize / self.setting.size, 2)
                entries.append(
                    {
                        **entry,
                        "stage": number,
                        "iteration": iteration,
                        "epoch": int(epoch) if epoch == int(epoch) else epoch,
                        "elapsed_time": seconds + entry["elapsed_time"],
                    }
                )
            starts += run_folder.read_starts(stage.folder, stage.identity)
            iterations += stage.schedule.iterations
            seconds = entries[-1]["elapsed_time"]
        if not entries:
            raise InputError(f"{self.stages[0].folder / 'log'}: missing or damaged")
        run_folder.write_log(self.folder / "log", entries)
        run_folder.write_record(self.folder, self.identity, starts, done)


def in_a_row(plans: Sequence[schedule.Schedule]) -> schedule.Schedule:
    """Join the schedules of stages; that the rate jumps up between them is not in it."""
    *begins, end = accumulate((plan.iterations for plan in plans), initial=0)
    drops = (begin + drop for begin, plan in zip(begins, plans, strict=True) for drop in plan.drops)
    name = plans[0].name.replace("stage 1", "partial")  # maybe shortened
    return schedule.Schedule(name, end, tuple(drops))


def options(args) -> dict:
    """List by name the choices that are not the report's."""
    chosen = {"scale": args.scale, "freeze": args.freeze, "new ends": args.new_ends}
    default = {"scale": 1.0, "freeze": False, "new ends": False}
    return {name: value for name, value in chosen.items() if value != default[name]}


def stage_schedule(number: int, args, size: int) -> schedule.Schedule:
    """Make the schedule of stage ``number``: the report's, or all shortened by a flag."""
    length, drops = STAGES[number - 1]
    factor = (args.epoch or LAST_EPOCHS) / LAST_EPOCHS
    drops = [factor * drop for drop in drops]
    plan = schedule.epochs(factor * length, drops, size, args.batchsize, f"stage {number}")
    return plan.shortened(args.shorten)


def scale(block: chainer.ChainList, factor: float) -> None:
    """Multiply the last gamma of each module of ``block`` by ``factor``."""
    for module in block:
        module.bn2.gamma.array *= factor
