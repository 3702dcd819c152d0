"""Files that are either whole or not there: written beside, then renamed; one writer a folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import stat
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from resnet.command import InputError, reason

LARGEST = 1 << 31  # bytes of a file that is read as a whole
LOCK = ".writer"  # of a folder, in it
SEAL = b"\nsha256 of all before: "  # and the digest end a saved file


class NotPlain(OSError):
    """A file that is not read: it is no regular file, or larger than ``LARGEST``."""


class Unreadable(InputError):
    """A file that cannot be read, though it may be intact: nothing may take its place.

    Args:
        path: The file.
        error: What the system said.

    Attributes:
        why: That it cannot be read, and why not.
    """

    def __init__(self, path: Path, error: OSError) -> None:
        self.path, self.why = path, f"cannot be read ({reason(error)})"
        super().__init__(f"{path}: {self.why}; legal: a readable file")


@contextlib.contextmanager
def whole(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that takes its name once the body has succeeded.

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
        _sync_folder(path.parent)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Let a new name outlast a power cut, as its content does, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: Path) -> bytes:
    """Read a regular file; a pipe or a device might never end.

    Raises:
        NotPlain: It is none, or larger than ``LARGEST``.
        OSError: It cannot be read.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise NotPlain(errno.EINVAL, "not a regular file", str(path))
    if status.st_size > LARGEST:
        raise NotPlain(errno.EFBIG, f"larger than {LARGEST:,} bytes", str(path))
    return Path(path).read_bytes()


def read_ours(path: Path) -> bytes:
    """Read, as ``read`` does, a file that this project wrote.

    Raises:
        FileNotFoundError: There is none.
        NotPlain: It is no regular file, or larger than ``LARGEST``.
        Unreadable: It is there, and cannot be read.
    """
    try:
        return read(path)
    except (FileNotFoundError, NotPlain):
        raise
    except OSError as error:
        raise Unreadable(path, error) from None


def seal(content: bytes) -> bytes:
    """Put the digest of ``content`` behind it."""
    return content + SEAL + hashlib.sha256(content).hexdigest().encode()


def read_sealed(path: Path) -> tuple[bytes, bool]:
    """Read what ``seal`` was given, verified, and True; or a file without a digest, and False.

    Raises:
        ValueError: It has changed since.
        OSError, Unreadable: As ``read_ours``.
    """
    content = read_ours(path)
    body, mark, _ = content.rpartition(SEAL)
    if not mark:
        return content, False
    if seal(body) != content:
        raise ValueError("changed since it was saved: its sha256 differs")
    return body, True


def read_if_whole(path: Path) -> bytes | None:
    """Read what ``seal`` was given; None where the file is missing, unreadable or damaged."""
    with contextlib.suppress(OSError, ValueError, Unreadable):
        content, is_sealed = read_sealed(path)
        return content if is_sealed else None
    return None


def digest(folder: Path, run: dict) -> str:
    """Compute the sha256 of a run folder's log and of what the run is."""
    words = json.dumps(run, sort_keys=True).encode()
    return hashlib.sha256(read_ours(folder / "log") + words).hexdigest()


def check_digest(folder: Path) -> None:
    """Raise ``ValueError`` where a log has changed since the end of its run.

    args.json holds the digest of runs that are complete, from before there was one excepted.
    """
    if (folder / "args.json").exists():
        content = read_json(folder / "args.json")
        expected = content.get("sha256")
        if expected is not None and expected != digest(folder, content["run"]):
            raise ValueError("changed since training ended: the sha256 in args.json differs")


@contextlib.contextmanager
def parsing() -> Iterator[None]:
    """Turn whatever the body raises, but ``Unreadable``, into a ``ValueError`` of one line.

    A damaged or hostile file can make a library raise anything, or warn of it in its own words.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Unreadable:
        raise
    except Exception as error:
        raise ValueError(reason(error)) from None


def read_json(path: Path) -> object:
    """Read a JSON file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not JSON, or ``NotPlain``.
        Unreadable: It is there, and cannot be read.
    """
    try:
        content = read_ours(path)
    except NotPlain as error:
        raise ValueError(reason(error)) from None
    with parsing():
        return json.loads(content)


@contextlib.contextmanager
def only_writer(folder: Path | str) -> Iterator[None]:
    """Hold the right to write into ``folder``, which one process at a time has.

    The system gives it back however the process ends. What an ended writer has left half
    written is removed. Where several computers share the folder, its file system has to support
    locks between them (NFS does; Lustre when mounted with ``flock``).

    Raises:
        InputError: Another process has it.
    """
    import fcntl  # Unix alone has it, and only who writes a folder needs it

    folder = Path(folder)
    with open(folder / LOCK, "a+") as file:
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
        # An unused folder is removed with its file, and the lock of a new file is another one.
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
            raise InputError(
                f"{folder}: another process has just made it anew; legal: the same command again"
            )
        file.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
        for half in folder.glob(".*.tmp"):
            half.unlink(missing_ok=True)
        for half in folder.glob("log" + "[a-z0-9_]" * 8):  # in which Chainer's LogReport writes
            if half.is_dir() and {path.name for path in half.iterdir()} <= {"log.json"}:
                shutil.rmtree(half)
        yield


def write(path: Path | str, content: bytes | str) -> None:
    """Write a whole file; a character of a text that no encoding has, as Python writes it."""
    with whole(path) as temporary:
        text = isinstance(content, str)
        temporary.write_bytes(content.encode(errors="backslashreplace") if text else content)


def write_json(path: Path | str, value: object) -> None:
    """Write ``value`` as indented JSON."""
    write(path, json.dumps(value, indent=2) + "\n")
