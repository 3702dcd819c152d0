"""What a user of a command meets: one-line errors, the exit codes they end with, and times."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

USAGE = 2  # a flag or argument is wrong
FAILURE = 1  # everything else: files, network, damaged data
STOPPED = 75  # training was asked to stop; the same command goes on
INTERRUPTED = 130  # Ctrl-C, as shells say it

# Started with a closed output (`>&-`), as by some daemons, Python has none: nobody reads it then.
for _name in ("stdout", "stderr"):
    if getattr(sys, _name) is None:
        setattr(sys, _name, open(os.devnull, "w"))  # noqa: SIM115 until the process ends


class InputError(Exception):
    """A mistake or a circumstance that the user can mend.

    Args:
        message: One line that names the flag or file, what was found and what is legal.
        code: Exit status of the command: ``USAGE`` or ``FAILURE``.
    """

    def __init__(self, message: str, code: int = FAILURE) -> None:
        super().__init__(message)
        self.code = code


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            if word == "--":
                break
            # Before Python 3.13 argparse takes such a value away and goes on with an empty list.
            if flag := re.fullmatch(r"(--[^=]+|-[A-Za-z])=?--", word):
                self.error(f"argument {flag[1]}: found '--', legal: a value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        self.exit(USAGE, f"error: {one_line(message)} (see --help)\n")


def path(text: str) -> Path:
    """Parse an argument: the name of a file or folder; ``~``, which a shell leaves, is a home."""
    if not text:
        raise argparse.ArgumentTypeError("found '', legal: the name of a file or folder")
    try:
        return Path(text).expanduser()
    except RuntimeError:  # of a user who has none
        raise argparse.ArgumentTypeError(f"found '{text}', legal: a user with a home") from None


def name(text: str) -> str:
    """Parse an argument: what a new folder is called, in a place that is not the user's choice."""
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"found '{text}', legal: letters, digits, '.', '-', '_'")
    return text


def one_line(text: object) -> str:
    """Write line breaks and other characters of ``text`` that do not print as in Python."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def reason(error: BaseException) -> str:
    """Put a library's words of its failure into one line of at most 300 characters."""
    text = getattr(error, "strerror", None) or str(error)
    return one_line(" ".join(text.split()) or type(error).__name__)[:300]


def clock(seconds: float) -> str:
    """Write seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


@contextlib.contextmanager
def unheard(stream: TextIO) -> Iterator[None]:
    """Go on where ``stream`` reaches nobody: its terminal is closed, or the reader of its pipe.

    Training is not lost for want of somebody who watches it. Once that was noticed, what is
    printed goes nowhere.
    """
    try:
        yield
    except OSError:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), stream.fileno())


def fail(message: str, code: int) -> None:
    """End this process; ``parallel`` has another way, which ends all that train together."""
    with unheard(sys.stdout):  # what was printed before the error also stands before it
        sys.stdout.flush()
    print(message, file=sys.stderr)
    sys.exit(code)


def run(command: Callable[[], None]) -> None:
    """Call ``command`` and end the process with one line instead of a traceback on a user error."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # not one of Python's own
            stream.reconfigure(errors="backslashreplace")  # for a terminal that knows ASCII alone
    try:
        command()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; at the end Python flushes once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except InputError as error:
        fail(f"error: {one_line(error)}", error.code)
    except OSError as error:  # an unwritable or full folder met after the checks at the start
        name = f"{error.filename}: " if error.filename else ""
        fail(f"error: {one_line(name)}{error.strerror or reason(error)}", FAILURE)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except Exception:
        fail(traceback.format_exc(), FAILURE)


def _uncaught(kind: type[BaseException], error: BaseException, trace) -> None:
    """Say a Ctrl-C in one line outside ``run``, too, as while modules are imported."""
    if issubclass(kind, KeyboardInterrupt) and not hasattr(sys, "ps1"):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _uncaught
