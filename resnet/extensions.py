"""Trainer extensions: test evaluation, snapshots, progress, and the wish to stop."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import chainer
import numpy as np
from chainer import training
from chainer.serializers import DictionarySerializer, NpzDeserializer
from chainer.training.extensions import LogReport

from resnet import arrays, files, flags, functions
from resnet.arrays import Kind
from resnet.batches import Images
from resnet.command import InputError, clock, unheard
from resnet.parallel import ALONE, Processes

AFTER_LOG = training.PRIORITY_READER - 1  # priority of what needs the newest line of the log
EVALUATION_BATCH = 500  # images at once; memory only, the result does not depend on it


def predict(network, images: Images):
    """Logits of all images at test time, (N, classes), on the device of the images."""
    xp = chainer.backend.get_array_module(images.x)
    logits = []
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        for start in range(0, len(images), EVALUATION_BATCH):
            x, _ = images.batch(slice(start, start + EVALUATION_BATCH))
            logits.append(network(x).array)
    return xp.concatenate(logits)


class Evaluator(training.Extension):
    """Accuracy and loss over all images of a set: correct and total are counted.

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
        """Of this process's share: the images' losses added, and number of right answers."""
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
    """Chainer's ``LogReport``, whose file is whole, and on the disk, from one epoch to the next.

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


def write_log(path: Path, entries: list[dict]) -> None:
    """Write a log as Chainer's ``LogReport`` does."""
    with files.whole(path) as temporary:
        temporary.write_text(json.dumps(entries, indent=4))


def check_log(entries: object, evaluation: str, iterations: int | None = None) -> None:
    """Raise ``ValueError`` where ``entries`` are not a log as training writes it.

    Args:
        entries: What was read.
        evaluation: ``test`` or ``validation``.
        iterations: Where it has to end; anywhere by default.
    """
    keys = ("epoch", "iteration", "elapsed_time", "lr", "main/loss", "main/accuracy",
            f"{evaluation}/main/loss", f"{evaluation}/main/accuracy")  # fmt: skip
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("not a list of epochs")
    for key in keys:
        for value in (entry.get(key) for entry in entries):
            loss = key.endswith("loss") and type(value) is float  # may have diverged
            if not loss and not (type(value) in (int, float) and 0 <= value <= 1e15):
                raise ValueError(f"an epoch without a possible {key}")
    ends = entries[-1]["iteration"] if entries else 0
    if iterations is not None and ends != iterations:
        raise ValueError(f"ends at iteration {ends}, legal: {iterations}")


class EpochEnd:
    """Trigger: the end of each epoch, and the end of the training wherever it falls."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations

    def __call__(self, trainer) -> bool:
        updater = trainer.updater
        return updater.is_new_epoch or updater.iteration >= self.iterations


class StopRequest:
    """Lets training stop between two iterations: on a signal, or when its time is over.

    Signals are noted while it is entered, and to the end of a process that leaves by ``sys.exit``:
    a batch system and a launcher under it each send their own, at any time, and a later one must
    not keep a snapshot from being written. Only Ctrl-C ends the process at once, when it comes
    for a third time; the second tells what that loses. A closed terminal and a pipe without a
    reader are signals, too.

    Args:
        deadline: When the time is over, on the clock of ``time.monotonic``.

    Attributes:
        reason: Why training shall stop; None while it shall not.
        unsaved: Tells how many seconds of training no snapshot holds yet.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGPIPE)

    def __init__(self, deadline: float = math.inf) -> None:
        self.deadline = deadline
        self.unsaved: Callable[[], float] = lambda: 0
        self._signal: signal.Signals | None = None

    @property
    def reason(self) -> str | None:
        if self._signal is not None:
            return self._signal.name
        return "its time limit" if time.monotonic() >= self.deadline else None

    def __enter__(self) -> StopRequest:
        self._signal = None
        noted = set(self.SIGNALS)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            noted.remove(signal.SIGHUP)  # nohup
        self._before = {number: signal.signal(number, self._remember) for number in noted}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not SystemExit:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, _frame: object) -> None:
        first = self._signal is None
        if first:
            self._signal = signal.Signals(number)
        if number == signal.SIGINT:
            text = "finishing this iteration, then a snapshot"
            if not first:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                text += (
                    "; Ctrl-C once more ends it at once and loses the last "
                    f"{self.unsaved():.0f} s of training"
                )
            with contextlib.suppress(OSError):  # not print, which may be what was interrupted
                os.write(2, f"\n{text}\n".encode())


