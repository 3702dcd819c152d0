"""Reads what training wrote: run folders, and plain logs of Chainer's ``LogReport``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from plots.runs import NAMES, Group, Run
from resnet.command import InputError, Parser

EVALUATIONS = ("test", "validation")  # prefixes of the log's keys, in order of preference
IDENTITY = {  # what the plots need of ``run`` in args.json
    "architecture": str,
    "n": int,
    "seed": int,
    "batchsize": int,
    "data": str,
    "training images": int,
    "schedule": dict,
}


def read(paths: Sequence[Path | str]) -> list[Group]:
    """Read the runs under ``paths`` and put those that differ only in the seed together.

    A log that cannot be read is named on stderr and left out.

    Args:
        paths: Run folders, folders that hold run folders at any depth, or log files.

    Raises:
        InputError: A path does not exist, or there is no readable log at all.
    """
    found: dict[str, Run] = {}
    for path in {log.resolve(): log for given in paths for log in _find(given)}.values():
        try:
            run = read_run(path)
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
    """When each log under ``paths`` was last written; those that are not there yet left out."""
    found = (log for path in paths if Path(path).exists() for log in _find(path))
    return {log: log.stat().st_mtime_ns for log in found if log.exists()}


def _find(path: Path | str) -> Iterable[Path]:
    """Log files at or under ``path``; a run folder is not searched further."""
    path = Path(path)
    if path.is_file():
        yield path
    elif path.is_dir():
        for folder, folders, names in os.walk(path):
            folders.sort()
            if "log" in names or "args.json" in names:
                folders.clear()
                yield Path(folder, "log")
    else:
        raise InputError(f"{path}: no such file or folder; legal: run folders or log files")


def _skip(path: Path, reason: str) -> None:
    print(f"skipped {path}: {reason}", file=sys.stderr)


def read_run(log: Path | str) -> Run:
    """Read a log and the args.json beside it, if there is one.

    Raises:
        ValueError: One of them is not what training writes.
        OSError: It cannot be opened.
    """
    log = Path(log)
    try:
        entries = json.loads(log.read_text())
    except FileNotFoundError:
        raise ValueError("no log yet") from None
    except ValueError:
        raise ValueError("not JSON, or half-written") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError("not a log with entries")
    for entry in entries:
        for key in ("epoch", "iteration", "main/loss"):
            if not isinstance(entry, dict) or not _is_number(entry.get(key)):
                raise ValueError(f"not a training log: an entry without {key}")
    for evaluation in EVALUATIONS:
        values = [e[key] for e in entries if (key := f"{evaluation}/main/accuracy") in e]
        if values:
            break
    if not values or not all(map(_is_number, values)):
        legal = " or ".join(f"{evaluation}/main/accuracy" for evaluation in EVALUATIONS)
        raise ValueError(f"no {legal} in it")
    arguments = log.with_name("args.json")
    if log.name != "log" or not arguments.exists():
        return Run(log, entries, evaluation, {}, [])
    try:
        record = json.loads(arguments.read_text())
        identity, starts = record["run"], record["starts"]
        whole = all(isinstance(identity[key], kind) for key, kind in IDENTITY.items())
        whole = whole and min(identity["schedule"]["iterations"], identity["training images"]) > 0
        whole = whole and all(isinstance(start, dict) for start in starts)
        whole = whole and all(map(_is_number, identity["schedule"]["drops"]))
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError("args.json beside it is half-written or not from a training run")
    return Run(log.parent, entries, evaluation, identity, starts)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def parser(description: str) -> Parser:
    """The arguments that every script here has."""
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUNS",
        help="run folders, folders of run folders, or logs of Chainer's LogReport",
    )
    return p
