"""Reads what training wrote: run folders, and plain logs of Chainer's ``LogReport``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from plots.runs import NAMES, Group, Run
from resnet import command, files
from resnet.command import InputError, Parser

EVALUATIONS = ("test", "validation")  # prefixes of the log's keys, in order of preference


def _between(least: float, most: float, *kinds: type):
    """Make a check of a number; NaN and infinity are none that lies between others."""
    kinds = kinds or (int, float)
    return lambda value: type(value) in kinds and least <= value <= most


def _is_loss(value: object) -> bool:
    """Tell whether it is a number, or none because training diverged."""
    return isinstance(value, float) or _between(-1e300, 1e300, int)(value)


def _is_plan(value: object) -> bool:
    drops = isinstance(value, dict) and value.get("drops")
    return (
        isinstance(drops, list)
        and _between(1, MOST, int)(value.get("iterations"))
        and all(map(_between(0, MOST), drops))
        and isinstance(value.get("name"), str)
    )


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | bool) or _between(-MOST, MOST)(value)


MOST = 1e15  # iterations, epochs, seconds
ACCURACY = _between(0, 1)
ENTRY = {"epoch": _between(0, MOST), "iteration": _between(0, MOST), "main/loss": _is_loss}
OPTIONAL = {  # in an entry or not
    "elapsed_time": _between(0, MOST),
    "lr": _between(0, MOST),
    "stage": _between(0, MOST, int),
}
IDENTITY = {  # what the plots need of ``run`` in args.json
    "architecture": lambda value: isinstance(value, str),
    "n": _between(1, 1e6, int),
    "seed": _between(0, MOST, int),
    "batchsize": _between(1, MOST, int),
    "data": lambda value: isinstance(value, str),
    "training images": _between(1, MOST, int),
    "schedule": _is_plan,
}


def read(paths: Sequence[Path | str]) -> list[Group]:
    """Read the runs under ``paths`` and put those that differ only in the seed together.

    A log or folder that cannot be read is named on stderr and left out.

    Args:
        paths: Run folders, folders that hold run folders at any depth, or log files.

    Raises:
        InputError: A path does not exist, or there is no readable log at all.
    """
    found: dict[str, Run] = {}
    every = (log for given in paths for log in _find(given, _skip_folder))
    for path in {log.resolve(): log for log in every}.values():
        try:
            run = read_run(path)
        except files.Unreadable as error:
            _skip(path, f"{error.path.name} {error.why}")
            continue
        except (ValueError, OSError) as error:
            _skip(path, str(error))
            continue
        # Equal identities are one run made twice, and no second measurement.
        key = json.dumps(run.identity, sort_keys=True) if run.identity else str(path)
        twin = found.get(key)
        if twin:
            further = max(twin, run, key=lambda each: each.entries[-1]["iteration"])
            other = run if further is twin else twin
            _skip(other.path, f"the same run as {further.path}")
            run = further
        found[key] = run
    if not found:
        raise InputError(
            f"{', '.join(map(str, paths))}: no log that can be read; legal: run folders, "
            "folders of run folders, or log files"
        )
    groups: dict[str, Group] = {}
    for run in found.values():
        if run.identity:
            conditions = {key: run.identity[key] for key in run.identity if key != "seed"}
        else:
            conditions = {"log": str(run.path)}
        conditions["evaluation"] = run.evaluation
        key = json.dumps(conditions, sort_keys=True)
        groups.setdefault(key, Group(conditions, [])).runs.append(run)
    for group in groups.values():
        group.runs.sort(key=lambda run: run.identity.get("seed", 0))
    order = list(NAMES)
    return sorted(
        groups.values(),
        key=lambda g: (
            order.index(g.architecture) if g.architecture in order else len(order),
            g.layers or 0,
            g.conditions.get("data", ""),
            str(g.runs[0].path),
        ),
    )


def stamps(paths: Sequence[Path]) -> dict[Path, int]:
    """Tell when each log under ``paths`` was last written; without those that are not there yet."""
    found = (log for path in paths if Path(path).exists() for log in _find(path))
    return {log: log.stat().st_mtime_ns for log in found if log.exists()}


def _find(path: Path | str, refused: Callable[[OSError], None] | None = None) -> Iterable[Path]:
    """Find log files at or under ``path``; a run folder is not searched further.

    Args:
        path: A log, or a folder.
        refused: Told of each folder that cannot be read.
    """
    path = Path(path)
    if path.is_file():
        yield path
    elif path.is_dir():
        for folder, folders, names in os.walk(path, onerror=refused):
            folders.sort()
            if "log" in names or "args.json" in names:
                folders.clear()
                yield Path(folder, "log")
    else:
        raise InputError(f"{path}: no such file or folder; legal: run folders or log files")


def _skip(path: Path, reason: str) -> None:
    print(command.one_line(f"skipped {path}: {reason}"), file=sys.stderr)


def _skip_folder(error: OSError) -> None:
    _skip(Path(error.filename), f"cannot be read ({command.reason(error)})")


def read_run(log: Path | str) -> Run:
    """Read a log and the args.json beside it, if there is one.

    Raises:
        ValueError: One of them is not what training writes.
        Unreadable: One of them is there, and cannot be read.
    """
    log = Path(log)
    try:
        entries = files.read_json(log)
    except FileNotFoundError:
        raise ValueError("no log yet") from None
    except ValueError as error:
        raise ValueError(f"not JSON, or half-written: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError("not a log with entries")
    for entry in entries:
        for key, legal in (ENTRY | OPTIONAL).items():
            if not isinstance(entry, dict) or (key in ENTRY and key not in entry):
                raise ValueError(f"not a training log: an entry without {key}")
            if key in entry and not legal(entry[key]):
                raise ValueError(f"not a training log: an entry with an impossible {key}")
    for evaluation in EVALUATIONS:
        values = [e[key] for e in entries if (key := f"{evaluation}/main/accuracy") in e]
        if values:
            break
    if not values or not all(map(ACCURACY, values)):
        legal = " or ".join(f"{evaluation}/main/accuracy" for evaluation in EVALUATIONS)
        raise ValueError(f"no {legal} from 0 to 1 in it")
    arguments = log.with_name("args.json")
    if log.name != "log" or not arguments.exists():
        return Run(log, entries, evaluation, {}, [])
    try:
        record = files.read_json(arguments)
        identity, starts = dict(record["run"]), [dict(start) for start in record["starts"]]
        whole = all(legal(identity.get(key)) for key, legal in IDENTITY.items())
        others = identity.keys() - IDENTITY.keys()
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole or not all(_is_plain(identity[key]) for key in others):
        raise ValueError("args.json beside it is half-written or not from a training run")
    files.check_digest(log.parent)
    return Run(log.parent, entries, evaluation, identity, starts)


def parser(description: str) -> Parser:
    """Make a parser of the arguments that every script here has."""
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "runs",
        type=command.path,
        nargs="+",
        metavar="RUNS",
        help="run folders, folders of run folders, or logs of Chainer's LogReport",
    )
    return p
