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

import shutil
from pathlib import Path

import chainer
from chainer import training as chainer_training

from resnet import extensions, files, schedule, training, weights
from resnet.command import USAGE, InputError
from resnet.network import BLOCKS, GROUPS, Network, depth, resnet
from resnet.training import Run, Setting

ORDERS = {"top-down": BLOCKS, "bottom-up": BLOCKS[::-1]}
# Epochs of each stage and where its rate drops (report, III.B).
STAGES = ((50, (40,)), (50, (40,)), (100, (40, 80)))
LAST_EPOCHS = STAGES[-1][0]
DEPTHS = (5,)  # the report's net for this has 32 layers


class PartialTraining(Run):
    """The three stages and the folder that joins them.

    ``args`` has, beside the flags of all experiments, ``stage``, ``scale``, ``freeze`` and
    ``new_ends``.

    Args:
        order: ``top-down`` or ``bottom-up``.
        n: Modules per block.
        seed: Seed of weights, order and augmentation.
        setting: What it shares with the other runs of the command.
    """

    def __init__(self, order: str, n: int, seed: int, setting: Setting) -> None:
        self.order = order
        self.name = order.replace("-", "_")
        super().__init__("resnet", n, seed, setting)
        if self.args.resume is not None and self.args.stage is None:
            raise InputError("--resume: a snapshot is of one stage; legal: with --stage K", USAGE)
        self.folder = self.args.out / self.folder_name(self.name)
        self.stages = [Stage(self, number, setting) for number in range(1, len(STAGES) + 1)]

    def choose_schedule(self) -> schedule.Schedule:
        """All stages in a row; the rate also jumps up where a stage begins, see the log."""
        plans = [stage_schedule(k, self.args, self.size) for k in range(1, len(STAGES) + 1)]
        drops, before = [], 0
        for plan in plans:
            drops += [before + drop for drop in plan.drops]
            before += plan.iterations
        name = plans[0].name.replace("stage 1", "partial")  # maybe shortened
        return schedule.Schedule(name, before, tuple(drops))

    @property
    def choices(self) -> dict:
        return {**super().choices, **options(self.args)}

    @property
    def identity(self) -> dict:
        return {**super().identity, "architecture": self.name}

    def train(self) -> None:
        """Train every stage that is not complete, and put the last one's blocks beside the log."""
        with training.only_writers(self.folder, self.setting.processes):
            self._train()

    def _train(self) -> None:
        training.read_starts(self.folder, self.identity)
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
            self.report()
            return
        for stage in self.stages:
            if self.args.stage in (None, stage.number):
                stage.train()
        if processes.agree(self.stages[-1].is_complete()):
            if processes.rank == 0:
                self.join()
                with files.whole(self.folder / "blocks.h5") as temporary:
                    shutil.copyfile(self.stages[-1].folder / "blocks.h5", temporary)
            processes.wait()
            self.report()

    def is_complete(self) -> bool:
        found = training.saved_blocks(self.folder)
        return found is not None and found.groups == GROUPS

    def repair_log(self) -> None:
        """Join the logs of the stages again where the whole one cannot be read."""
        path, iterations = self.folder / "log", self.schedule.iterations
        try:
            extensions.check_log(files.read_json(path), self.evaluation, iterations)
        except (ValueError, FileNotFoundError):
            self.join()

    def join(self) -> None:
        """Write one log and one args.json from those of the stages."""
        entries, starts = [], []
        iterations = seconds = 0
        for stage in self.stages:
            try:
                log = files.read_json(stage.folder / "log")
                extensions.check_log(log, self.evaluation)
            except (FileNotFoundError, ValueError):
                break
            for entry in log:
                iteration = iterations + entry["iteration"]
                epoch = round(iteration * self.args.batchsize / self.size, 2)
                entries.append(
                    {
                        **entry,
                        "stage": stage.number,
                        "iteration": iteration,
                        "epoch": int(epoch) if epoch == int(epoch) else epoch,
                        "elapsed_time": seconds + entry["elapsed_time"],
                    }
                )
            starts += training.read_starts(stage.folder, stage.identity)
            iterations += stage.schedule.iterations
            seconds = entries[-1]["elapsed_time"]
        if not entries:
            raise InputError(f"{self.stages[0].folder / 'log'}: missing or damaged")
        extensions.write_log(self.folder / "log", entries)
        training.write_record(self.folder, self.identity, starts)