class UntilDone:
    """Stop trigger: all iterations done, or a wish to stop in one of the processes."""

    def __init__(self, iterations: int, request: StopRequest) -> None:
        self.iterations = iterations
        self.request = request

    def __call__(self, trainer) -> bool:
        updater = trainer.updater
        wish = updater.processes.any(self.request.reason is not None)
        return updater.iteration >= self.iterations or wish

    def get_training_length(self) -> tuple[int, str]:
        return self.iterations, "iteration"


class Snapshots(training.Extension):
    """The whole state of a training run, in files ``snapshot_iter_N.npz``.

    Behind each stands a digest, by which bits that rot are noticed. A file without one, of an
    older version, is read if all else about it is right.

    Args:
        folder: Where the files lie.
        identity: What the run trains; a snapshot of something else is refused.
        interval: Seconds between two snapshots.
        keep: How many of the newest files are kept.
    """

    priority = -100  # after the log, so that a snapshot holds the line of its own epoch

    def __init__(self, folder: Path, identity: dict, interval: float, keep: int = 2) -> None:
        self.folder = folder
        self.identity = identity
        self.interval = interval
        self.keep = keep
        self._last = time.monotonic()

    def age(self) -> float:
        """Seconds since the newest snapshot, or since training began."""
        return time.monotonic() - self._last

    def __call__(self, trainer) -> None:
        first = trainer.updater.processes.rank == 0  # decides for all
        due = first and self.age() >= self.interval
        if trainer.updater.processes.any(due):
            self.save(trainer)

    def save(self, trainer) -> Path:
        """Write a snapshot and remove the oldest ones beyond ``keep``.

        All processes that train together call this; the first one writes.
        """
        updater = trainer.updater
        updater.prepare_saving()
        path = self.folder / f"snapshot_iter_{updater.iteration}.npz"
        if updater.processes.rank > 0:
            return path
        serializer = DictionarySerializer()
        serializer.save(trainer)
        content = io.BytesIO()
        np.savez(content, identity=json.dumps(self.identity), sealed=True, **serializer.target)
        with files.whole(path) as temporary:
            temporary.write_bytes(files.seal(content.getvalue()))
        # Newer ones are damaged, or another --resume was asked for: they take nobody's place.
        older = [each for each in self.files() if _iteration(each) <= updater.iteration]
        for old in older[self.keep :]:
            old.unlink(missing_ok=True)
        self._last = time.monotonic()
        return path

    def files(self) -> list[Path]:
        """The snapshots in the folder, newest first."""

        found = self.folder.glob("snapshot_iter_*.npz")
        return sorted(found, key=_iteration, reverse=True)

    def resume_newest(self, trainer) -> Path | None:
        """Go on from the newest snapshot that is intact; name each damaged one on stderr."""
        paths = self.files()
        for path, before in itertools.zip_longest(paths, paths[1:]):
            try:
                state = self._read(path, trainer)
            except ValueError as error:
                then = "trying the one before" if before else "beginning anew, as there is no other"
                print(f"warning: {path} is damaged ({error}); {then}", file=sys.stderr)
                continue
            NpzDeserializer(state).load(trainer)
            return path
        return None

    def resume(self, path: Path, trainer) -> None:
        """Go on from the snapshot ``path``.

        Raises:
            InputError: It is missing, damaged, no snapshot, or of another run.
        """
        legal = "legal: a snapshot_iter_N.npz"
        if not path.is_file():
            raise InputError(f"--resume {path}: no such file; {legal}")
        try:
            state = self._read(path, trainer)
        except ValueError as error:
            raise InputError(
                f"--resume {path}: not a readable snapshot ({error}); {legal}"
            ) from None
        NpzDeserializer(state).load(trainer)

    def read_log(self, evaluation: str, iterations: int) -> tuple[list[dict], Path] | None:
        """A log that ends at ``iterations``, and the snapshot it was in; None if none has it."""
        for path in self.files():
            with contextlib.suppress(ValueError), files.parsing():
                content = self._parse(path)
                entries = json.loads(str(content[LOG]))
                check_log(entries, evaluation, iterations)
                return entries, path
        return None

    def _parse(self, path: Path) -> dict[str, np.ndarray]:
        """The arrays of a snapshot, as they were saved, of a run like this one.

        Raises:
            InputError: It is of another run, or no snapshot.
            ValueError: It is damaged.
        """
        with files.parsing():
            content, sealed = files.read_sealed(path)
            state = arrays.read_npz(content)
            if bool(state.pop("sealed", False)) != sealed:
                raise ValueError("changed since it was saved: its sha256 is missing")
            identity = json.loads(str(state.pop("identity", "null")))
            found = None if identity is None else dict(identity)
        if found is None:
            raise InputError(
                f"{path}: holds weights but not the state of a training run; "
                "legal: a snapshot_iter_N.npz"
            )
        refuse_other_run(str(path), found, self.identity)
        return state

    def _read(self, path: Path, trainer) -> dict[str, np.ndarray]:
        """As ``_parse``; fits ``trainer``, of which nothing is changed before all is checked."""
        state = self._parse(path)
        with files.parsing():
            expected = _expected(trainer.updater)
            found = {name: Kind.of(array) for name, array in state.items()}
            rest = {name for name in found if name.startswith(("extension", "_snapshot"))}
            arrays.compare({name: found[name] for name in found.keys() - rest}, expected)
            for name in sorted(rest | ALWAYS.keys()):  # of which a process may take but a part
                number = found.get(name) if found.get(name) in NUMBERS else NUMBERS[0]
                arrays.compare({name: found.get(name)}, {name: ALWAYS.get(name, number)})
            arrays.check_values(state)
            iteration, end = state["updater/iteration"], trainer.updater.schedule.iterations
            if iteration > end:
                raise ValueError(f"updater/iteration: found {iteration}, legal: up to {end}")
            [float(error) for error in str(state["updater/warm_up/errors"]).split(",") if error]
            if not isinstance(json.loads(str(state[LOG])), list):
                raise ValueError(f"{LOG}: not a list")
            if not all(isinstance(each, str) for each in json.loads(str(state[NAMES]))):
                raise ValueError(f"{NAMES}: not a list of names")
        return state


