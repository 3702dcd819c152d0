"""The training step: the next batch, the rate of this iteration, one update."""

from __future__ import annotations

import contextlib

import chainer
import numpy as np
from chainer import training

from resnet import functions, random
from resnet.batches import Batches
from resnet.parallel import ALONE, Processes
from resnet.schedule import WARM_UP_RATE, Schedule, WarmUp


class Updater(training.Updater):
    """Updates ``optimizer``'s network once per call, on one batch after the other.

    Args:
        optimizer: From ``functions.momentum_sgd``.
        batches: What the network is trained on.
        schedule: Rate of every iteration.
        warm_up: Whether to begin with the warm-up of He et al. 2015, 4.2.
        processes: Those that train together; each takes its share of every batch.
    """

    def __init__(
        self,
        optimizer,
        batches: Batches,
        schedule: Schedule,
        warm_up: bool = False,
        processes: Processes = ALONE,
    ) -> None:
        self.optimizer = optimizer
        self.batches = batches
        self.schedule = schedule
        self.warm_up = WarmUp(warm_up)
        self.processes = processes
        self.iteration = 0
        # Kept on the device: reading them every iteration would make the host wait for a GPU.
        xp = chainer.backend.get_array_module(batches.images.x)
        self._loss, self._correct = xp.zeros((), np.float64), xp.zeros((), np.int64)
        self._updates = 0
        self._skipped = getattr(optimizer, "skipped", None)  # those of all processes are the same
        self._recorded = None
        # A recorded step does not meet other processes, and has the report's augmentation.
        if processes.size == 1 and batches.augment == "report":
            sums = self._loss, self._correct
            self._recorded = functions.recorded_step(optimizer, batches, *sums)

    # What a Chainer trainer asks of an updater.

    @property
    def epoch_detail(self) -> float:
        return self.iteration * self.batches.size / len(self.batches.images)

    @property
    def previous_epoch_detail(self) -> float:
        return max(self.iteration - 1, 0) * self.batches.size / len(self.batches.images)

    @property
    def epoch(self) -> int:
        return self.iteration * self.batches.size // len(self.batches.images)

    @property
    def is_new_epoch(self) -> bool:
        before = (self.iteration - 1) * self.batches.size // len(self.batches.images)
        return self.iteration > 0 and self.epoch > before

    def get_optimizer(self, name: str):
        return {"main": self.optimizer}[name]

    def get_all_optimizers(self):
        return {"main": self.optimizer}

    def finalize(self) -> None:
        pass

    # The step.

    def rate(self) -> float:
        """Compute the learning rate of the coming update."""
        return WARM_UP_RATE if self.warm_up.active else self.schedule.rate(self.iteration)

    def batch(self):
        """Make the coming batch, as ``Batches.batch``; of several processes each has a share."""
        return self.batches.batch(self.iteration, self.processes.share(self.batches.size))

    def update(self) -> None:
        """Train on the next batch at this iteration's rate."""
        self.optimizer.lr = self.rate()
        if self._recorded and not self.warm_up.active:  # whose end the host must see
            self._recorded(self.iteration)
        else:
            self._train()
        self._updates += 1
        self.iteration += 1

    def _train(self) -> None:
        x, t = self.batch()
        random.seed_numpy(self.batches.seed, self.iteration, self.processes.rank)
        network = self.optimizer.target
        y = network(x)
        loss = functions.softmax_cross_entropy(y, t)
        network.cleargrads()
        loss.backward()
        self.processes.average_gradients(network)
        self.optimizer.update()
        correct = (y.array.argmax(axis=1) == t).sum()
        self._loss += loss.array.astype(np.float64) / self.processes.size
        self._correct += correct
        if self.warm_up.active:
            (correct,) = self.processes.sum(correct)
            self.warm_up.observe(self.iteration, 1 - correct / self.batches.size)

    def statistics(self) -> dict[str, float]:
        """Compute mean loss and accuracy (0..1) since the last call, and tell the last rate.

        With float16 gradients the number of steps, too, that were skipped because one was infinite.
        """
        updates = max(self._updates, 1)
        loss, correct = self.processes.sum(self._loss, self._correct)
        summary = {
            "main/loss": loss / updates,
            "main/accuracy": correct / (updates * self.batches.size),
            "lr": self.optimizer.lr,
        }
        if self._skipped is not None:
            summary["main/skipped"] = int(self._skipped)
            self._skipped[...] = 0
        self._loss[...] = self._correct[...] = self._updates = 0
        if self._recorded:
            self._recorded.captured.check()  # extensions may have replaced weights since
        return summary

    def prepare_saving(self) -> None:
        """Bring to the first of several processes what a snapshot holds; all of them call this."""
        self.processes.average_statistics(self.optimizer.target)
        loss, correct = self.processes.sum(self._loss, self._correct)
        self._loss[...], self._correct[...] = loss, correct
        self._be_first()

    def _be_first(self) -> None:
        if self.processes.rank > 0:  # the first one has the sums of all
            self._loss[...], self._correct[...] = 0, 0

    def serialize(self, serializer) -> None:
        """Save or load all that the next step depends on."""
        self.optimizer.serialize(serializer["optimizer"])
        self.optimizer.target.serialize(serializer["network"])
        self.warm_up.serialize(serializer["warm_up"])
        self.iteration = int(serializer("iteration", self.iteration))
        self.optimizer.lr = float(serializer("lr", self.optimizer.lr))  # the last one, for the log
        xp = chainer.backend.get_array_module(self._loss)
        self._loss[...] = xp.asarray(serializer("loss", self._loss))
        self._correct[...] = xp.asarray(serializer("correct", self._correct))
        self._updates = int(serializer("updates", self._updates))
        if self._skipped is not None:
            with contextlib.suppress(KeyError):  # a snapshot of another precision
                self._skipped[...] = xp.asarray(serializer("skipped", self._skipped))
        self._be_first()
        if self._recorded:
            self._recorded.captured.check()
