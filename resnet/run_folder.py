"""What a run keeps in its folder: the right to write there, args.json, log, snapshots, blocks."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from chainer import training
from chainer.serializers import DictionarySerializer, NpzDeserializer

from resnet import arrays, files, flags, weights
from resnet.arrays import Kind
from resnet.command import InputError
from resnet.parallel import Processes

# Of a snapshot: names in it, and what they are.
LOG, NAMES = "extensions/LogReport/_log", "extensions/LogReport/_summary/_names"
ALWAYS = {  # beside the updater's: what every snapshot holds
    LOG: Kind("text", ()),
    NAMES: Kind("text", ()),
    "_snapshot_elapsed_time": Kind("float64", ()),
}
NUMBERS = (Kind("float64", ()), Kind("int64", ()))  # what else of extensions may stand in one


def run_name(net: str, seed: int, shorten: int, choices: dict) -> str:
    """Name a run folder: what is trained, the choices beyond the report's, the seed.

    So runs with different choices lie beside each other. Not all that a run is stands in the name:
    a folder of other data or another batch size is refused.

    Args:
        net: For instance ``resnet-20``.
        seed: Its seed.
        shorten: By how much its schedule is shortened.
        choices: Flags and their values, of those that are not the report's.
    """
    words = [f"shorten{shorten}"] if shorten > 1 else []
    for name, value in choices.items():
        own = "" if value is True else f"-{value}" if isinstance(value, str) else f"{value:g}"
        words.append(name.replace(" ", "-") + own)
    return "-".join([net, *words, f"seed{seed}"])


@contextlib.contextmanager
def only_writers(folder: Path, processes: Processes) -> Iterator[None]:
    """Create ``folder`` and have the right to write into it, as ``files.only_writer`` says.

    A folder that is made here and into which nothing is written is removed in the end.

    Raises:
        InputError: Another process has it, or the folder cannot be written to.
    """
    if processes.rank > 0:
        processes.wait()
        yield
        return
    with contextlib.ExitStack() as held:
        try:
            new = [each for each in (folder, *folder.parents) if not each.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            # First the lock: who writes here already is what a second one has to be told.
            held.enter_context(files.only_writer(folder))
            held.callback(_remove_unused, new)
            files.write(folder / "writable", bytes(4096))  # before hours are spent
            (folder / "writable").unlink()
        except OSError as error:
            raise InputError(
                f"--out: cannot write to {folder} ({error.strerror}); legal: a writable folder"
            ) from None
        processes.wait()
        yield


def _remove_unused(folders: list[Path]) -> None:
    """Remove folders, each of which is in the next one, unless the first has more than its lock."""
    with contextlib.suppress(OSError):  # such as that the next one is not empty
        if folders and os.listdir(folders[0]) == [files.LOCK]:
            (folders[0] / files.LOCK).unlink()
            for folder in folders:
                folder.rmdir()


def read_starts(folder: Path, identity: dict) -> list[dict]:
    """Read what args.json says of the processes that worked in ``folder`` before this one.

    Raises:
        InputError: It is damaged or cannot be read, or the folder is of another run.
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
    refuse_other_run(str(folder), found, identity)
    return starts


def write_record(folder: Path, identity: dict, starts: list[dict], done: bool = False) -> None:
    """Write args.json: what the run is, and which processes have worked on it.

    Args:
        folder: The run folder.
        identity: What the run is.
        starts: Of each process, what it worked with.
        done: Whether the log is whole; then its digest is kept.
    """
    digest = {"sha256": files.digest(folder, identity)} if done else {}
    files.write_json(folder / "args.json", {"run": identity, "starts": starts, **digest})


def has_blocks(folder: Path, wanted: dict) -> bool:
    """Tell whether a run folder holds blocks.h5, intact.

    Args:
        folder: The run folder.
        wanted: What the run writes there, of the attributes of ``weights.Description``.

    Raises:
        InputError: It is of another run, or may be: it cannot be read, or its network is none of
            today's.
    """
    path = folder / "blocks.h5"
    if not path.exists():
        return False
    try:
        found = asdict(weights.describe(path))
    except weights.Damaged as error:
        print(f"warning: {error}; it will be written again", file=sys.stderr)
        return False
    for name, value in wanted.items():
        if found[name] != value:
            raise InputError(
                f"{path}: of another run, holds {name} = {_words(found[name])}; "
                f"legal here: {name} = {_words(value)}, or no such file"
            )
    return True


