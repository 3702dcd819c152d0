"""The training step: next batch, augmentation, rate of this iteration, one update."""

from __future__ import annotations

import contextlib
import copy

import chainer
import numpy as np
from chainer import training

from resnet import augmentation, functions, random
from resnet.parallel import ALONE, Processes
from resnet.schedule import WARM_UP_RATE, Schedule, WarmUp


class Images:
    """A set of images on the device of the network.

    Args:
        x: uint8 (N, 3, 32, 32).
        y: Labels, int32 (N,).
        mean: Per-pixel mean of the training images, float32 (3, 32, 32), in units of 0..1.
        device: ``chainer.backend.Device`` that keeps the arrays.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, mean: np.ndarray, device) -> None:
        self.x, self.y, self.mean = device.send(x), device.send(y), device.send(mean)

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, where):
        """Images of the indices ``where`` without their mean, float32 in 0..1, and the labels."""
        return self.x[where] * np.float32(1 / 255) - self.mean, self.y[where]

    def part(self, where: slice) -> Images:
        """The images of ``where`` alone."""
        part = copy.copy(self)
        part.x, part.y = self.x[where], self.y[where]
        return part


class Updater(training.Updater):
    """Updates ``optimizer``'s network once per call, on batches of an endless shuffled stream.

    Each pass over the images is a new random order; a batch may reach over the end of a pass, so
    iterations count as in He et al. Order and augmentation are functions of the seed and the
    iteration: nothing of them needs saving.

    Args:
        optimizer: From ``functions.momentum_sgd``.
        images: The training set.
        batchsize: Images per update.
        schedule: Rate of every iteration.
        warm_up: Whether to begin with the warm-up of He et al. 2015, 4.2.
        seed: Seed of order and augmentation.
        processes: Those that train together; each takes its share of every batch.
        augment: What is random about the images, one of ``augmentation.KINDS``.
    """

    def __init__(
        self,
        optimizer,
        images: Images,
        batchsize: int,
        schedule: Schedule,
        warm_up: bool = False,
        seed: int = 0,
        processes: Processes = ALONE,
        augment: str = "report",
    ) -> None:
        self.optimizer = optimizer
        self.images = images
        self.batchsize = batchsize
        self.schedule = schedule
        self.warm_up = WarmUp(warm_up)
        self.seed = seed
        self.processes = processes
        self.augment = augment
        self.iteration = 0
        self._orders: dict[int, object] = {}  # at most the two passes that a batch can touch
        # Kept on the device: reading them every iteration would make the host wait for a GPU.
        xp = chainer.backend.get_array_module(images.x)
        self._loss, self._correct = xp.zeros((), np.float64), xp.zeros((), np.int64)
        self._updates = 0
        self._skipped = getattr(optimizer, "skipped", None)  # those of all processes are the same
        self._recorded = None
        # A recorded step does not meet other processes, and has the report's augmentation.
        if processes.size == 1 and augment == "report":
            self._recorded = functions.recorded_step(
                optimizer,
                images,
                batchsize=batchsize,
                seed=seed,
                order=lambda epoch: self._order(xp, epoch),
                padding=augmentation.PADDING,
                purpose=random.AUGMENT,
                loss=self._loss,
                correct=self._correct,
            )

    # What a Chainer trainer asks of an updater.

    @property
    def epoch_detail(self) -> float:
        return self.iteration * self.batchsize / len(self.images)

    @property
    def previous_epoch_detail(self) -> float:
        return max(self.iteration - 1, 0) * self.batchsize / len(self.images)

    @property
    def epoch(self) -> int:
        return self.iteration * self.batchsize // len(self.images)

    @property
    def is_new_epoch(self) -> bool:
        before = (self.iteration - 1) * self.batchsize // len(self.images)
        return self.iteration > 0 and self.epoch > before

    def get_optimizer(self, name: str):
        return {"main": self.optimizer}[name]

    def get_all_optimizers(self):
        return {"main": self.optimizer}

    def connect_trainer(self, trainer) -> None:
        pass

    def finalize(self) -> None:
        pass

    # The step.

    def rate(self) -> float:
        """Learning rate of the coming update."""
        return WARM_UP_RATE if self.warm_up.active else self.schedule.rate(self.iteration)

    def batch(self):
        """The coming batch, augmented: ``(x, t)``, float32 (B, 3, 32, 32) and int32 (B,).

        Of several processes each has its share of the B images.
        """
        xp = chainer.backend.get_array_module(self.images.x)
        share = self.processes.share(self.batchsize)
        x, t = self.images.batch(self._indices(xp)[share])
        place = augmentation.draw(xp, self.seed, self.iteration, self.batchsize, self.augment)
        return augmentation.crop_and_flip(x, *(values[share] for values in place)), t

    def update(self) -> None:
        """Train on the next batch at this iteration's rate."""
        if self._recorded and not self.warm_up.active:  # whose end the host must see
            self.optimizer.lr = self.rate()
            self._recorded(self.iteration)
            self._updates += 1
            self.iteration += 1
            return
        x, t = self.batch()
        network = self.optimizer.target
        y = network(x)
        loss = functions.softmax_cross_entropy(y, t)
        network.cleargrads()
        loss.backward()
        self.processes.average_gradients(network)
        self.optimizer.lr = self.rate()
        self.optimizer.update()
        correct = (y.array.argmax(axis=1) == t).sum()
        self._loss += loss.array.astype(np.float64) / self.processes.size
        self._correct += correct
        self._updates += 1
        if self.warm_up.active:
            (correct,) = self.processes.sum(correct)
            self.warm_up.observe(self.iteration, 1 - correct / self.batchsize)
        self.iteration += 1

    def statistics(self) -> dict[str, float]:
        """Mean loss and accuracy (0..1) of the batches since the last call, and the last rate.

        With float16 gradients the number of steps, too, that were skipped because one was infinite.
        """
        updates = max(self._updates, 1)
        loss, correct = self.processes.sum(self._loss, self._correct)
        summary = {
            "main/loss": loss / updates,
            "main/accuracy": correct / (updates * self.batchsize),
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
        xp = chainer.backend.get_array_module(self.images.x)
        self._loss[...] = xp.asarray(serializer("loss", self._loss))
        self._correct[...] = xp.asarray(serializer("correct", self._correct))
        self._updates = int(serializer("updates", self._updates))
        if self._skipped is not None:
            with contextlib.suppress(KeyError):  # a snapshot of another precision
                self._skipped[...] = xp.asarray(serializer("skipped", self._skipped))
        self._be_first()
        if self._recorded:
            self._recorded.captured.check()

    def _order(self, xp, epoch: int):
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            size = len(self.images)
            self._orders[epoch] = random.permutation(xp, size, self.seed, random.SHUFFLE, epoch)
        return self._orders[epoch]

    def _indices(self, xp):
        """Indices of the coming batch in the stream of passes over the images."""
        size = len(self.images)
        start = self.iteration * self.batchsize
        epoch, start = divmod(start, size)
        indices = self._order(xp, epoch)[start : start + self.batchsize]
        missing = self.batchsize - len(indices)  # the batch is no larger than the set
        if missing:
            indices = xp.concatenate((indices, self._order(xp, epoch + 1)[:missing]))
        return indices
