"""Files that are either whole or not there: written beside, then renamed; one writer a folder."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from resnet.command import InputError


@contextlib.contextmanager
def whole(path: Path | str) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name once the body has succeeded.

    Raises:
        OSError: It cannot be written, for instance on a full disk; ``filename`` is ``path``.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def only_writer(folder: Path | str) -> Iterator[None]:
    """The right to write into ``folder``, which one process at a time has.

    The system gives it back however the process ends. What an ended writer has left half
    written is removed. Where several computers share the folder, its file system has to support
    locks between them (NFS does; Lustre when mounted with ``flock``).

    Raises:
        InputError: Another process has it.
    """
    import fcntl  # Unix alone has it, and only who writes a folder needs it

    folder = Path(folder)
    with open(folder / ".writer", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"{folder}: {file.read().strip() or 'another process'} is writing to it; "
                "legal: wait for it, stop it, or choose another --out"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"warning: {folder} cannot be locked ({error.strerror})", file=sys.stderr)
        file.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
        for half in folder.glob(".*.tmp"):
            half.unlink(missing_ok=True)
        yield


def run_name(net: str, seed: int, choices: dict) -> str:
    """Name of a run folder: what is trained, the choices beyond the report's, the seed.

    So runs with different choices lie beside each other. Not all that a run is stands in the name:
    a folder of other data or another batch size is refused.

    Args:
        net: For instance ``resnet-20``.
        seed: Its seed.
        choices: Flags and their values, of those that are not the report's.
    """
    words = []
    for name, value in choices.items():
        own = "" if value is True else f"-{value}" if isinstance(value, str) else f"{value:g}"
        words.append(name.replace(" ", "-") + own)
    return "-".join([net, *words, f"seed{seed}"])


def write_json(path: Path | str, value: object) -> None:
    """Write ``value`` as indented JSON."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