def _words(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def refuse_other_run(where: str, found: dict, wanted: dict) -> None:
    """Raise ``InputError`` naming the flags of the first thing in which two runs differ."""
    for key in {**wanted, **found}:
        if found.get(key) != wanted.get(key):
            try:
                with files.parsing():
                    holds, asked = flags.spell(key, found, wanted), flags.spell(key, wanted, found)
            except ValueError:
                raise InputError(
                    f"{where}: damaged, as it names an impossible {key}; legal: another --out"
                ) from None
            raise InputError(
                f"{where}: holds {holds}, asked for is {asked}; "
                "give that run's flags, or another --out"
            )


def write_log(path: Path, entries: list[dict]) -> None:
    """Write a log as Chainer's ``LogReport`` does."""
    files.write(path, json.dumps(entries, indent=4))


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


def check_kept_log(folder: Path, evaluation: str, iterations: int) -> None:
    """Raise where the log of a complete run is not the one that was written.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It is no log, ends elsewhere than at ``iterations``, or its digest differs.
        Unreadable: It may be intact.
    """
    check_log(files.read_json(folder / "log"), evaluation, iterations)
    files.check_digest(folder)


class Snapshots(training.Extension):
    """Keeps the whole state of a training run in files ``snapshot_iter_N.npz``.

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
        """Tell the seconds since the newest snapshot, or since training began."""
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
        files.write(path, files.seal(content.getvalue()))
        # Newer ones are damaged, or another --resume was asked for: they take nobody's place.
        older = [each for each in self.paths() if _iteration(each) <= updater.iteration]
        for old in older[self.keep :]:
            old.unlink(missing_ok=True)
        self._last = time.monotonic()
        return path

    def paths(self) -> list[Path]:
        """List the snapshots in the folder, newest first."""
        found = self.folder.glob("snapshot_iter_*.npz")
        return sorted(found, key=_iteration, reverse=True)

    def resume_newest(self, trainer) -> Path | None:
        """Go on from the newest snapshot that is intact; name each damaged one on stderr.

        Raises:
            InputError: A newer one cannot be read, or is of another run.
        """
        paths = self.paths()
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
            InputError: It is missing, damaged, unreadable, no snapshot, or of another run.
        """
        legal = "legal: a snapshot_iter_N.npz"
        if not path.is_file():
            found = "not a file" if path.exists() else "no such file"
            raise InputError(f"--resume {path}: {found}; {legal}")
        try:
            state = self._read(path, trainer)
        except ValueError as error:
            raise InputError(
                f"--resume {path}: not a readable snapshot ({error}); {legal}"
            ) from None
        NpzDeserializer(state).load(trainer)

    def read_log(self, evaluation: str, iterations: int) -> tuple[list[dict], Path] | None:
        """Find a log that ends at ``iterations``, and the snapshot it is in; None without one."""
        for path in self.paths():
            with contextlib.suppress(ValueError), files.parsing():
                content = self._parse(path)
                entries = json.loads(str(content[LOG]))
                check_log(entries, evaluation, iterations)
                return entries, path
        return None

    def _parse(self, path: Path) -> dict[str, np.ndarray]:
        """Read the arrays of a snapshot, as they were saved, of a run like this one.

        Raises:
            InputError: It is of another run, no snapshot, or cannot be read.
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
        """Read as ``_parse`` does, and check that all fits ``trainer``, which is not changed."""
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


def _iteration(snapshot: Path) -> int:
    number = snapshot.stem.removeprefix("snapshot_iter_")
    return int(number) if number.isdecimal() else -1


def _expected(updater) -> dict[str, Kind]:
    """Tell what a snapshot holds of an updater that has not trained yet."""
    serializer = DictionarySerializer()
    updater.serialize(serializer["updater"])
    expected = {name: Kind.of(array) for name, array in serializer.target.items()}
    for name, parameter in updater.optimizer.target.namedparams():
        if parameter.update_rule.enabled:  # has a velocity from its first update on
            expected[f"updater/optimizer{name}/v"] = Kind.of(parameter)
    return expected