class Stage(Run):
    """One stage: a ResNet with the first ``number`` blocks of the order.

    Args:
        whole: The partial training it belongs to.
        number: 1, 2 or 3.
        setting: What all runs of the command share.
    """

    def __init__(self, whole: PartialTraining, number: int, setting: Setting) -> None:
        self.whole, self.number = whole, number
        self.present = ORDERS[whole.order][:number]
        super().__init__("resnet", whole.n, whole.seed, setting)
        self.folder = whole.folder / f"stage{number}"
        self.stream = whole.seed + (number << 32)  # other batches than the stage before

    def choose_schedule(self) -> schedule.Schedule:
        return stage_schedule(self.number, self.args, self.size)

    @property
    def title(self) -> str:
        return (
            f"ResNet-{depth(self.n)} (n = {self.n}), {self.whole.order}, stage {self.number} of "
            f"{len(STAGES)} with {', '.join(self.present)}"
        )

    @property
    def choices(self) -> dict:
        return {**super().choices, **options(self.args)}

    @property
    def identity(self) -> dict:
        return {**super().identity, "order": self.whole.order, "stage": self.number}

    def build(self) -> Network:
        """The network of this stage, its earlier blocks as the stage before left them."""
        network = resnet(self.n, self.seed, self.present)
        *earlier, new = self.present
        if earlier:
            groups = (*earlier, *(() if self.args.new_ends else ("conv1", "fc")))
            weights.load(self.before(), network, "resnet", groups)
            scale(network[new], self.args.scale)
        return network

    def before(self) -> Path:
        """The file that the stage before wrote.

        Raises:
            InputError: It is not complete.
        """
        stage = self.whole.stages[self.number - 2]
        if not stage.is_complete():
            raise InputError(
                f"{stage.folder}: not complete, and stage {self.number} begins with its blocks; "
                f"legal: --stage {stage.number} first, or no --stage"
            )
        return stage.folder / "blocks.h5"

    def extend(self, trainer: chainer_training.Trainer) -> None:
        epoch_end = extensions.EpochEnd(self.schedule.iterations)
        network = trainer.updater.optimizer.target
        if self.args.freeze:
            network.freeze(self.present[:-1])
        # How far each block moves: the report's explanation of what it saw.
        trainer.extend(extensions.Distance(network), trigger=epoch_end)
        if self.setting.processes.rank == 0:
            # The log of all stages, for the plots.
            trainer.extend(
                lambda _: self.whole.join(),
                name="join",
                trigger=epoch_end,
                priority=extensions.AFTER_LOG,
            )


def options(args) -> dict:
    """The choices beyond the report that were made, by name."""
    chosen = {"scale": args.scale, "freeze": args.freeze, "new ends": args.new_ends}
    default = {"scale": 1.0, "freeze": False, "new ends": False}
    return {name: value for name, value in chosen.items() if value != default[name]}


def stage_schedule(number: int, args, size: int) -> schedule.Schedule:
    """The schedule of stage ``number``: the report's, or all shortened by a flag."""
    length, drops = STAGES[number - 1]
    factor = (args.epoch or LAST_EPOCHS) / LAST_EPOCHS
    drops = [factor * drop for drop in drops]
    plan = schedule.epochs(factor * length, drops, size, args.batchsize, f"stage {number}")
    return plan.shortened(args.shorten)


def scale(block: chainer.ChainList, factor: float) -> None:
    """Multiply the last gamma of each module of ``block`` by ``factor``."""
    for module in block:
        module.bn2.gamma.array *= factor
