"""Downloads CIFAR-10's archive: whole and verified, or continued by the next call."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

from resnet.command import InputError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SIZE = 170_498_071  # bytes of the official archive
MD5 = "c58f30108f718f92721af3b95e74349a"
DEADLINE = 3600  # seconds for a whole download, 47 kB/s; the next one goes on from there


def cache_name() -> str:
    """Return the name under which Chainer caches the download of ``URL``."""
    return hashlib.md5(URL.encode()).hexdigest()


def fetch(path: Path, url: str = URL, size: int = SIZE, md5: str = MD5) -> None:
    """Download the archive to ``path``, which appears only once size and md5 are right.

    An interrupted download is kept beside ``path`` and continued by the next call. Processes that
    call this at the same time wait for each other.

    Raises:
        InputError: No network, or what came is not the archive.
    """
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_locked(partial)
    except OSError as error:
        raise InputError(f"cannot write the download {partial}: {error.strerror}") from None
    with file:
        if path.exists():  # another process was faster
            partial.unlink(missing_ok=True)
            return
        try:
            _append(file, url, size)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise InputError(
                f"cannot download {url}: {reason}; {file.tell():,} bytes are kept in {partial} and "
                "the same command goes on from there. Without a network: --data PATH or "
                "CHAINER_DATASET_ROOT name a local copy, --data synthetic needs none"
            ) from None
        found = md5_of(partial)
        if file.tell() != size or found != md5:
            what = describe(partial)
            partial.unlink()
            raise InputError(
                f"{url} is not the official archive: found {what}, md5 {found}; "
                f"expected {size:,} bytes, md5 {md5}. The download was removed"
            )
        os.fsync(file.fileno())
        os.replace(partial, path)


def _open_locked(partial: Path) -> BinaryIO:
    """Open ``partial`` for appending, held by this process alone until it is closed."""
    import fcntl  # Unix alone has it, and only a download needs it

    while True:
        # Unbuffered: after a full disk there is nothing left to write when the file is closed.
        file = open(partial, "ab", buffering=0)  # noqa: SIM115 the caller closes it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another process that downloads CIFAR-10", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # file systems of some clusters know no locks; the md5 still guards
            return file
        # Meanwhile the other process may have renamed or removed the file that was opened.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(partial)):
                return file
        file.close()


def _append(file: BinaryIO, url: str, size: int) -> None:
    """Append to ``file`` what is missing of ``url``; from the start if the server insists."""
    deadline = time.monotonic() + DEADLINE
    have = file.seek(0, os.SEEK_END)
    if have == size:  # all there, but its check was interrupted
        return
    for start in (have, 0) if 0 < have < size else (0,):
        request = urllib.request.Request(url)
        if start:
            request.add_header("Range", f"bytes={start}-")
        try:
            response = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            if start and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                continue
            raise
        with response:
            partial = response.status == http.HTTPStatus.PARTIAL_CONTENT
            expected = f"bytes {start}-{size - 1}/{size}"
            if partial and response.headers.get("Content-Range") != expected:
                if start:
                    continue  # a part of some other file
                raise OSError("the server sent a part that was not asked for")
            start = start if partial else 0
            length = response.headers.get("Content-Length")
            file.truncate(start)
            total = start + int(length) if length else size
            _copy(response, file, have=start, total=total, limit=size, deadline=deadline)
            return


def _copy(
    response: BinaryIO, file: BinaryIO, *, have: int, total: int, limit: int, deadline: float
) -> None:
    """Append ``response`` to the ``have`` bytes of ``file``, at most to just above ``limit``."""
    terminal = sys.stderr.isatty()
    step, end = (1, "\r") if terminal else (20, "\n")
    shown = -1
    file.seek(have)
    try:
        while have <= limit and (chunk := response.read1(1 << 16)):  # what has come
            file.write(chunk)
            have += len(chunk)
            if have < total and time.monotonic() > deadline:
                raise TimeoutError(f"it took longer than {DEADLINE} s")
            percent = 100 * have // max(total, 1)
            if percent // step > shown:
                shown = percent // step
                bar = f"{'#' * (percent * 40 // 100):.<40}"
                line = f"CIFAR-10 [{bar}] {percent:3d} % of {total / 1e6:.1f} MB"
                print(line, end=end, file=sys.stderr, flush=True)
    finally:
        if terminal:
            print(file=sys.stderr)
    if have < total and have <= limit:
        raise OSError(f"the connection ended after {have:,} of {total:,} bytes")


def md5_of(path: Path) -> str:
    """Compute the md5 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def describe(path: Path) -> str:
    """Say what a file that should be the archive looks like."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    size = path.stat().st_size
    if start.startswith((b"<!doctype html", b"<html")):
        return f"an HTML page of {size:,} bytes"
    if start.startswith(b"\x1f\x8b") and size < SIZE:
        return f"{size:,} bytes, perhaps a truncated download"
    return f"{size:,} bytes"
