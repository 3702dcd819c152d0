"""Trainer extensions: evaluation, what the log says, and what a person watches."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import ClassVar

import chainer
import numpy as np
from chainer import training
from chainer.training.extensions import LogReport

from resnet import functions
from resnet.batches import Images
from resnet.command import clock, unheard
from resnet.parallel import ALONE, Processes
from resnet.run_folder import write_log

AFTER_LOG = training.PRIORITY_READER - 1  # priority of what needs the newest line of the log
EVALUATION_BATCH = 500  # images at once; memory only, the result does not depend on it


def predict(network, images: Images):
    """Compute the logits of all images at test time, (N, classes), on the device of the images."""
    xp = chainer.backend.get_array_module(images.x)
    logits = []
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        for start in range(0, len(images), EVALUATION_BATCH):
            x, _ = images.batch(slice(start, start + EVALUATION_BATCH))
            logits.append(network(x).array)
    return xp.concatenate(logits)


class Evaluator(training.Extension):
    """Reports accuracy and loss over all images of a set: correct and total are counted.

    Chainer's own evaluator averages the means of batches, which is wrong when the last one is
    smaller. Single view, as in He et al. 2015, 4.2.

    Args:
        network: What is evaluated.
        images: The test set, or the held-out part of the training set.
        name: Prefix of what is reported: ``test`` or ``validation``.
        processes: Those that train together; each evaluates its share of the images.
    """

    priority = training.PRIORITY_WRITER

    def __init__(self, network, images: Images, name: str, processes: Processes = ALONE) -> None:
        self.network, self.name, self.processes = network, name, processes
        self.count = len(images)
        self.share = images.part(processes.share(self.count))
        self._recorded = None
        if processes.size == 1:  # ChainerMN works on the null stream, which waits for no other
            self._recorded = functions.recorded_evaluation(network, self.share, EVALUATION_BATCH)

    def __call__(self, trainer=None) -> None:
        self.processes.average_statistics(self.network)
        loss, correct = self.processes.sum(*self._sums())
        accuracy, loss = correct / self.count, loss / self.count
        chainer.report({f"{self.name}/main/loss": loss, f"{self.name}/main/accuracy": accuracy})

    def _sums(self) -> tuple[float, int]:
        """Add up this process's share: the images' losses, and the number of right answers."""
        share = self.share
        if self._recorded:
            return self._recorded()
        if not len(share):
            return 0.0, 0
        logits = predict(self.network, share)
        loss = len(share) * float(functions.softmax_cross_entropy(logits, share.y).array)
        return loss, int((logits.argmax(axis=1) == share.y).sum())


class TrainingStatistics(training.Extension):
    """Reports loss, accuracy and rate of the updates since the last report."""

    priority = training.PRIORITY_WRITER

    def __call__(self, trainer) -> None:
        chainer.report(trainer.updater.statistics())


class Distance(training.Extension):
    """Reports how far the weights of each group have moved since this object was made.

    The distance is the Euclidean norm of the change over all parameters of the group, divided by
    the norm they had: 0 for weights that did not move. The log calls it ``conv2/distance`` etc.
    """

    priority = training.PRIORITY_WRITER

    def __init__(self, network) -> None:
        self.network = network
        self._start = {name: self._weights(name) for name in network.groups}

    def __call__(self, trainer) -> None:
        distances = {}
        for name, start in self._start.items():
            moved = np.linalg.norm(self._weights(name) - start)
            distances[f"{name}/distance"] = float(moved / np.linalg.norm(start))
        chainer.report(distances)

    def _weights(self, name: str) -> np.ndarray:
        parameters = sorted(self.network[name].namedparams())
        return np.concatenate([chainer.cuda.to_cpu(p.array).ravel() for _, p in parameters])


class Log(LogReport):
    """Writes the log as Chainer's ``LogReport``, but whole, and on the disk, at each epoch.

    Args:
        path: The file.
        trigger: When an entry is written.
    """

    def __init__(self, path: Path, trigger) -> None:
        super().__init__(trigger=trigger, log_name=None)
        self.path = path

    def __call__(self, trainer) -> None:
        before = len(self.log)
        super().__call__(trainer)
        if len(self.log) > before:
            write_log(self.path, self.log)


class EpochEnd:
    """Trigger: the end of each epoch, and the end of the training wherever it falls."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations

    def __call__(self, trainer) -> bool:
        updater = trainer.updater
        return updater.is_new_epoch or updater.iteration >= self.iterations