LOG, NAMES = "extensions/LogReport/_log", "extensions/LogReport/_summary/_names"
ALWAYS = {  # beside the updater's: what every snapshot holds
    LOG: Kind("text", ()),
    NAMES: Kind("text", ()),
    "_snapshot_elapsed_time": Kind("float64", ()),
}
NUMBERS = (Kind("float64", ()), Kind("int64", ()))  # what else of extensions may stand in one


def _iteration(snapshot: Path) -> int:
    number = snapshot.stem.removeprefix("snapshot_iter_")
    return int(number) if number.isdecimal() else -1


def _expected(updater) -> dict[str, Kind]:
    """What a snapshot holds of an updater that has not trained yet."""
    serializer = DictionarySerializer()
    updater.serialize(serializer["updater"])
    expected = {name: Kind.of(array) for name, array in serializer.target.items()}
    for name, parameter in updater.optimizer.target.namedparams():
        if parameter.update_rule.enabled:  # has a velocity from its first update on
            expected[f"updater/optimizer{name}/v"] = Kind.of(parameter)
    return expected


def refuse_other_run(where: str, found: dict, wanted: dict) -> None:
    """Raise ``InputError`` naming the flags of the first thing in which two runs differ."""
    for key in {**wanted, **found}:
        if found.get(key) != wanted.get(key):
            raise InputError(
                f"{where}: holds {flags.spell(key, found, wanted)}, asked for is "
                f"{flags.spell(key, wanted, found)}; give that run's flags, or another --out"
            )


class Progress(training.Extension):
    """One printed line per epoch; on a terminal also a bar with the time left.

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
        """Letters that fit a line: in the last column, some terminals begin a new one."""
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
        """Seconds left at the pace since this process began."""
        begin, first = self._start
        done = trainer.updater.iteration - first
        return (time.monotonic() - begin) / max(done, 1) * (self.iterations - first - done)
