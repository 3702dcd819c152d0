"""What a user of a command meets: one-line errors, the exit codes they end with, and times."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TextIO

USAGE = 2  # a flag or argument is wrong
FAILURE = 1  # everything else: files, network, damaged data
INTERRUPTED = 130  # Ctrl-C, as shells say it


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

    def error(self, message: str):
        self.exit(USAGE, f"error: {message} (see --help)\n")


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
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
    try:
        command()
    except InputError as error:
        fail(f"error: {error}", error.code)
    except OSError as error:  # an unwritable or full folder met after the checks at the start
        name = f"{error.filename}: " if error.filename else ""
        fail(f"error: {name}{error.strerror or error}", FAILURE)
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