class Progress(training.Extension):
    """Prints one line per epoch; on a terminal also a bar with the time left.

    Both fit the terminal's width, as it is when they are printed: columns are left out, then the
    bar gets shorter.

    Args:
        log_report: The trainer's ``LogReport``, whose newest entry is printed.
        evaluation: Prefix of the evaluation's entries, ``test`` or ``validation``.
        iterations: Length of the training.
    """

    priority = AFTER_LOG
    BAR = 30
    WIDTHS: ClassVar = {"epoch": 5, "iteration": 9, "rate": 6, "train loss": 10, "train error": 11,
              "test error": 16, "time": 8, "left": 8}  # fmt: skip
    NEEDLESS = ("left", "iteration", "time", "rate", "train error")  # left out in this order

    def __init__(self, log_report, evaluation: str, iterations: int, out=sys.stdout) -> None:
        self.log_report = log_report
        self.evaluation = evaluation
        self.iterations = iterations
        self.out = out
        self._bar_at = 0.0
        self._head: list[str] = []
        self._terminal = False

    def initialize(self, trainer) -> None:
        # A launcher may give its processes a terminal that is none; the jobs say that it is dumb.
        alone = trainer.updater.processes.size == 1
        self._terminal = alone and self.out.isatty() and os.environ.get("TERM") != "dumb"
        self._start = time.monotonic(), trainer.updater.iteration
        self._printed = len(self.log_report.log)
        self._print_head()

    def __call__(self, trainer) -> None:
        log = self.log_report.log
        left = clock(self._left(trainer))
        if len(log) > self._printed:
            self._printed = len(log)
            entry = log[-1]
            cells = {
                "epoch": f"{entry['epoch']:5d}",
                "iteration": f"{entry['iteration']:9d}",
                "rate": f"{entry['lr']:<6g}",
                "train loss": f"{entry['main/loss']:10.4f}",
                "train error": f"{1 - entry['main/accuracy']:11.2%}",
                "test error": f"{1 - entry[self.evaluation + '/main/accuracy']:16.2%}",
                "time": f"{clock(entry['elapsed_time']):>8}",
                "left": f"{left:>8}",
            }
            self._clear()
            self._print_head()
            self._write("  ".join(cells[name] for name in self._head)[: self._width()] + "\n")
        if self._terminal and time.monotonic() - self._bar_at > 0.25:
            self._bar_at = time.monotonic()
            iteration, width = trainer.updater.iteration, self._width()
            text = f"iteration {iteration} of {self.iterations}, {left} left"
            bar = min(self.BAR, width - len(text) - 3)
            marks = "#" * (bar * iteration // self.iterations)
            text = f"[{marks:.<{bar}}] {text}" if bar > 0 else text
            self._clear()
            self._write(text[:width])

    def finalize(self) -> None:
        self._clear()

    def _print_head(self) -> None:
        """Print the columns' names, at first and where a new width lets others in or out."""
        width, names = self._width(), list(self.WIDTHS)
        for name in self.NEEDLESS:
            if sum(2 + self.WIDTHS[each] for each in names) - 2 > width:
                names.remove(name)
        if names != self._head:
            self._head = names
            titles = {"rate": "rate  ", "test error": f"{self.evaluation} error"}
            cells = (f"{titles.get(name, name):>{self.WIDTHS[name]}}" for name in names)
            self._write("  ".join(cells)[:width] + "\n")

    def _width(self) -> int:
        """Count the letters that fit a line: in the last column, some terminals begin a new one."""
        if not self._terminal:
            return sys.maxsize
        try:
            columns = os.get_terminal_size(self.out.fileno()).columns
        except (OSError, ValueError):
            columns = 0
        return (columns or 80) - 1

    def _clear(self) -> None:
        if self._terminal:
            self._write("\r\033[K")

    def _write(self, text: str) -> None:
        with unheard(self.out):
            self.out.write(text)
            self.out.flush()

    def _left(self, trainer) -> float:
        """Estimate the seconds left, at the pace since this process began."""
        begin, first = self._start
        done = trainer.updater.iteration - first
        return (time.monotonic() - begin) / max(done, 1) * (self.iterations - first - done)
